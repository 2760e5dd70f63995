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
from wallaroo.workflows.outputs.schema import CARRIED_PREFIX
from wallaroo.workflows.plans.layout import shard_rows
from wallaroo.workflows.plans.values import size_of
from wallaroo.workflows.settings import OPTIONS, OptionError, RunConfig


@dataclass(frozen=True)
class PlanSettings:
    """The options of a run that decide what its planned rows are, and which manifest rows it plans.

    Each field has the values, rule and default of the same field of `settings.RunConfig`. A plan depends on
    no other option.
    """

    task: str
    """One of `model.config.TASKS`."""
    seed: int
    """Seed of the run, from which the seeds of rows are derived."""
    samples: int
    """Samples of a row that does not say how many."""
    sampling: Sampling
    """Sampling of a row that does not give its own."""
    width: int | None
    """Width in pixels of a row without a size; None for the checkpoint's square."""
    height: int | None
    """Height in pixels of a row without a size; None for the checkpoint's square."""
    language: str | None
    """Language of a row that names none; None to detect it."""
    max_prompt_tokens: int
    """Most tokens of a prompt."""
    prompt: str | None
    """Prompt of all rows with a picture and without a prompt of their own."""
    prompt_column: str | None
    """Column of prompts; None to find it by the layout of the manifest."""
    image_column: str | None
    """Column of pictures; None to find it by the layout."""
    id_column: str | None
    """Column of ids; None to find it by the layout."""
    image_root: str | None
    """Folder where relative paths of pictures start; None for that of the manifest file."""
    allow_https: bool
    """Whether pictures may come from https:// addresses."""
    restore_size: bool
    """Whether a result gets the size of its source."""
    min_pixels: int | None
    """Fewest pixels of a picture to understand; None for the checkpoint's limit."""
    max_pixels: int | None
    """Most pixels of a picture to understand; None for the checkpoint's limit."""
    limit: int | None
    """Most manifest rows to plan; None for all."""
    where: str | None
    """SQL condition for the manifest rows to plan; None for all."""
    incremental: bool
    """Whether to plan only rows that are new or changed since the last run."""
    strip_quotes: bool | None
    """Whether to remove quotes around a whole prompt."""

    @classmethod
    def of(cls, config: RunConfig) -> "PlanSettings":
        """Takes the options that a plan depends on from those of a run."""
        return cls(**{one.name: getattr(config, one.name) for one in dataclasses.fields(cls)})

    def check(self, config: ModelConfig) -> None:
        """Checks the settings against a checkpoint.

        Args:
            config: Configuration of the checkpoint.

        Raises:
            OptionError: The checkpoint lacks the size, or the limits of pixels do not fit its own.
        """
        try:
            size_of(self.width, self.height, None, config)
            self.model(config)
        except (RowError, InputError) as error:
            raise OptionError(str(error)) from None

    def model(self, config: ModelConfig) -> ModelConfig:
        """Applies the limits of pixels of the run to a checkpoint's configuration."""
        return config.with_pixels(self.min_pixels, self.max_pixels)

    def shard_rows(self, rows: int, config: ModelConfig) -> int:
        """Chooses the rows of a shard, as `plans.layout.shard_rows`.

        Args:
            rows: Planned rows of the round.
            config: Configuration of the checkpoint.

        Returns:
            Rows of a shard.
        """
        return shard_rows(rows, self.model(config), self.task, self.restore_size)

    def meaning(self) -> dict[str, Any]:
        """The values that decide what a planned row is. All parts of a plan share them."""
        values = dataclasses.asdict(self)
        # A newer option counts only if it is given, so that older plans keep their meaning.
        later = [name for name in values if name in OPTIONS and OPTIONS[name].later and not values[name]]
        left_out = ("limit", "where", "incremental", *later)
        return {name: value for name, value in values.items() if name not in left_out}


def column_names(schema: pa.Schema, settings: PlanSettings) -> dict[str, str]:
    """Maps each column that the task reads to its name in the manifest.

    Args:
        schema: Schema of the manifest.
        settings: Settings of the run.

    Returns:
        Name of the parameter -> name of the column, which the manifest may lack.
    """
    names = {name: name for name in KNOWN_COLUMNS[settings.task]}
    names["prompt"] = prompt_column(schema, settings)
    names["id"] = layouts.id_column(schema.names, settings.id_column)
    if "image" in names:
        names["image"] = layouts.picture_column(schema.names, settings.image_column)
    return names


def prompt_column(schema: pa.Schema, settings: PlanSettings) -> str:
    """Finds the name of the column of prompts.

    In an output of a run, a column that the settings name may be called `in_<name>`.

    Args:
        schema: Schema of the manifest.
        settings: Settings of the run.

    Returns:
        Name of the column, which the manifest may lack.
    """
    own = layouts.prompt_column(schema.names, settings.task, settings.prompt)
    name = settings.prompt_column or own
    inner = CARRIED_PREFIX + name
    return inner if settings.prompt_column and name not in schema.names and inner in schema.names else name
