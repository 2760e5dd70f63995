"""What a plan needs to know of a run."""

from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import RowError
from wallaroo.model.prompts import LANGUAGES
from wallaroo.model.sampling import Sampling
from wallaroo.workflows.manifests.types import KNOWN_COLUMNS
from wallaroo.workflows.plans.values import MAX_SAMPLES, SEEDS, size_of
from wallaroo.workflows.settings import OptionError


@dataclass(frozen=True)
class PlanSettings:
    """What the run decides for rows that do not say, and which rows it looks at.

    seed: of the run. width, height: pixels; both, or neither for the size whose ratio is nearest to 1.
    language: None to detect it row by row. prompt: of rows that do not say; prompt_column: the column
    with the prompts, if not `prompt`. image_root: where relative paths of pictures start, if not in the
    folder of the file that names them; allow_https: whether they may be on the web.
    restore_size: whether edited pictures get the sizes of their sources. limit, where: plan at most so many
    manifest rows, and only those for which an SQL expression over the manifest's columns holds; the others
    may follow later. incremental: the manifest grows, and what is new in it is planned.
    """

    task: str = "generate"
    seed: int = 0
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    width: int | None = None
    height: int | None = None
    language: str | None = None
    max_prompt_tokens: int = 1024
    prompt: str | None = None
    prompt_column: str | None = None
    image_root: str | None = None
    allow_https: bool = False
    restore_size: bool = False
    limit: int | None = None
    where: str | None = None
    incremental: bool = False

    def check(self, config: ModelConfig) -> None:
        """Raises OptionError if a value breaks a rule, or the checkpoint has no such size."""
        if self.task not in KNOWN_COLUMNS:
            raise OptionError(
                f"task is '{self.task}', but only {', '.join(KNOWN_COLUMNS)} can be planned: choose that."
            )
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise OptionError(f"samples is {self.samples}, but must be from 1 to {MAX_SAMPLES}.")
        if not 0 <= self.seed < SEEDS:
            raise OptionError(f"seed is {self.seed}, but must be from 0 to 2^63 - 1.")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"limit is {self.limit}, but must be at least 1.")
        if self.language not in (None, *LANGUAGES):
            raise OptionError(f"language is '{self.language}', but must be one of {', '.join(LANGUAGES)}.")
        try:
            self.sampling.validate()
            size_of(self.width, self.height, None, config)
        except RowError as error:
            raise OptionError(str(error)) from None

    def meaning(self) -> dict[str, Any]:
        """The values that decide what a planned row is, so that all parts of a plan must share them."""
        values = asdict(self)
        return {
            name: value for name, value in values.items() if name not in ("limit", "where", "incremental")
        }


def prompt_column(schema: pa.Schema, settings: PlanSettings) -> str:
    """The column that prompts stand in. One of a run's output may be called as it is there."""
    name = settings.prompt_column or "prompt"
    inner = f"in_{name}"
    return inner if settings.prompt_column and name not in schema.names and inner in schema.names else name
