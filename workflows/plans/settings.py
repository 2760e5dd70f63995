"""What a plan needs to know of a run."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wallaroo.model.config import ModelConfig
from wallaroo.model.errors import InputError, RowError
from wallaroo.model.sampling import Sampling
from wallaroo.workflows.manifests import layouts
from wallaroo.workflows.manifests.types import KNOWN_COLUMNS
from wallaroo.workflows.plans.layout import shard_rows
from wallaroo.workflows.plans.values import size_of
from wallaroo.workflows.settings import OPTIONS, OptionError, RunConfig


@dataclass(frozen=True)
class PlanSettings:
    """The options of a run that decide what its planned rows are, and which manifest rows it plans.

    Values, rules and defaults are those of `settings.RunConfig`; a plan depends on no other option.
    """

    task: str
    seed: int
    samples: int
    sampling: Sampling
    width: int | None
    height: int | None
    language: str | None
    max_prompt_tokens: int
    prompt: str | None
    prompt_column: str | None
    image_column: str | None
    id_column: str | None
    image_root: str | None
    allow_https: bool
    restore_size: bool
    min_pixels: int | None
    max_pixels: int | None
    limit: int | None
    where: str | None
    incremental: bool
    strip_quotes: bool | None

    @classmethod
    def of(cls, config: RunConfig) -> "PlanSettings":
        """Those of a run."""
        return cls(**{one.name: getattr(config, one.name) for one in dataclasses.fields(cls)})

    def check(self, config: ModelConfig) -> None:
        """Raises OptionError if the checkpoint has no such size, or its limits of pixels do not go with those
        that are given."""
        try:
            size_of(self.width, self.height, None, config)
            self.model(config)
        except (RowError, InputError) as error:
            raise OptionError(str(error)) from None

    def model(self, config: ModelConfig) -> ModelConfig:
        """The checkpoint's configuration with the limits of pixels that are given."""
        return config.with_pixels(self.min_pixels, self.max_pixels)

    def shard_rows(self, rows: int, config: ModelConfig) -> int:
        """Rows of a shard in a round of so many rows, by the checkpoint's configuration."""
        return shard_rows(rows, self.model(config), self.task, self.restore_size)

    def meaning(self) -> dict[str, Any]:
        """The values that decide what a planned row is, so that all parts of a plan must share them."""
        values = dataclasses.asdict(self)
        # What was added later counts only where it is given, so that older plans keep their meaning.
        later = [name for name in values if name in OPTIONS and OPTIONS[name].later and not values[name]]
        left_out = ("limit", "where", "incremental", *later)
        return {name: value for name, value in values.items() if name not in left_out}


def column_names(schema: pa.Schema, settings: PlanSettings) -> dict[str, str]:
    """Each column that means something to the task, and what it is called in the manifest."""
    names = {name: name for name in KNOWN_COLUMNS[settings.task]}
    names["prompt"] = prompt_column(schema, settings)
    names["id"] = layouts.id_column(schema.names, settings.id_column)
    if "image" in names:
        names["image"] = layouts.picture_column(schema.names, settings.image_column)
    return names


def prompt_column(schema: pa.Schema, settings: PlanSettings) -> str:
    """The column that prompts stand in. One of a run's output may be called as it is there."""
    own = layouts.prompt_column(schema.names, settings.task, settings.prompt)
    name = settings.prompt_column or own
    inner = f"in_{name}"
    return inner if settings.prompt_column and name not in schema.names and inner in schema.names else name
