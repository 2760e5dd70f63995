"""Runs as jobs of a Ray cluster: submitted over its Jobs API, found again, followed and stopped.

What a job does is the command itself, on code that is sent along; how far it is stands in its output.
Knows nothing of how a run is done.
"""

import hashlib
import json
import os
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

CARRIED_BYTES = 64 << 20
"""Manifest and run file that go along with the code; what is larger belongs where the cluster can read it."""

CODE = (".py", ".pyc", ".pyd", ".so", ".pth")

ANSWER_SECONDS = 10.0
STOP_SECONDS = 60
"""How long a driver that was asked to stop may take to finish what it writes."""

POLL_SECONDS = 1.0
_MARK = "wallaroo."


@dataclass(frozen=True)
class Job:
    """A run on a cluster, as the cluster tells it.

    id: of the submission. state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. started, ended: seconds
    since the epoch, or None. exit_code: of the command, None while it runs or if it never did.
    message: what the cluster says of it.
    """

    id: str
    state: str
    name: str
    task: str
    output: str
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING")


def connect(address: str | None, environment: Mapping[str, str] = os.environ) -> "JobSubmissionClient":
    """A client of the cluster whose dashboard is at `address`, such as http://127.0.0.1:8265.

    Without one, $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS is taken. The token comes from RAY_AUTH_TOKEN,
    the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. Raises InputError if nothing answers, or the token
    is missing or wrong.
    """
    address = address or environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_ADDRESS") or ""
    if not address.startswith(("http://", "https://")):
        shown = f"is '{address}', but" if address else "is absent, but"
        raise InputError(
            f"the address {shown} must be that of the cluster's dashboard, such as http://127.0.0.1:8265: "
            f"give --address."
        )
    address = address.rstrip("/")
    headers = {}
    token = _token(environment)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    _check(address, headers)
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address, headers=headers)


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


def _check(address: str, headers: dict[str, str]) -> None:
    """Asks for the version of what is there; Ray's own client would wait without end for no answer."""
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=headers)
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            version = json.load(answer)
            if not isinstance(version, dict) or "ray_version" not in version:
                raise ValueError
    except urllib.error.HTTPError as error:
        if error.code == 401:
            why = "asks for a token and none was found: set RAY_AUTH_TOKEN, or put it into ~/.ray/auth_token."
        elif error.code == 403:
            why = "refuses the token: give the one of this cluster, in RAY_AUTH_TOKEN or ~/.ray/auth_token."
        else:
            why = f"answers {error.code}: check that the address is that of a Ray dashboard."
        raise InputError(f"the cluster at {address} {why}") from None
    except ValueError:
        raise InputError(
            f"what answers at {address} is no Ray dashboard: give the address of one, with its port."
        ) from None
    except OSError as error:
        words = getattr(error, "reason", None) or error
        raise InputError(
            f"no Ray dashboard answers at {address} ({words}): check address and port, or the port-forward."
        ) from None


# Submission


def submit(
    client: "JobSubmissionClient",
    config: "RunConfig",
    command: Sequence[str],
    files: Sequence[Path] = (),
    name: str | None = None,
) -> tuple[str, bool]:
    """Submits a run, unless it is there already and not over; its id, and whether it is a new one.

    config: what `command`, the words after `wallaroo`, resolves to; files: as `carried` found them. The id
    is made from what the run makes, so that the same one is found again; each attempt after the last one
    ended has the next number. Raises InputError if the cluster refuses it.
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
                    raise InputError(f"the cluster refuses the job: {_line(error)}") from None
                # Somebody else submitted the same run in this moment; theirs is found in the list.
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
                # A driver stops at Ctrl-C as on a terminal: what is finished is written, the lock given back.
                "RAY_JOB_STOP_SIGNAL": "SIGINT",
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
                "PYTHONUNBUFFERED": "1",
            },
        },
        metadata={
            f"{_MARK}name": name or "",
            f"{_MARK}task": config.task,
            f"{_MARK}output": config.output,
        },
        # Asking for nothing keeps the driver on the head, which has no GPU in a cluster worth its price.
        entrypoint_num_cpus=0,
        entrypoint_num_gpus=0,
    )


def _digest(config: "RunConfig") -> str:
    """Of all that says what a run makes and where, and nothing that says how fast."""
    meaning = config.config_digest_fields(config.model)
    where = {name: getattr(config, name) for name in ("manifest", "output", "limit", "where", "image_root")}
    return hashlib.sha256(json.dumps(meaning | where, sort_keys=True).encode()).hexdigest()[:12]


def carried(config: "RunConfig", command: Sequence[str]) -> list[Path]:
    """Files of this machine that the command names by relative paths, and that are sent along.

    command: the words after `wallaroo`, which resolve to `config`. Raises InputError where they name what
    a cluster could not read.
    """
    from wallaroo.workflows.storage import is_s3

    if config.address is not None:
        raise InputError(
            f"the address of the command is {config.address}, but a job runs on the cluster that it is "
            f"submitted to: leave it out there."
        )
    here = [("OUTPUT", config.output), ("--model", config.model), ("--image-root", config.image_root)]
    for what, place in here:
        if place and place != "tiny" and not is_s3(place) and not os.path.isabs(place):
            raise InputError(
                f"{what} is {place}, a path of this machine that no cluster can use: give s3://bucket/key, "
                f"or an absolute path that all of its nodes share."
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
            raise InputError(f"{path} leads out of the present folder: start from a folder that holds it.")
        if path.is_dir():
            files += sorted(one for one in path.rglob("*") if one.is_file())
        elif any(sign in str(path) for sign in "*?["):
            files += sorted(Path().glob(str(path)))
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(
                f"{path} cannot be read, there is no such file or folder: give one that is there."
            )
    # They stand beside the code there, and a folder of data is no place for more of it.
    files = [path for path in files if path.suffix.lower() not in CODE]
    size = sum(path.stat().st_size for path in files)
    if size > CARRIED_BYTES:
        raise InputError(
            f"{found[0]} has {size >> 20} MiB, but at most {CARRIED_BYTES >> 20} MiB are sent along with a "
            f"job: put it on S3 and give s3://bucket/key."
        )
    return files


def _stage(folder: Path, config: "RunConfig", files: Sequence[Path]) -> None:
    """Lays out what a job needs of this machine: code, and files that its command names."""
    # Not resolved: `wallaroo/` may hold the packages as links, and the copy must have them in it.
    home = Path(wallaroo.__file__).parent
    skipped = ["__pycache__", "*.pyc", *([] if config.model == "tiny" else ["tiny"])]
    shutil.copytree(home, folder / "wallaroo", ignore=shutil.ignore_patterns(*skipped))
    for path in files:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


# What is there


def jobs(client: "JobSubmissionClient") -> list[Job]:
    """The runs that the cluster knows, newest first; jobs of others are left out."""
    with _answered():
        found = [_job(one) for one in client.list_jobs() if f"{_MARK}output" in (one.metadata or {})]
    return sorted(found, key=lambda job: job.started or 0, reverse=True)


def find(client: "JobSubmissionClient", name: str) -> Job:
    """The newest run of this id, name or output. Raises InputError if there is none."""
    known = jobs(client)
    for job in known:
        if name in (job.id, job.name, job.output.rstrip("/"), job.output):
            return job
    hint = did_you_mean(name, [job.id for job in known]) or "; `wallaroo jobs list` names all."
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
    """How far a run is by its own records; None where this machine cannot read its output, or nothing is
    there yet."""
    from wallaroo.workflows.reports.status import status

    try:
        return status(job.output)
    except (InputError, OSError):
        return None


def follow(client: "JobSubmissionClient", job_id: str, write: Callable[[str], None]) -> Job:
    """Gives all that a run says to `write`, from its beginning, until it is over; the run as it ended."""
    import asyncio

    said = 0

    async def listen() -> None:
        nonlocal said
        heard = 0
        async for text in client.tail_job_logs(job_id):
            # A second connection hears everything again.
            if heard + len(text) > said:
                write(text[max(0, said - heard) :])
                said = heard + len(text)
            heard += len(text)

    while True:
        # A connection may break, or end a moment before the last words; the run goes on all the same.
        with suppress(RuntimeError, OSError, asyncio.TimeoutError):
            asyncio.run(listen())
        job = find(client, job_id)
        if job.over:
            rest = logs(client, job_id)[said:]
            if rest:
                write(rest)
            return job
        time.sleep(POLL_SECONDS)


def logs(client: "JobSubmissionClient", job_id: str) -> str:
    """All that a run said so far."""
    with _answered():
        return client.get_job_logs(job_id)


def stop(client: "JobSubmissionClient", job_id: str) -> Job:
    """Asks a run to stop and waits until it has; one that is over stays as it is."""
    job = find(client, job_id)
    if not job.over:
        with _answered():
            client.stop_job(job.id)
        deadline = time.monotonic() + 2 * STOP_SECONDS
        while not (job := find(client, job.id)).over and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    return job


@contextmanager
def _answered() -> Iterator[None]:
    """Errors of the client in one sentence."""
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, OSError, RayError) as error:
        raise InputError(f"the cluster does not answer as it should ({_line(error)}): try again.") from error


def _line(words: Any) -> str:
    return (str(words).strip().splitlines() or [""])[0][:300]
