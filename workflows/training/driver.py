"""Training on Ray: the loop of `model.training` in the workers of Ray Train.

Each worker takes the rows of its share by their place in the step, so that a step has the same rows for any
number of workers. Knows nothing of losses and steps.
"""

import dataclasses
import functools
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow.parquet as pq

from wallaroo.model.checkpoint import FILE_LIST
from wallaroo.model.errors import InputError
from wallaroo.model.training.folder import STAGE_FILE, check_names, claim, is_mark, mark
from wallaroo.model.training.log import METRICS, progress
from wallaroo.model.training.lora import ABOUT, LORA
from wallaroo.model.training.process import Process, process_of_group
from wallaroo.model.training.recipe import Recipe
from wallaroo.model.training.result import RESULT, check_result, result
from wallaroo.model.training.sharding import halves
from wallaroo.model.training.sizing import Sizes, device_bytes
from wallaroo.model.training.stage import choose, run_stage
from wallaroo.model.training.start import check_start
from wallaroo.model.training.state import STATES
from wallaroo.workflows import storage
from wallaroo.workflows.cluster import check_gpus, choose_device, connected
from wallaroo.workflows.outputs.lock import OutputLock
from wallaroo.workflows.settings import OPTIONS
from wallaroo.workflows.stopping import Stop
from wallaroo.workflows.storage.checkpoints import fetch_folder
from wallaroo.workflows.storage.paths import absolute_path
from wallaroo.workflows.training.rows import find, fitting, needed, read
from wallaroo.workflows.training.stream import Groups, Streamed

MAX_FAILURES = 3
"""Times that lost workers are replaced, before the training fails."""

STOP = "stop"
"""File in a stage's folder that asks the workers to save their state and end."""

JOIN_SECONDS = 0.2
POLL_SECONDS = 0.5
S3_POLL_SECONDS = 3.0


def train(
    recipe: Recipe,
    workers: int = 1,
    device: str = "auto",
    address: str | None = None,
    say: Callable[[str], None] = print,
    shard: str = "auto",
    stop: Stop | None = None,
    overwrite: bool = False,
    start_timeout: float = OPTIONS["ray_start_timeout"].default,
) -> str:
    """Runs one stage on Ray, from its last state if it has one.

    Args:
        recipe: The stage. Its folder, base, start and data may be on S3.
        workers: Processes that share each step, each with a GPU or a CPU.
        device: `cpu`, `cuda`, or `auto`: `cuda` if Ray has GPUs.
        address: Of a running Ray cluster; None starts a local one. Unless the recipe's folder is on S3, the
            nodes of the cluster share its disk.
        say: Gets each line of progress.
        shard: `none` (each worker holds the whole model), `full` (each holds a shard), or `auto`.
        stop: When to save the state and end; by default never, so that Ctrl-C loses the steps since the last
            state.
        overwrite: Whether the recipe's folder may hold files of others.
        start_timeout: Seconds after which a local Ray is not started once more.

    Returns:
        The checkpoint folder, or with `lora` the folder of the updates.

    Raises:
        RunStopped: `stop` asked for the end.
        InputError: The recipe cannot be followed, or its folder holds files of others.
        RunInProgress: Another training is active in the folder.
    """
    recipe = absolute(recipe)
    files = check(recipe, workers)
    if (done := finished(recipe)) is not None:
        say(f"{done} exists already, so there is nothing to do")
        return done
    _claim(recipe, overwrite)
    with (
        OutputLock(recipe.folder, "train"),
        connected(address, workers, start_timeout),
        _followed(recipe, say),
    ):
        # What a killed driver has left would stop the workers at once.
        _remove_note(storage.join(recipe.folder, STOP))
        device = choose_device(device)
        if device == "cuda":
            import ray

            check_gpus(address, workers, int(ray.cluster_resources().get("GPU", 0)), "worker")
        data: Mapping[str, Any] = {
            task: Groups.of(paths) if recipe.stream else read(task, paths, recipe)
            for task, paths in files.items()
        }
        held_out = {task: read(task, paths, recipe) for task, paths in find(recipe.held_out, recipe).items()}
        for task, rows in data.items():
            if not (rows.rows if recipe.stream else len(rows)):
                path = recipe.data[task]
                raise InputError(f"{path} has no row of {task}, or all are too long or small for the stage.")
        spread = _choose(recipe, workers, device, shard, say)
        given = {"recipe": recipe, "data": data, "held_out": held_out, "shard": spread}
        _fit(given, workers, device, stop or Stop(0.0))
    done = finished(recipe)
    if done is None:
        raise InputError(
            f"The workers wrote no checkpoint into {recipe.folder} of this machine: give a folder on S3, or "
            f"on a disk that all nodes of the cluster share."
        )
    return done


def _claim(recipe: Recipe, overwrite: bool) -> None:
    """Makes the recipe's folder that of a stage, see `model.training.folder`."""
    if not storage.is_s3(recipe.folder):
        check_result(recipe)
        claim(recipe.folder, overwrite)
        return
    path = storage.join(recipe.folder, STAGE_FILE)
    try:
        found = storage.read_bytes(path)
    except FileNotFoundError:
        found = None
    if is_mark(found):
        return
    if not overwrite:
        check_names(recipe.folder, [file.relative for file in storage.list_files(recipe.folder)])
    storage.write_atomic(path, mark())


def _remove_note(note: str) -> None:
    """Removes the wish to stop, which is an empty file; any other of its name stays."""
    found = storage.info(note)
    if found is not None and not found.size:
        storage.delete(note)


PLANNED_WORKERS = (1, 8, 16, 64)
"""Numbers of workers that `plan` computes."""


def plan(recipe: Recipe, workers: int, shard: str = "auto", gigabytes: float = 80.0) -> list[str]:
    """Counts the rows and computes the memory of a stage on GPUs; reads footers of data and no weights.

    Args:
        recipe: The stage.
        workers: A number of workers to compute, in addition to PLANNED_WORKERS.
        shard: `none`, `full` or `auto`.
        gigabytes: Memory of a GPU in GB.

    Returns:
        Lines to print.

    Raises:
        InputError: The recipe cannot be followed.
    """
    recipe = absolute(recipe)
    lines = []
    for task, paths in check(recipe, workers).items():
        rows = sum(_rows(path) for path in paths)
        epochs = recipe.steps * recipe.rows[task] / rows if rows else 0.0
        lines.append(f"{task}: {rows:,} rows in {len(paths):,} files, {epochs:,.1f} epochs of at most these")
    if recipe.part == "vq":
        return lines
    sizes = Sizes(check_start(local(recipe)), recipe, halves(recipe, Process(device="cuda")))
    lines.append(f"{sizes.learning:,} parameters learn, {sizes.frozen:,} do not")
    for count in sorted({workers, *PLANNED_WORKERS}):
        try:
            lines.append(f"{sizes.choose(count, shard, int(gigabytes * 1e9))}: fits")
        except InputError as error:
            lines.append(f"{count} workers: {error}")
    return lines


def _rows(path: str) -> int:
    filesystem, inner = storage.parquet_filesystem(path)
    with storage.explained(path):
        return int(pq.read_metadata(inner, filesystem=filesystem).num_rows)


def finished(recipe: Recipe) -> str | None:
    """The folder of what a stage has made.

    Args:
        recipe: The stage.

    Returns:
        Its path, on a disk or S3; None if the stage is not finished.
    """
    if not storage.is_s3(recipe.folder):
        done = result(recipe)
        return None if done is None else str(done)
    name, last = (LORA, ABOUT) if recipe.lora else (RESULT, FILE_LIST)
    folder = storage.join(recipe.folder, name)
    return folder if storage.exists(storage.join(folder, last)) else None


def local(recipe: Recipe) -> Recipe:
    """Fetches base and start from S3 if they are on it.

    Args:
        recipe: The stage.

    Returns:
        The recipe with their folders on this machine.

    Raises:
        InputError: One of them is no checkpoint.
    """
    changes: dict[str, Any] = {
        name: str(fetch_folder(getattr(recipe, name))) for name in ("base", "start") if getattr(recipe, name)
    }
    return dataclasses.replace(recipe, **changes)


def _choose(recipe: Recipe, workers: int, device: str, shard: str, say: Callable[[str], None]) -> str:
    """Chooses `none` or `full`, and prints the memory of a worker before any starts."""
    import ray

    memory = ray.get(ray.remote(num_gpus=1)(device_bytes).remote("cuda:0")) if device == "cuda" else 0
    return choose(local(recipe), Process(0, workers, device), shard, say, memory)


def absolute(recipe: Recipe) -> Recipe:
    """Makes the paths of a recipe absolute, for processes with another working directory.

    Args:
        recipe: The stage.

    Returns:
        The recipe with absolute paths; those on S3 unchanged.
    """
    named = {name: getattr(recipe, name) for name in ("folder", "base", "start")}
    changes: dict[str, Any] = {name: absolute_path(path) for name, path in named.items() if path}
    for name in ("data", "held_out"):
        changes[name] = {task: absolute_path(path) for task, path in getattr(recipe, name).items()}
    return dataclasses.replace(recipe, **changes)


def check(recipe: Recipe, workers: int) -> dict[str, list[str]]:
    """Checks a recipe as far as that is possible without reading rows or weights.

    Args:
        recipe: The stage, with absolute paths.
        workers: Processes that share it.

    Returns:
        Task -> its Parquet files, in order.

    Raises:
        InputError: The recipe cannot be followed.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}, but must be at least 1.")
    recipe.share(workers)
    if recipe.workers:
        raise InputError(
            f"The recipe's workers is {recipe.workers}, but processes that make batches ahead cannot reach "
            f"Ray's rows; leave it out."
        )
    check_start(local(recipe))
    find(recipe.held_out, recipe)
    return find(recipe.data, recipe)


def _fit(given: dict[str, Any], workers: int, device: str, stop: Stop) -> None:
    """Runs the workers; an InputError of a worker is raised here."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    recipe: Recipe = given["recipe"]
    with tempfile.TemporaryDirectory(prefix="wallaroo-ray-", ignore_cleanup_errors=True) as temporary:
        # Ray Train's own files, which no resume needs: that takes a state.
        own = temporary if storage.is_s3(recipe.folder) else recipe.folder
        trainer = TorchTrainer(
            _work,
            train_loop_config=given,
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=device == "cuda"),
            run_config=RunConfig(
                name="ray", storage_path=own, failure_config=FailureConfig(max_failures=MAX_FAILURES)
            ),
        )
        try:
            _apart(trainer.fit, storage.join(recipe.folder, STOP), stop)
        except TrainingFailedError as error:
            for failure in getattr(error, "worker_failures", {}).values():
                if isinstance(failure, InputError):
                    raise failure from None
            raise


def _apart(action: Callable[[], Any], note: str, stop: Stop) -> None:
    """Runs an action in a thread of its own, since Ray Train handles Ctrl-C itself in the main one.

    When `stop` asks for the end, the file `note` is written, which the workers look for; then they have the
    time of grace.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    noted = False
    with stop.deferred():
        stop.listen()
        while thread.is_alive():
            thread.join(JOIN_SECONDS)
            if stop.asked() and not noted:
                storage.write_atomic(note, b"")
                noted = True
            if stop.over():
                break
    if noted:
        _remove_note(note)
    if failed:
        raise failed[0]
    if noted:
        raise stop.stopped()


def _work(config: dict[str, Any]) -> None:
    """Runs the stage as one of the workers."""
    from ray.train.torch import get_device

    recipe: Recipe = config["recipe"]
    process = process_of_group(str(get_device()), config["shard"])
    given = {"data": config["data"], "held_out": config["held_out"], "process": process}
    if recipe.stream:
        given |= {"data": {}, "source": _streamed(recipe, config["data"], process)}
    with _noted(storage.join(recipe.folder, STOP), process.rank == 0) as stop:
        if not storage.is_s3(recipe.folder):
            run_stage(local(recipe), **given, stop=stop)
            return
        from wallaroo.workflows.training.states import Published, S3States

        storage.enable_retries()
        states = S3States(storage.join(recipe.folder, STATES))
        with tempfile.TemporaryDirectory(prefix="wallaroo-train-") as own:
            published = Published(own, recipe.folder)
            if process.rank == 0:
                published.fetch_log()
            here = dataclasses.replace(local(recipe), folder=own)
            made = run_stage(here, **given, say=lambda line: published.publish(), files=states, stop=stop)
            if process.rank == 0:
                published.publish()
                if made is not None:
                    published.publish_result(made.name)


def _streamed(recipe: Recipe, groups: Mapping[str, Groups], process: Process) -> Streamed:
    """The rows of a worker, which keeps the current row group of each of its places and the next one."""
    places = sum(recipe.share(process.world).values()) * recipe.accumulate
    return Streamed(
        groups,
        recipe.rows,
        recipe.seed,
        needed,
        functools.partial(fitting, recipe=recipe),
        kept=2 * places,
    )


@contextmanager
def _noted(note: str, looks: bool) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether a file exists; if `looks`, a thread polls it."""
    found, over = threading.Event(), threading.Event()
    pause = S3_POLL_SECONDS if storage.is_s3(note) else POLL_SECONDS

    def look() -> None:
        while not over.wait(pause):
            asked = storage.info(note)
            if asked is not None and not asked.size:
                found.set()
                return

    thread = threading.Thread(target=look, name="stop", daemon=True)
    if looks:
        thread.start()
    try:
        yield found.is_set
    finally:
        over.set()


@contextmanager
def _followed(recipe: Recipe, say: Callable[[str], None]) -> Iterator[None]:
    """Prints the lines that the workers add to the log while the block lasts."""
    file, over = storage.join(recipe.folder, METRICS), threading.Event()
    pause = S3_POLL_SECONDS if storage.is_s3(file) else POLL_SECONDS
    seen = len(_log(file))

    def follow() -> None:
        nonlocal seen
        while True:
            last = over.wait(pause)
            for line in _log(file)[seen:].splitlines(keepends=True):
                if line.endswith(b"\n"):
                    seen += len(line)
                    numbers = json.loads(line)
                    say(progress(numbers.pop("step"), recipe.steps, numbers))
            if last:
                return

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _log(file: str) -> bytes:
    try:
        return storage.read_bytes(file)
    except FileNotFoundError:
        return b""
