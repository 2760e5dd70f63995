"""The options of a run, each declared once.

Knows nothing of flags, files or environment variables: `jobs` fills these classes, or a user's own program
does. What an option is and what follows from a declaration is in `options`.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wallaroo.model.config import CONTEXT_TOKENS, LANGUAGES, MAX_NEW_TOKENS, TASKS, TOKEN_PIXELS, VQ_FACTOR
from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.workflows.options import (
    INT64_MAX,
    INTERVAL,
    SWITCH,
    OptionError,
    check_place,
    choice,
    number,
    option,
    options_of,
    place,
    text,
    whole,
)
from wallaroo.workflows.run_control import RunControl
from wallaroo.workflows.tasks import DRAWING_TASKS, EXACT, PICTURE_TASKS, PRESETS, SAMPLING, Preset

if TYPE_CHECKING:
    from wallaroo.model.sampling import Sampling

MAX_SAMPLES = 10_000

ALL_STEPS = (0.0, 1.0)
"""A `cfg_interval` that leaves no step out."""

_SCALE = number("a finite number of at least 0", lambda scale: scale >= 0)
_SIDE = whole(1, metavar="PIXELS")
_SEEN = whole(TOKEN_PIXELS, CONTEXT_TOKENS * TOKEN_PIXELS, "PIXELS", f" ({TOKEN_PIXELS} pixels are a token)")


def check_task(task: str) -> None:
    """Raises an OptionError if a task is unknown."""
    if task not in TASKS:
        hint = did_you_mean(str(task), TASKS) or "."
        raise OptionError(f"task is '{task}', but must be one of {', '.join(TASKS)}{hint}")


@dataclass(frozen=True)
class RunConfig(RunControl):
    """One run: its task, manifest and output, and every option.

    A field made by `option` is one option of a run; the comment above it says what the help cannot. Options
    that are None by default and have another value in every run are filled from the preset or the task. Those
    that change no row, beyond rounding, are inherited.

    Raises:
        OptionError: A value breaks a rule.
    """

    manifest: str
    """A local path or `s3://bucket/key`: a file, a folder or a glob. Empty for a Dataset."""
    output: str
    """The folder of the results, local or on S3. Empty where nothing is written."""
    task: str = "generate"
    """One of `model.config.TASKS`."""

    model: str = option("tiny", "run.model", place("PATH"), "Checkpoint folder, local or s3://.")
    samples: int = option(
        None, "run.samples", whole(1, MAX_SAMPLES), "Results per manifest row (default 1).", meaning=True
    )
    # A row's own seed is made from it and from the row's id, version and sample number.
    seed: int = option(0, "run.seed", whole(0, INT64_MAX), "Same seed, same results.", meaning=True)
    cfg: float = option(
        None,
        "sampling.cfg",
        _SCALE,
        "Guidance scale; 1 or less turns guidance off (default 3; understand: 1).",
        meaning=True,
        stored="sampling.cfg",
    )
    temperature: float = option(
        None,
        "sampling.temperature",
        _SCALE,
        "Sampling temperature; 0 is greedy (default 1).",
        meaning=True,
        stored="sampling.temperature",
    )
    top_k: int = option(
        None,
        "sampling.top_k",
        whole(0, note=" (0 keeps all tokens)"),
        "Sample from the N most likely tokens; 0 keeps all (default 1000; understand: 1).",
        meaning=True,
        stored="sampling.top_k",
    )
    top_p: float = option(
        None,
        "sampling.top_p",
        number("above 0 and at most 1 (1 keeps all tokens)", lambda share: 0 < share <= 1, "P"),
        "Sample from the most likely tokens of total probability P; 1 keeps all (default 1).",
        meaning=True,
        stored="sampling.top_p",
    )
    preset: str | None = option(
        None,
        "run.preset",
        choice(*PRESETS),
        "Options of a published evaluation; options given beside it win.",
    )
    width: int | None = option(
        None,
        "image.width",
        _SIDE,
        "Width of rows that set none; needs --height.",
        tasks=("generate",),
        meaning=True,
    )
    height: int | None = option(
        None,
        "image.height",
        _SIDE,
        "Height of rows that set none (default: the model's size nearest to square).",
        tasks=("generate",),
        meaning=True,
    )
    language: str | None = option(
        None,
        "prompt.language",
        choice(*LANGUAGES),
        "Language of the template (default: detected per prompt).",
        meaning=True,
    )
    template_en: str | None = option(
        None,
        "prompt.template_en",
        text("TEXT"),
        "English prompt template, with {prompt} and perhaps {target_w} and {target_h}.",
        tasks=DRAWING_TASKS,
        meaning=True,
        stored="templates.en",
    )
    template_zh: str | None = option(
        None,
        "prompt.template_zh",
        text("TEXT"),
        "Chinese prompt template, with the same placeholders.",
        tasks=DRAWING_TASKS,
        meaning=True,
        stored="templates.zh",
    )
    image_format: str = option(
        "png",
        "image.format",
        choice("png", "webp", "jpeg"),
        "File format of the results; png and webp are lossless.",
        tasks=DRAWING_TASKS,
        meaning=True,
    )
    image_quality: int | None = option(
        None,
        "image.quality",
        whole(1, 100, "1-100"),
        "Quality of jpeg (default 95); makes webp lossy.",
        tasks=DRAWING_TASKS,
        meaning=True,
    )
    png_compression: str | None = option(
        None,
        "image.png_compression",
        choice("fast", "small"),
        "How png is compressed; small takes 4 times as long for 3 % fewer bytes (default fast; outputs begun "
        "with small keep it).",
        tasks=DRAWING_TASKS,
        meaning=True,
        later=True,
        before="small",
        at_start=lambda run: "fast" if run.image_format == "png" else None,
    )
    save_tokens: bool = option(
        False, "image.save_tokens", SWITCH, "Also write the token ids of each result.", meaning=True
    )
    max_prompt_tokens: int = option(
        1024,
        "prompt.max_tokens",
        whole(1),
        "Longer prompts become error rows; none is truncated.",
        meaning=True,
    )
    prompt: str | None = option(
        None,
        "prompt.text",
        text("TEXT"),
        "Instruction or question for rows that have none.",
        tasks=PICTURE_TASKS,
        meaning=True,
    )
    prompt_column: str | None = option(
        None,
        "prompt.column",
        text("NAME"),
        "Manifest column with the prompts (default prompt).",
        meaning=True,
    )
    image_column: str | None = option(
        None,
        "source.image_column",
        text("NAME"),
        "Manifest column with the images (default image).",
        tasks=PICTURE_TASKS,
        meaning=True,
        later=True,
    )
    id_column: str | None = option(
        None,
        "run.id_column",
        text("NAME"),
        "Manifest column with the ids (default id).",
        meaning=True,
        later=True,
    )
    image_root: str | None = option(
        None,
        "source.root",
        place("PATH"),
        "Base folder of relative image paths (default: the manifest's folder).",
        tasks=PICTURE_TASKS,
    )
    allow_https: bool = option(
        False, "source.allow_https", SWITCH, "Allow https:// sources.", tasks=PICTURE_TASKS, meaning=True
    )
    max_source_bytes: int = option(
        128 << 20,
        "source.max_bytes",
        whole(1),
        "Larger source files become error rows.",
        tasks=PICTURE_TASKS,
        meaning=True,
    )
    max_source_pixels: int = option(
        1 << 26,
        "source.max_pixels",
        whole(1),
        "Source images with more pixels become error rows.",
        tasks=PICTURE_TASKS,
        meaning=True,
    )
    restore_size: bool = option(
        False,
        "image.restore_size",
        SWITCH,
        "Resize each result to the size of its source.",
        tasks=("edit",),
        meaning=True,
    )
    max_new_tokens: int = option(
        None,
        "prompt.max_new_tokens",
        whole(1),
        "Maximum tokens of an answer (default 256).",
        tasks=("understand",),
        meaning=True,
    )
    # It changes rows, and is part of the digest as words of `mode`.
    cfg_interval: tuple[float, float] = option(
        ALL_STEPS,
        "sampling.cfg_interval",
        INTERVAL,
        "Lossy: guide only this share of an image's steps; faster if END is below 1.",
        tasks=DRAWING_TASKS,
    )
    # DPG-Bench's prompts stand in quotes, or not, as their writers left them.
    strip_quotes: bool | None = option(
        None,
        "prompt.strip_quotes",
        SWITCH,
        "Remove quotes that enclose a whole prompt (preset dpg does).",
        meaning=True,
        later=True,
        before=False,
    )
    # Pictures are scaled to whole tokens of 28x28 pixels, with about as many pixels as these allow.
    min_pixels: int | None = option(
        None,
        "source.vision_min_pixels",
        _SEEN,
        "Enlarge smaller images for the vision tower (default: as the checkpoint was trained).",
        tasks=("understand",),
        meaning=True,
        later=True,
    )
    max_pixels: int | None = option(
        None,
        "source.vision_max_pixels",
        _SEEN,
        "Reduce larger images for the vision tower (default: as the checkpoint was trained).",
        tasks=("understand",),
        meaning=True,
        later=True,
    )
    embed_metadata: bool = option(
        False,
        "image.embed_metadata",
        SWITCH,
        "Write prompt, seed, model digest and IPTC's digital source type into each image as XMP.",
        tasks=DRAWING_TASKS,
        meaning=True,
        later=True,
    )

    def __post_init__(self) -> None:
        check_task(self.task)
        for name in ("manifest", "output"):
            try:
                check_place(getattr(self, name))
            except ValueError as error:
                raise OptionError(f"{name} {error}") from None
        for one in OPTIONS.values():
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                object.__setattr__(self, one.name, one.read(value))
            # A configuration that is copied has what `_fill` put into it.
            left_out = (one.default, MAX_NEW_TOKENS if one.name == "max_new_tokens" else None)
            if getattr(self, one.name) not in left_out and not one.serves(self.task):
                raise OptionError(
                    f"{one.name} is for {' and '.join(one.tasks)}, but this is {self.task}: leave it out."
                )
        self._fill()
        self._check()

    def _fill(self) -> None:
        """Sets what was left to the preset, the task or the model's defaults."""
        from wallaroo.model.sampling import Sampling

        sampling, samples, others = Preset(self.task, SAMPLING[self.task])[1:]
        if self.preset is not None:
            task, sampling, samples, others = PRESETS[self.preset]
            if task != self.task:
                raise OptionError(
                    f"preset '{self.preset}' is for {task}, but this is {self.task}: leave it out."
                )
        values = {**dataclasses.asdict(Sampling(**sampling)), "samples": samples}
        values["max_new_tokens"] = MAX_NEW_TOKENS
        for name, value in {**values, **others}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _check(self) -> None:
        """Checks the rules that bind several options, and those of templates."""
        from wallaroo.model.prompts import check_template

        if (self.width is None) != (self.height is None):
            given, absent = ("width", "height") if self.height is None else ("height", "width")
            value = getattr(self, given)
            raise OptionError(f"{given} is {value}, but {absent} is missing: give both, or neither.")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and side % VQ_FACTOR:
                raise OptionError(f"{name} is {side}, but must be a positive multiple of {VQ_FACTOR} pixels.")
        if self.image_quality is not None and self.image_format == "png":
            raise OptionError(
                f"image_quality is {self.image_quality}, but png has none: "
                f"choose webp or jpeg, or leave it out."
            )
        if self.png_compression is not None and self.image_format != "png":
            raise OptionError(
                f"png_compression is {self.png_compression}, but image_format is {self.image_format}: "
                f"choose png, or leave it out."
            )
        if self.incremental and (self.limit is not None or self.where is not None):
            given = "limit" if self.limit is not None else "where"
            raise OptionError(f"{given} selects rows, but incremental plans all new ones: leave one out.")
        if self.task == "understand" and self.cfg > 1:
            raise OptionError(f"cfg is {self.cfg:g}, but answers have no guidance: give at most 1.")
        self._check_pixels()
        for language, template in self.templates.items():
            try:
                check_template(template)
            except InputError as error:
                raise OptionError(f"template_{language}: {error}") from None

    def _check_pixels(self) -> None:
        """Checks the limits of pixels that are given; those of the checkpoint are not known here."""
        from wallaroo.model.images import most_tokens
        from wallaroo.model.prompts import TEMPLATE_TOKENS

        if self.max_pixels is None:
            return
        least = self.min_pixels or TOKEN_PIXELS
        if least > self.max_pixels:
            raise OptionError(
                f"min_pixels is {least}, but max_pixels is {self.max_pixels}: give at most that, or a larger "
                f"max_pixels."
            )
        picture = most_tokens(least, self.max_pixels)
        others = self.max_prompt_tokens + TEMPLATE_TOKENS + self.max_new_tokens
        if picture + others > CONTEXT_TOKENS:
            raise OptionError(
                f"max_pixels is {self.max_pixels}, so an image may take {picture:,} tokens, but the context "
                f"of {CONTEXT_TOKENS:,} has {CONTEXT_TOKENS - others:,} left beside prompt and answer: "
                f"lower max_pixels, max_prompt_tokens or max_new_tokens."
            )

    @property
    def sampling(self) -> "Sampling":
        """Guidance, temperature and filters of rows that set none."""
        from wallaroo.model.sampling import Sampling

        return Sampling(self.cfg, self.temperature, self.top_k, self.top_p)

    @property
    def templates(self) -> dict[str, str]:
        """Language -> prompt template, of those that replace the built-in one."""
        given = {language: getattr(self, f"template_{language}") for language in LANGUAGES}
        return {language: template for language, template in given.items() if template is not None}

    @property
    def mode(self) -> str:
        """The lossy shortcuts of the run, in words such as `cfg-interval 0.0:0.5`; `exact` without any."""
        first, last = self.cfg_interval
        return EXACT if self.cfg_interval == ALL_STEPS else f"cfg-interval {first}:{last}"

    def config_digest_fields(self, model_digest: str) -> dict[str, Any]:
        """Plain JSON values of all that may change a row's meaning; their digest guards an output.

        Args:
            model_digest: Stands for the checkpoint and its table of sizes, wherever it lies.

        Returns:
            The task, the options of the task that are declared with `meaning`, and `mode` if it is lossy.
        """
        meaning = (
            one.name
            for one in OPTIONS.values()
            if one.meaning
            and one.serves(self.task)
            and not (one.later and getattr(self, one.name) in (None, False))
        )
        lossy = {"mode": self.mode} if self.mode != EXACT else {}
        return {"model_digest": model_digest, "task": self.task, **self._stored(meaning), **lossy}

    def to_dict(self) -> dict[str, Any]:
        """Manifest, output, task and every option as plain JSON values."""
        names = sorted(OPTIONS, key=lambda name: OPTIONS[name].later)
        # The order of keys in every run.json so far.
        names.insert(names.index("width"), names.pop(names.index("prompt")))
        names.insert(names.index("width"), names.pop(names.index("prompt_column")))
        given = {"manifest": self.manifest, "output": self.output, "task": self.task}
        return given | self._stored(names)

    def _stored(self, names: Iterable[str]) -> dict[str, Any]:
        """The options of these names as `run.json` holds them."""
        values: dict[str, Any] = {}
        for name in names:
            value = getattr(self, name)
            outer, _, inner = OPTIONS[name].stored.partition(".")
            if not inner:
                values[outer] = list(value) if isinstance(value, tuple) else value
            elif value is None:
                values.setdefault(outer, {})
            else:
                values.setdefault(outer, {})[inner] = value
        return values


OPTIONS = options_of(RunConfig)
OPTIONS |= {name: OPTIONS.pop(name) for name in options_of(RunControl)}
"""Name -> option of a run."""

REMOVED = {"run.weights": "asks for 8-bit weights, which only version 0.1.0 had: leave it out."}
"""Key of an option that existed once -> the rest of the sentence that refuses it."""
