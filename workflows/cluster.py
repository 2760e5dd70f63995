"""A Ray to run on: a local one that this module starts and ends, or an existing cluster.

The terminal shows the progress of a run, so Ray writes to its log files only. Knows
nothing of what is run. The environment variables it sets are for Ray's own processes and go again.
"""

import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from wallaroo.model.errors import InputError
from wallaroo.workflows.settings import OPTIONS
from wallaroo.workflows.text import counted

log = logging.getLogger(__name__)

_TOKEN = secrets.token_hex(32)
"""For every local Ray of this process; Ray reads it once per process, so it cannot change."""

MAX_INIT_DEATHS = 10
"""Replicas in a row that may end before one is up; with more the cause is no lost node."""

CONNECT_SECONDS = 60.0
"""Timeout for the first reply of a cluster."""

_LOCAL_ENVIRONMENT: dict[str, str | None] = {
    # Given like this, the token is on no disk; Ray's default would leave it in a file that all may read.
    "RAY_AUTH_TOKEN": _TOKEN,
    # Unset, Ray demands a token of all who talk to it; set, it is heeded only if Ray was not imported yet.
    "RAY_AUTH_MODE": None,
    # Ray replaces 127.0.0.1 by the address of the machine, except where it runs on one machine only,
    # which is how it takes this name; like all of these it is read when Ray is imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextmanager
def connected(
    address: str | None = None,
    cpus: int = 0,
    start_timeout: float = OPTIONS["ray_start_timeout"].default,
) -> Iterator[None]:
    """Connects to Ray for the block, unless this process is connected already.

    Args:
        address: Of a running cluster; None for a local Ray, which only this process can talk to.
        cpus: CPUs that a local Ray counts at least, whatever the machine has.
        start_timeout: Seconds after which a local Ray is not started once more.

    Yields:
        Nothing.

    Raises:
        InputError: Nothing answers at the address, or a local Ray does not start.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        _quieten()
        yield
    elif address is None:
        # Paths of sockets are short, and a temporary folder of the user's may be deep. Ray opens its own
        # folder to everybody, so it gets one inside of one that is ours alone.
        folder = tempfile.mkdtemp(prefix="wallaroo-", dir="/tmp" if os.path.isdir("/tmp") else None)
        options = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, cpus),
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": os.path.join(folder, "ray"),
        }
        try:
            with _environment(_LOCAL_ENVIRONMENT), _ray(options, folder, start_timeout):
                yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        with (
            tempfile.TemporaryDirectory(prefix="wallaroo-") as folder,
            _ray({"address": address}, folder, start_timeout),
        ):
            yield


def origin_of(address: str) -> str:
    """Where the address of a cluster is from: the variable `$RAY_ADDRESS`, a flag or a run file."""
    return "$RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") == address else "--address or cluster.address"


@contextmanager
def _ray(options: dict[str, Any], folder: str, start_timeout: float) -> Iterator[None]:
    """Ray with these options of `ray.init`, started from an empty folder (see `_working_directory`)."""
    # A thread that is left over when Ray has ended must not start another one.
    with _environment({"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ENABLE_AUTO_CONNECT": "0"}):
        import ray

        try:
            if options["address"] != "local":
                _wait_for_cluster(options["address"])
            with _working_directory(folder):
                _start(options, start_timeout)
        except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
            if options["address"] == "local":
                raise
            words = str(error).strip().splitlines()[0]
            raise InputError(
                f"no Ray cluster answers at {options['address']}, which is from "
                f"{origin_of(options['address'])} ({words}): correct it, or leave it out to start a "
                f"local Ray."
            ) from error
    try:
        _quieten()
        yield
    finally:
        ray.shutdown()


@contextmanager
def _working_directory(folder: str) -> Iterator[None]:
    """Changes the working directory for the block.

    `ray.init` puts the driver's first in the module search path of all workers, and a local Ray starts them
    in it. In a folder of a user any file could then be imported in place of a library.
    """
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _wait_for_cluster(address: str) -> None:
    """Waits for the gRPC server of a cluster, as `ray.init` itself would for a quarter of an hour.

    Args:
        address: `host:port` or `ray://host:port`; others are not looked at.

    Raises:
        TimeoutError: None answers within CONNECT_SECONDS.
    """
    server = address.removeprefix("ray://")
    # TLS needs certificates that only Ray knows of; `auto` and the like name no server.
    if ":" not in server or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    import grpc

    with grpc.insecure_channel(server) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            raise TimeoutError(f"no answer in {CONNECT_SECONDS:.0f} s") from None


def _start(options: dict[str, Any], timeout: float) -> None:
    """Starts or connects to Ray; a start that took too long is retried until `timeout` seconds are over."""
    import ray

    started = time.monotonic()
    while True:
        try:
            with _silent():
                ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
            return
        except Exception as error:
            # Ray gives a node 30 seconds, which are few on a busy machine.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if time.monotonic() - started >= timeout:
                raise InputError(
                    f"Ray failed to start within {timeout:g} s. Check the load of this machine; "
                    f"a run waits longer with --ray-start-timeout."
                ) from error


def check_gpus(address: str | None, wanted: int, gpus: int, what: str = "replica") -> None:
    """Tells what to do about GPUs that are not there.

    Args:
        address: Of the cluster, None for a local Ray.
        wanted: GPUs that are needed at least.
        gpus: How many Ray has now.
        what: Each needs one.

    Raises:
        InputError: A local Ray lacks GPUs. A cluster may yet get some, so that there is only a warning.
    """
    if address is None and gpus < wanted:
        need = "needs a GPU" if wanted == 1 else "need a GPU each"
        fewer = "use fewer, " if gpus else ""
        raise InputError(
            f"{counted(wanted, what)} {need}, but this machine has {gpus}: {fewer}give --device cpu, or the "
            f"--address of a cluster with GPUs."
        )
    if gpus == 0:
        log.warning(
            f"The cluster at {address} has no GPU now, so this run waits for one. If no autoscaler adds a "
            f"node with GPUs, start one, or stop the run and give --device cpu."
        )


def choose_device(device: str) -> str:
    """Chooses the device of a run.

    Args:
        device: `cpu`, `cuda` or `auto`.

    Returns:
        `cpu` or `cuda`; for `auto` what the Ray cluster has now.
    """
    import ray

    if device != "auto":
        return device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def reason(error: BaseException) -> BaseException:
    """Unwraps an error of a Ray task.

    Args:
        error: As Ray brings it to the driver.

    Returns:
        What went wrong in the task; of an InputError its first line, without Ray Data's advice.
    """
    from ray.exceptions import RayTaskError, UserCodeException

    while isinstance(error, RayTaskError | UserCodeException):
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    if isinstance(error, InputError):
        # Ray Data appends advice about its own settings; ours is one sentence on one line.
        return InputError(str(error).split("\n", 1)[0])
    return error


def _quieten() -> None:
    """Sets up Ray Data: logs to its file only, no bars, no timeout, exceptions of ours unwrapped."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # A run waits for its first GPU without limit, and a node may be lost while it loads.
    context.execution_no_progress_timeout_s = -1
    context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS
    logger = logging.getLogger("ray.data")
    for handler in list(logger.handlers):
        if handler.name == "console":
            logger.removeHandler(handler)
    # A handler further up would print its errors, or keep them with all that their tracebacks hold.
    logger.propagate = False


@contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _silent() -> Iterator[None]:
    """Discards what is written to stderr: Ray's native half greets there before its log file is open."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        with suppress(OSError):
            os.dup2(kept, 2)
        os.close(kept)
