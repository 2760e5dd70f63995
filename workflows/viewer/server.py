"""The server of the viewer: its socket, address, token and memory bound. Knows nothing of pages."""

import errno
import ipaddress
import resource
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from wallaroo.model.errors import InputError

PORT = 8765
GROWTH_BYTES = 768 << 20
"""Most memory that the process may allocate once it serves. DuckDB's own limit does not count all strings of
an expression; with this one, a runaway expression ends in an error."""

MAX_OUTPUTS = 8


def serve(
    paths: Sequence[str],
    port: int | None = None,
    host: str = "127.0.0.1",
    votes: str | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Shows outputs until the process is interrupted.

    Args:
        paths: Folders of outputs, local or `s3://bucket/key`.
        port: To listen at; by default PORT, or any that is free where that one is taken.
        host: Address to listen at. Anything but loopback needs the token that `ready` is given.
        votes: File of votes, by default beside the first output.
        ready: Is given the address when it can be opened.

    Raises:
        InputError: If a path is no output, the port is taken, or what this needs is not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise InputError(
            f"the viewer needs {error.name}, which is not installed: pip install 'wallaroo-batch[view]'."
        ) from None
    if len(paths) > MAX_OUTPUTS:
        raise InputError(
            f"there are {len(paths)} outputs, but a page shows at most {MAX_OUTPUTS}: give fewer."
        )
    from wallaroo.workflows.viewer.app import make_app
    from wallaroo.workflows.viewer.guard import LOOPBACK
    from wallaroo.workflows.viewer.state import Viewer

    bound = _listen(host, port)
    try:
        local = _is_loopback(host)
        token = None if local else secrets.token_urlsafe(24)
        viewer = Viewer(paths, votes)
        try:
            app = make_app(viewer, (*LOOPBACK, host.lower()) if local else None, token)
            config = uvicorn.Config(
                app,
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=2,
            )
            viewer.keeper.start()
            bound_growth(GROWTH_BYTES)
            ready(_address(host, bound.getsockname()[1], token))
            uvicorn.Server(config).run(sockets=[bound])
        finally:
            viewer.close()
    finally:
        bound.close()


def bound_growth(growth: int) -> None:
    """Limits what this process may allocate from now on, in bytes. Linux only."""
    with suppress(ValueError, OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        # This counts reserved memory too, and Arrow reserves a gigabyte.
        now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft == resource.RLIM_INFINITY or soft > now + growth:
            resource.setrlimit(resource.RLIMIT_DATA, (now + growth, hard))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def _listen(host: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in (PORT, 0) if port is None else (port,):
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host.strip("[]"), number))
            bound.listen(128)
            return bound
        except OSError as error:
            bound.close()
            if error.errno == errno.EADDRINUSE and port is None and number:
                continue
            words = (
                "is taken"
                if error.errno == errno.EADDRINUSE
                else f"cannot be used ({error.strerror or error})"
            )
            raise InputError(f"{host}:{number} {words}: give another --host or --port.") from None
        except OverflowError:
            bound.close()
            raise InputError(f"port is {number}, but must be from 0 to 65535.") from None
    raise AssertionError("unreachable")


def _address(host: str, port: int, token: str | None) -> str:
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    elif ":" in host:
        host = f"[{host.strip('[]')}]"
    return f"http://{host}:{port}/" + (f"?token={token}" if token else "")
