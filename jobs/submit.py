"""Runs as jobs of a Ray cluster, over its Jobs API: submit, find, follow, stop.

A job runs the same command, with the code that was sent with it. Its progress is in its output. Knows
nothing of how a run works.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wallaroo
from wallaroo.model.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from wallaroo.workflows.reports.status import Status
    from wallaroo.workflows.settings import RunConfig

MAX_CARRIED_BYTES = 64 << 20
"""Limit of manifest and run file together, which are sent along with the code."""

CODE_SUFFIXES = (".py", ".pyc", ".pyd", ".so", ".pth")

DASHBOARD_PORT = 8265
"""Default address of a dashboard."""

DASHBOARD_TIMEOUT = 30.0
"""Timeout of a request to the dashboard, in seconds; the head may be busy."""

STOP_TIMEOUT = 60
"""Seconds that a driver may take to stop, which include its drain."""

POLL_SECONDS = 1.0
_MARK = "wallaroo."


@dataclass(frozen=True)
class Job:
    """A run on a cluster, as the cluster reports it."""

    id: str
    """Id of the submission."""
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    name: str
    """The name given at submission, or empty."""
    task: str
    """`generate`, `edit` or `understand`."""
    output: str
    """The folder of the results."""
    started: float | None
    """Seconds since the epoch, or None."""
    ended: float | None
    """Seconds since the epoch, or None."""
    exit_code: int | None
    """Exit status of the command; None while it runs, or if it never ran."""
    message: str
    """The cluster's message about the job."""

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.state not in ("PENDING", "RUNNING")


def connect(address: str | None, environment: Mapping[str, str] = os.environ) -> "JobSubmissionClient":
    """A client of a cluster.

    Args:
        address: Of its dashboard, such as http://127.0.0.1:8265; by default that of $RAY_API_SERVER_ADDRESS
            or $RAY_ADDRESS, else a cluster on this machine. Of another address of a cluster its host is
            asked on Ray's usual port.
        environment: Has these variables, and the token: RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH
            (default ~/.ray/auth_token).

    Returns:
        The client.

    Raises:
        InputError: Nothing answers, or the token is missing or wrong.
    """
    given = address or environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_ADDRESS") or "auto"
    address = _dashboard(given)
    headers = {}
    token = _token(environment)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    _check(address, headers, "check address and port, or the port-forward" if address == given else _SET)
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address, headers=headers)


_SET = (
    "give that of the dashboard as --address or $RAY_API_SERVER_ADDRESS; `ray start` prints it, such as "
    "http://127.0.0.1:8265"
)


def _dashboard(address: str) -> str:
    """The address of a cluster's dashboard, from that or another address of the cluster."""
    if address.startswith(("http://", "https://")):
        return address.rstrip("/")
    server = address.removeprefix("ray://").rstrip("/")
    host = "127.0.0.1" if server in ("auto", "local") else re.sub(r":\d+$", "", server)
    return f"http://{host}:{DASHBOARD_PORT}"


def _token(environment: Mapping[str, str]) -> str:
    if environment.get("RAY_AUTH_TOKEN"):
        return environment["RAY_AUTH_TOKEN"].strip()
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(path or Path.home() / ".ray" / "auth_token").read_text().strip()
    except OSError as error:
        if path:
            raise InputError(
                f"RAY_AUTH_TOKEN_PATH is {path}, which cannot be read ({error.strerror}): "
                f"name the file that holds the cluster's token."
            ) from None
        return ""


def _check(address: str, headers: dict[str, str], remedy: str) -> None:
    """Asks the dashboard for its version; Ray's own client has no timeout.

    remedy: what to do where none answers.
    """
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=headers)
        with urllib.request.urlopen(request, timeout=DASHBOARD_TIMEOUT) as answer:
            version = json.load(answer)
            if not isinstance(version, dict) or "ray_version" not in version:
                raise ValueError
    except urllib.error.HTTPError as error:
        if error.code == 401:
            why = (
                "requires a token, but none was found: set RAY_AUTH_TOKEN, or put it into ~/.ray/auth_token."
            )
        elif error.code == 403:
            why = "rejects the token: set RAY_AUTH_TOKEN or ~/.ray/auth_token to the token of this cluster."
        else:
            why = f"answers with status {error.code}: check that the address is that of a Ray dashboard."
        raise InputError(f"the cluster at {address} {why}") from None
    except ValueError:
        raise InputError(f"{address} is not a Ray dashboard: {remedy}.") from None
    except OSError as error:
        words = getattr(error, "reason", None) or error
        raise InputError(f"no Ray dashboard answers at {address} ({words}): {remedy}.") from None


# Submission


def submit(
    client: "JobSubmissionClient",
    config: "RunConfig",
    command: Sequence[str],
    files: Sequence[Path] = (),
    name: str | None = None,
) -> tuple[str, bool]:
    """Submits a run, unless its job is active.

    Args:
        client: Of the cluster.
        config: What `command` resolves to.
        command: The words after `wallaroo`.
        files: Files to send along, as `carried` found them.
        name: A name for people.

    Returns:
        The id of the job, and whether it is a new one. The id is a digest of what the run makes and where,
        and the number of the attempt, so that the same run is found again.

    Raises:
        InputError: The cluster rejects the job.
    """
    base = f"{config.task}-{_digest(config)}"
    with tempfile.TemporaryDirectory(prefix="wallaroo-") as folder:
        _stage(Path(folder), config, files)
        while True:
            attempts = {
                int(job.id.removeprefix(f"{base}-")): job
                for job in jobs(client)
                if job.id.removeprefix(f"{base}-").isdecimal()
            }
            last = max(attempts, default=0)
            if last and not attempts[last].over:
                return attempts[last].id, False
            wanted = f"{base}-{last + 1}"
            try:
                return _send(client, wanted, folder, config, command, name), True
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise InputError(f"the cluster rejects the job: {_line(error)}") from None
                # Another process has just submitted the same run; the list has it now.
                time.sleep(POLL_SECONDS)


def _send(
    client: "JobSubmissionClient",
    wanted: str,
    folder: str,
    config: "RunConfig",
    command: Sequence[str],
    name: str | None,
) -> str:
    return client.submit_job(
        entrypoint=f"python -m wallaroo.jobs.cli {shlex.join(command)}",
        submission_id=wanted,
        runtime_env={
            "working_dir": folder,
            "env_vars": {
                # SIGINT drains the run as Ctrl-C does on a terminal.
                "RAY_JOB_STOP_SIGNAL": "SIGINT",
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT),
                "PYTHONUNBUFFERED": "1",
            },
        },
        metadata={
            f"{_MARK}name": name or "",
            f"{_MARK}task": config.task,
            f"{_MARK}output": config.output,
        },
        # A driver that requests no resources stays on the head node.
        entrypoint_num_cpus=0,
        entrypoint_num_gpus=0,
    )


def _digest(config: "RunConfig") -> str:
    """Of what a run makes and where, but not of how fast."""
    meaning = config.config_digest_fields(config.model)
    where = {name: getattr(config, name) for name in ("manifest", "output", "limit", "where", "image_root")}
    return hashlib.sha256(json.dumps(meaning | where, sort_keys=True).encode()).hexdigest()[:12]


def carried(config: "RunConfig", command: Sequence[str]) -> list[Path]:
    """Files of this machine that the command names by relative paths, to be sent along.

    Args:
        config: What `command` resolves to.
        command: The words after `wallaroo`.

    Returns:
        Their paths.

    Raises:
        InputError: The command names a path that a cluster cannot read.
    """
    from wallaroo.workflows.storage import is_s3

    if config.address is not None:
        raise InputError(
            f"the address of the command is {config.address}, but a job runs on the cluster it is submitted "
            f"to: leave it out there."
        )
    here = [("OUTPUT", config.output), ("--model", config.model), ("--image-root", config.image_root)]
    for what, place in here:
        if place and place != "tiny" and not is_s3(place) and not os.path.isabs(place):
            raise InputError(
                f"{what} is {place}, a path of this machine, which no cluster can read: give s3://bucket/key"
                f", or an absolute path that all of its nodes share."
            )
    manifest = config.manifest
    found = [] if is_s3(manifest) or os.path.isabs(manifest) else [Path(manifest)]
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--config" or word.startswith("--config="):
            file = word.partition("=")[2] or following
            found += [] if is_s3(file) or os.path.isabs(file) else [Path(file)]
    files: list[Path] = []
    for path in found:
        if os.pardir in path.parts:
            raise InputError(
                f"{path} is outside of the working directory: start from a folder that contains it."
            )
        if path.is_dir():
            files += sorted(one for one in path.rglob("*") if one.is_file())
        elif path.is_file():
            files.append(path)
        elif any(sign in str(path) for sign in "*?["):
            files += sorted(Path().glob(str(path)))
        else:
            raise InputError(f"{path} cannot be read, since there is no such file or folder: check the path.")
    # They are copied beside the code, which no file of theirs may replace.
    files = [path for path in files if path.suffix.lower() not in CODE_SUFFIXES]
    size = sum(path.stat().st_size for path in files)
    if size > MAX_CARRIED_BYTES:
        raise InputError(
            f"{found[0]} has {size >> 20} MiB, but at most {MAX_CARRIED_BYTES >> 20} MiB are sent with a "
            f"job: put it on S3 and give s3://bucket/key."
        )
    return files


def _stage(folder: Path, config: "RunConfig", files: Sequence[Path]) -> None:
    """Copies the code, and the files that the command names, into `folder`."""
    # Not resolved: `wallaroo/` may hold the packages as links, and the copy must have them in it.
    home = Path(wallaroo.__file__).parent
    skipped = ["__pycache__", "*.pyc", *([] if config.model == "tiny" else ["tiny"])]
    shutil.copytree(home, folder / "wallaroo", ignore=shutil.ignore_patterns(*skipped))
    for path in files:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


# Jobs of a cluster


def jobs(client: "JobSubmissionClient") -> list[Job]:
    """The runs among the jobs of a cluster, newest first."""
    with _answered():
        found = [_job(one) for one in client.list_jobs() if f"{_MARK}output" in (one.metadata or {})]
    return sorted(found, key=lambda job: job.started or 0, reverse=True)


def find(client: "JobSubmissionClient", name: str) -> Job:
    """Finds the newest run with this id, name or output.

    Args:
        client: Of the cluster.
        name: An id, a name or an output folder.

    Returns:
        The run.

    Raises:
        InputError: There is none.
    """
    found_jobs = jobs(client)
    for job in found_jobs:
        if name in (job.id, job.name, job.output.rstrip("/"), job.output):
            return job
    hint = did_you_mean(name, [job.id for job in found_jobs]) or "; `wallaroo jobs list` shows all."
    raise InputError(f"the cluster has no run '{name}'{hint}")


def _job(details: "JobDetails") -> Job:
    marks = details.metadata or {}
    return Job(
        id=details.submission_id or "",
        state=str(details.status.value),
        name=marks.get(f"{_MARK}name", ""),
        task=marks.get(f"{_MARK}task", ""),
        output=marks.get(f"{_MARK}output", ""),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=_line(details.message or ""),
    )


def progress(job: Job) -> "Status | None":
    """The status of a run; None if its output does not exist yet or cannot be read from here."""
    from wallaroo.workflows.reports.status import status

    try:
        return status(job.output)
    except (InputError, OSError):
        return None


def follow(client: "JobSubmissionClient", job_id: str, write: Callable[[str], None]) -> Job:
    """Passes the log of a run to `write` until the run has ended.

    Args:
        client: Of the cluster.
        job_id: Id of the submission.
        write: Gets each new piece of the log.

    Returns:
        The run after its end.
    """
    import asyncio

    written = 0

    async def listen() -> None:
        nonlocal written
        received = 0
        async for text in client.tail_job_logs(job_id):
            # A second connection gets the log from its beginning.
            if received + len(text) > written:
                write(text[max(0, written - received) :])
                written = received + len(text)
            received += len(text)

    while True:
        # A connection may break, or end before the last lines; the run is not affected.
        with suppress(RuntimeError, OSError, asyncio.TimeoutError):
            asyncio.run(listen())
        job = find(client, job_id)
        if job.over:
            rest = logs(client, job_id)[written:]
            if rest:
                write(rest)
            return job
        time.sleep(POLL_SECONDS)


def logs(client: "JobSubmissionClient", job_id: str) -> str:
    """Reads the log of a run so far.

    Args:
        client: Of the cluster.
        job_id: Id of the submission.

    Returns:
        The log.
    """
    with _answered():
        return client.get_job_logs(job_id)


def stop(client: "JobSubmissionClient", job_id: str) -> Job:
    """Asks a run to stop, and waits for its end. A run that has ended is left alone.

    Args:
        client: Of the cluster.
        job_id: Id, name or output of the run.

    Returns:
        The run after its end, or as it is after the timeout (twice STOP_TIMEOUT).
    """
    job = find(client, job_id)
    if not job.over:
        with _answered():
            client.stop_job(job.id)
        deadline = time.monotonic() + 2 * STOP_TIMEOUT
        while not (job := find(client, job.id)).over and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    return job


@contextmanager
def _answered() -> Iterator[None]:
    """Turns errors of the client into InputError, in one sentence."""
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, OSError, RayError) as error:
        raise InputError(f"the request to the cluster failed ({_line(error)}): try again.") from error


def _line(words: Any) -> str:
    return (str(words).strip().splitlines() or [""])[0][:300]
