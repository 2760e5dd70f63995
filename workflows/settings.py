"""What a run is asked to do, what it reports while it goes on, and what it says at its end.

Knows nothing of flags, files or environment variables: `jobs` fills these classes, or a program of
the user's own does.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wallaroo.model.config import TASKS, VQ_FACTOR
from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.model.quantise import WEIGHTS
from wallaroo.model.sampling import ALWAYS, Sampling
from wallaroo.workflows.tasks import EXACT, ONLY_FOR, PRESETS, SAMPLING

DEVICES = ("auto", "cpu", "cuda")
IMAGE_FORMATS = ("png", "webp", "jpeg")
LANGUAGES = ("en", "zh")

_MEANING = (
    "task",
    "samples",
    "seed",
    "sampling",
    "width",
    "height",
    "language",
    "templates",
    "image_format",
    "image_quality",
    "save_tokens",
    "max_prompt_tokens",
    "prompt",
    "prompt_column",
    "allow_https",
    "max_source_bytes",
    "max_source_pixels",
    "restore_size",
    "max_new_tokens",
)
"""Fields that may change a row by meaning. All others only say where, when and how fast it is made."""


_PLACES = ("manifest", "output", "model", "image_root", "address")
"""Fields that are paths or addresses."""


class OptionError(InputError):
    """What was asked of the run itself breaks a rule, not what the manifest or the model holds."""


@dataclass(frozen=True)
class RunConfig:
    """One run, fully resolved. Raises OptionError where a value breaks a rule.

    task: one of `model.config.TASKS`.
    manifest, output: local paths or `s3://bucket/key`; the manifest may be a file, folder or glob.
    model: `tiny` (embedded), or the local or `s3://` folder of a checkpoint.
    samples: output rows of a manifest row that does not say; None for as many as the preset has, or 1.
    seed: seed of the run; a row's own seed is made from it, its id, version and sample number.
    sampling: guidance, temperature and filters of rows that do not say; None for those of the preset,
        or of the task.
    preset: one of `workflows.tasks.PRESETS`, whose sampling and samples hold where none are given.
    prompt: instruction or question of rows that do not say. prompt_column: the column of the manifest
        that holds the prompts, if not `prompt`.
    width, height: pixels; both or neither. Without them the size whose ratio is nearest to 1 is used.
    language: `en`, `zh`, or None to detect it row by row.
    templates: language -> prompt template with `{prompt}`, in place of the built-in one.
    image_format, image_quality: `png` and `webp` are lossless; a quality of 1 to 100 makes `webp`
        lossy, and is that of `jpeg` (95 if None).
    save_tokens: also write the token ids of every picture.
    max_prompt_tokens: longer prompts become error rows.
    image_root: where relative paths of source pictures start, if not in the manifest's folder.
    allow_https: whether sources may be fetched from the web. max_source_bytes, max_source_pixels: of a
        file and of a picture; larger ones become error rows.
    restore_size: give edited pictures the size of their source. max_new_tokens: bound of an answer.
    cfg_interval: first and last share of a picture's steps between which it is guided; lossy unless all are.
    weights: one of `model.quantise.WEIGHTS`, lossy; None for those of the checkpoint.
    limit, where: a look before the whole run: at most so many manifest rows; only those for which a
        DuckDB expression over the manifest's columns holds.
    incremental: plan what is new in a manifest that grows, each time the run is started.
    max_error_rate: share of error rows, 0 to 1, past which the run stops; None for never.
    retry_errors: make error rows of the output that the plan did not refuse once more.
    grace: seconds in which a run that is stopped finishes the shards in its replicas. deadline: seconds
        after which it stops by itself; None for never.
    strict: refuse to go on where a rounding difference to earlier rows is possible.
    replicas: least and most model replicas.
    slots: rows that a replica decodes at once; None for as many as fit.
    device: `auto` is `cuda` where Ray has GPUs.
    threads: CPU threads of a replica; part of what rounds a result, so never derived from `replicas`. A wide
        model takes fewer where so many would round a row by its place (`model.engine.even_threads`).
    address: of a running Ray cluster; None starts a local one and ends it.
    price_per_hour: of one replica with its device, in whatever currency; None where nobody asks.
    """

    manifest: str
    output: str
    task: str = "generate"
    model: str = "tiny"
    samples: int = None  # type: ignore[assignment]
    seed: int = 0
    sampling: Sampling = None  # type: ignore[assignment]
    preset: str | None = None
    prompt: str | None = None
    prompt_column: str | None = None
    width: int | None = None
    height: int | None = None
    language: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    image_format: str = "png"
    image_quality: int | None = None
    save_tokens: bool = False
    max_prompt_tokens: int = 1024
    image_root: str | None = None
    allow_https: bool = False
    max_source_bytes: int = 128 << 20
    max_source_pixels: int = 1 << 26
    restore_size: bool = False
    max_new_tokens: int = 256
    cfg_interval: tuple[float, float] = ALWAYS
    weights: str | None = None
    limit: int | None = None
    where: str | None = None
    incremental: bool = False
    max_error_rate: float | None = None
    retry_errors: bool = False
    grace: float = 60.0
    deadline: float | None = None
    strict: bool = False
    replicas: tuple[int, int] = (1, 1)
    slots: int | None = None
    device: str = "auto"
    threads: int = 1
    address: str | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        try:
            self._resolve()
            self._check()
        except InputError as error:
            raise OptionError(str(error)) from None

    def _resolve(self) -> None:
        """Fills what was left to the task or the preset."""
        sampling, samples = SAMPLING.get(self.task, {}), 1
        if self.preset is not None:
            if self.preset not in PRESETS:
                hint = did_you_mean(self.preset, PRESETS) or "."
                raise InputError(f"preset is '{self.preset}', but must be one of {', '.join(PRESETS)}{hint}")
            task, sampling, samples = PRESETS[self.preset]
            if task != self.task:
                raise InputError(
                    f"preset '{self.preset}' is for {task}, but this is {self.task}: leave it out."
                )
        for name, value in (("sampling", Sampling(**sampling)), ("samples", samples)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _check(self) -> None:
        for name, value, allowed in (
            ("task", self.task, TASKS),
            ("device", self.device, DEVICES),
            ("image_format", self.image_format, IMAGE_FORMATS),
            ("language", self.language, (None, *LANGUAGES)),
            ("weights", self.weights, (None, *WEIGHTS)),
        ):
            if value not in allowed:
                words = [choice for choice in allowed if choice]
                hint = did_you_mean(str(value), words) or "."
                raise InputError(f"{name} is '{value}', but must be one of {', '.join(words)}{hint}")
        for name, count in (
            ("samples", self.samples),
            ("max_prompt_tokens", self.max_prompt_tokens),
            ("limit", self.limit),
            ("slots", self.slots),
            ("threads", self.threads),
            ("max_source_bytes", self.max_source_bytes),
            ("max_source_pixels", self.max_source_pixels),
            ("max_new_tokens", self.max_new_tokens),
        ):
            if count is not None and not 1 <= count < 2**31:
                raise InputError(f"{name} is {count}, but must be at least 1 and less than 2^31.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, but must be from 0 to 2^63 - 1.")
        for name, text in (
            *((name, getattr(self, name)) for name in _PLACES),
            ("where", self.where),
            ("prompt", self.prompt),
            ("prompt_column", self.prompt_column),
        ):
            if text is not None and "\0" in text:
                raise InputError(f"{name} holds a NUL character: remove it.")
        for name in _PLACES:
            # Such a text would stand in run.json and in messages, so this one does not repeat it.
            if "@" in _host(getattr(self, name) or ""):
                raise InputError(
                    f"{name} holds a user or password, which no address of a run may: "
                    f"credentials come from the AWS variables or a profile, a token from RAY_AUTH_TOKEN."
                )
        least, most = self.replicas
        if not 1 <= least <= most:
            raise InputError(
                f"replicas is {least}:{most}, but must be MIN:MAX with 1 <= MIN <= MAX, or one number."
            )
        if (self.width is None) != (self.height is None):
            given, absent = ("width", "height") if self.height is None else ("height", "width")
            value = getattr(self, given)
            raise InputError(f"{given} is {value}, but {absent} is absent: give both, or neither.")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and (side < 1 or side % VQ_FACTOR):
                raise InputError(f"{name} is {side}, but must be a positive multiple of {VQ_FACTOR} pixels.")
        rate = self.max_error_rate
        if rate is not None and not (math.isfinite(rate) and 0 <= rate <= 1):
            raise InputError(f"max_error_rate is {rate}, but must be from 0 to 1 (0.05 is 5 %).")
        for name, seconds in (("grace", self.grace), ("deadline", self.deadline)):
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise InputError(f"{name} is {seconds}, but must be a time of at least 0 s.")
        price = self.price_per_hour
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise InputError(f"price_per_hour is {price}, but must be a number of at least 0.")
        quality = self.image_quality
        if quality is not None:
            if self.image_format == "png":
                raise InputError(
                    f"image_quality is {quality}, but png has none: choose webp or jpeg, or leave it out."
                )
            if not 1 <= quality <= 100:
                raise InputError(f"image_quality is {quality}, but must be from 1 to 100.")
        for language, template in self.templates.items():
            if language not in LANGUAGES:
                raise InputError(f"templates has '{language}', but only {', '.join(LANGUAGES)} exist.")
            if "{prompt}" not in template:
                raise InputError(
                    f"the template of '{language}' lacks {{prompt}}: put it where the prompt shall stand."
                )
        if self.incremental and (self.limit is not None or self.where is not None):
            given = "limit" if self.limit is not None else "where"
            raise InputError(f"{given} chooses rows, but incremental plans all that are new: leave one out.")
        first, last = self.cfg_interval
        if not 0 <= first < last <= 1:
            raise InputError(
                f"cfg_interval is {first:g}:{last:g}, but must be START:END with 0 <= START < END <= 1 "
                f"(0:0.5 guides the first half of a picture's steps)."
            )
        self.sampling.validate()
        if self.task == "understand" and self.sampling.cfg > 1:
            raise InputError(f"cfg is {self.sampling.cfg:g}, but answers have no guidance: give at most 1.")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("prompt says nothing: give a text, or leave it out.")
        for one in dataclasses.fields(self):
            tasks = ONLY_FOR.get(one.name, (self.task,))
            default = {} if one.name == "templates" else one.default
            if self.task not in tasks and getattr(self, one.name) != default:
                raise InputError(
                    f"{one.name} is for {' and '.join(tasks)}, but this is {self.task}: leave it out."
                )

    @property
    def mode(self) -> str:
        """The lossy shortcuts of the run, in words such as `weights int8`; `exact` without any."""
        first, last = map(float, self.cfg_interval)
        shortcuts = [f"cfg-interval {first}:{last}"] if self.cfg_interval != ALWAYS else []
        shortcuts += [f"weights {self.weights}"] if self.weights else []
        return ", ".join(shortcuts) or EXACT

    def config_digest_fields(self, model_digest: str) -> dict[str, Any]:
        """Plain JSON values of all that may change a row by meaning; their digest guards an output.

        `model_digest` stands for the checkpoint, and so for its size table; where the checkpoint
        lies may change. `mode` is among them only where it is lossy.
        """
        values = self.to_dict()
        named = (name for name in _MEANING if self.task in ONLY_FOR.get(name, (self.task,)))
        lossy = {"mode": self.mode} if self.mode != EXACT else {}
        return {"model_digest": model_digest, **{name: values[name] for name in named}, **lossy}

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain JSON value."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        values["sampling"] = dataclasses.asdict(self.sampling)
        values["templates"] = dict(self.templates)
        values["replicas"] = list(self.replicas)
        values["cfg_interval"] = list(self.cfg_interval)
        return values


def _host(place: str) -> str:
    """What stands between `://` and the next slash; empty for a path."""
    return place.partition("://")[2].partition("/")[0]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    rows: output rows of the whole run, 0 while it is not known.
    done: rows finished so far, error rows and those of earlier runs included.
    before: how many of `done` were there when this run started.
    errors: error rows among `done`.
    waiting: what the run is waiting for, in words (`waiting for 1 GPU: 0 of 4 up, 3 min`), or empty.
    """

    rows: int = 0
    done: int = 0
    before: int = 0
    errors: int = 0
    waiting: str = ""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    rows: output rows planned; ok, errors: of these, as they now stand in the output.
    before: rows that were there already when the run started.
    seconds: wall time of this run.
    """

    output: str
    rows: int
    ok: int
    errors: int
    before: int
    seconds: float
