"""The state of a training: what learns and its optimizers, whole or absent, for any number of processes.

    FOLDER/state/step-00000200/recipe.json    settings of the recipe that must not change
    FOLDER/state/step-00000200/*.distcp       of torch.distributed.checkpoint, each process writes its part
    FOLDER/state/step-00000200/.metadata      written last: without it the state is ignored

Knows nothing of object stores: the caller gives `Files`.
"""

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from wallaroo.model.errors import InputError
from wallaroo.model.training.process import Process
from wallaroo.model.training.recipe import Recipe

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemBase

STATES = "state"
WHOLE = ".metadata"
RECIPE = "recipe.json"
_STATE_NAME = re.compile(r"step-(\d{8,})")
MAX_STATES = 2
"""States that are kept: the last one may be of a model that has just diverged."""

FREE = (
    *("folder", "base", "start", "data", "steps", "threads", "workers", "accumulate", "checkpointing"),
    *(
        "log_every",
        "save_every",
        "sample_every",
        "sample_prompts",
        "held_out",
        "validate_every",
        "validate_steps",
    ),
)
"""What a recipe may change between the start of a stage and its resume."""


class Files(Protocol):
    """A file system for states.

    Attributes:
        folder: Of all states of a stage; all paths begin with it.
        on_disk: Whether written files must be synced to the disk.
    """

    folder: str
    on_disk: bool

    def system(self) -> "FileSystemBase":
        """The same for torch.distributed.checkpoint."""

    def read(self, path: str) -> bytes | None:
        """Reads a file; None if it is absent."""

    def write(self, path: str, data: bytes) -> None:
        """Writes a small file, and makes the folders above it.

        Args:
            path: Of the file.
            data: Its bytes.
        """

    def whole(self) -> list[str]:
        """Lists the names of the folders in `folder` that hold a file WHOLE."""

    def folders(self) -> list[str]:
        """Lists the names of all folders in `folder`, none if that is absent."""

    def remove(self, path: str) -> None:
        """Removes a folder with its files, WHOLE first."""


class LocalFiles:
    """States on a disk, see `Files`.

    Args:
        folder: Of all states of a stage.
    """

    on_disk = True

    def __init__(self, folder: str):
        self.folder = folder

    def system(self) -> "FileSystemBase":
        """The file system for torch.distributed.checkpoint."""
        from torch.distributed.checkpoint.filesystem import FileSystem

        return FileSystem()

    def read(self, path: str) -> bytes | None:
        """The bytes of a file; None if there is none."""
        return Path(path).read_bytes() if Path(path).is_file() else None

    def write(self, path: str, data: bytes) -> None:
        """Writes a file, and makes the folders above it.

        Args:
            path: Of the file.
            data: Its bytes.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)

    def whole(self) -> list[str]:
        """Names of the folders that hold a file WHOLE."""
        return [path.parent.name for path in Path(self.folder).glob(f"*/{WHOLE}")]

    def folders(self) -> list[str]:
        """Names of all folders."""
        return [path.name for path in Path(self.folder).glob("*/")]

    def remove(self, path: str) -> None:
        """Removes a folder with its files, WHOLE first."""
        (Path(path) / WHOLE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


class StateLearner(Protocol):
    """The part of `loop.Learner` that a state needs."""

    def extra_state(self) -> dict[str, Tensor]:
        """What a state holds beside the model and its optimizers."""
        ...

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `extra_state` gave."""
        ...


class States:
    """The states of a stage, as one of its processes.

    Args:
        recipe: The stage.
        process: One of those that share it.
        files: Of states, by default on the disk of the recipe's folder.
    """

    def __init__(self, recipe: Recipe, process: Process, files: Files | None = None):
        self.recipe, self.process = recipe, process
        self.files = files or LocalFiles(f"{recipe.folder}/{STATES}")
        self.folder = self.files.folder
        self._pending: Any = None
        # Written while the next steps are made, whose own collectives must not meet these.
        self._group = torch.distributed.new_group(backend="gloo") if process.grouped else None

    def steps(self) -> list[int]:
        """Lists the steps of whole states, the last one first."""
        matches = map(_STATE_NAME.fullmatch, self.files.whole())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def load(
        self,
        kept: Mapping[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        learner: StateLearner,
    ) -> int:
        """Loads the last whole state.

        Args:
            kept: Name -> parameter, which is written.
            optimizers: Of these; their moments are written.
            learner: Gets its extra state.

        Returns:
            The step of the state; 0 if there is none.

        Raises:
            InputError: The processes find different states, or the state is of another recipe.
        """
        step = next(iter(self.steps()), 0)
        if self.process.total({"step": step}) != {"step": step * self.process.world}:
            raise InputError(
                f"The processes do not find the same {self.folder}: give a folder on a disk that all of them "
                f"share, or on S3."
            )
        state = self._state(kept, optimizers)
        if step == 0:
            return 0
        path = self._path(step)
        self._check_recipe(path)
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        reader: Any = FileSystemReader(path)
        reader.fs = self.files.system()
        reader.path = reader.fs.init_path(path)
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        extra = {
            name.removeprefix("extra."): torch.empty(one.size, dtype=one.properties.dtype)
            for name, one in stored.items()
            if name.startswith("extra.")
        }
        alone = not self.process.grouped
        _say_nothing_of_one_process()
        load({**state, "extra": extra}, storage_reader=reader, process_group=self._group, no_dist=alone)
        learner.load_extra_state(extra)
        return step

    def save(
        self,
        step: int,
        kept: Mapping[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        learner: StateLearner,
    ) -> None:
        """Starts to write a state, which goes on in the background.

        Args:
            step: Number of steps done.
            kept: Name -> parameter.
            optimizers: Of these.
            learner: Gives its extra state.

        Raises:
            InputError: The state before cannot be written.
        """
        from torch.distributed.checkpoint import async_save
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        self.finish()
        _say_nothing_of_one_process()
        path = self._path(step)
        if self.process.rank == 0:
            self.files.write(f"{path}/{RECIPE}", json.dumps(_fixed(self.recipe), indent=1).encode())
        writer: Any = FileSystemWriter(path, sync_files=self.files.on_disk)
        writer.fs = self.files.system()
        writer.path = writer.fs.init_path(path)
        self._pending = async_save(
            {**self._state(kept, optimizers), "extra": learner.extra_state()},
            storage_writer=writer,
            process_group=self._group,
            no_dist=not self.process.grouped,
        )

    def finish(self) -> None:
        """Waits for the state that is being written, then removes states before the last MAX_STATES.

        Raises:
            InputError: The state cannot be written.
        """
        if self._pending is None:
            return
        from torch.distributed.checkpoint.api import CheckpointException

        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (Exception, CheckpointException) as error:  # the first cause is what the disk said
            reason = next((str(one) for one in _chain(error) if isinstance(one, OSError)), str(error))
            last = reason.strip().splitlines()[-1]
            raise InputError(
                f"The state cannot be written to {self.folder} ({last:.200}); make room, or fix the rights."
            ) from error
        if self.process.rank == 0:
            kept = {self._path(step) for step in self.steps()[:MAX_STATES]}
            for name in self.files.folders():
                # Folders of other names are not ours.
                if _STATE_NAME.fullmatch(name) and f"{self.folder}/{name}" not in kept:
                    self.files.remove(f"{self.folder}/{name}")

    def _path(self, step: int) -> str:
        return f"{self.folder}/step-{step:08}"

    def _check_recipe(self, path: str) -> None:
        was = json.loads(self.files.read(f"{path}/{RECIPE}") or b"{}")
        for name, value in _fixed(self.recipe).items():
            if was.get(name, value) != value:
                raise InputError(
                    f"The state {path} is of a recipe with {name} = {was[name]!r:.100}, not {value!r:.100}; "
                    f"give the old value, or a new folder."
                )

    def _state(
        self, kept: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
    ) -> dict[str, Any]:
        """Tensors of parameters and optimizers by name; loading writes into them."""
        names = {parameter: name for name, parameter in kept.items()}
        moments = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    _begin(optimizer, parameter)
                    moments[names[parameter]] = dict(optimizer.state[parameter])
        return {"model": {name: one.detach() for name, one in kept.items()}, "optimizer": moments}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, its causes, and errors of other processes."""
    yield error
    for more in (error.__cause__, error.__context__, *getattr(error, "failures", {}).values()):
        inner = more[0] if isinstance(more, tuple) else more
        if isinstance(inner, BaseException) and inner is not error:
            yield from _chain(inner)


def _say_nothing_of_one_process() -> None:
    """Ignores torch's warning about a process without a group, which its writing threads raise."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _begin(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Makes the moments of a parameter without a gradient so far, as its optimizer would."""
    state = optimizer.state[parameter]
    if state:
        return
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.zeros((), device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    else:
        state["mean"] = torch.zeros_like(parameter)


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """Settings that must not change between start and resume, as JSON gives them back."""
    values = {name: one for name, one in dataclasses.asdict(recipe).items() if name not in FREE}
    made: dict[str, Any] = json.loads(json.dumps(values))
    return made
