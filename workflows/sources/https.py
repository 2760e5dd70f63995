"""Downloads over https from hosts that a manifest names: public addresses only, within limits.

A host is resolved once, all its addresses are checked, and the connection goes to one of these addresses. The
same holds for every redirect. Proxies are not used, since behind one the address cannot be checked. Knows
nothing of pictures, manifests and retries.
"""

import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from contextlib import suppress

from wallaroo.model.errors import RowError

SECONDS = 60
"""Most seconds from the first connection of a download to its last byte, redirects included."""

CONNECT_SECONDS = 10
"""Most seconds of one connection attempt."""
MAX_REDIRECTS = 5
"""Most redirects of one download."""
CHUNK_BYTES = 1 << 16
"""Most bytes of one read."""

_TRY_AGAIN = {408, 425, 429}
_REDIRECTS = {301, 302, 303, 307, 308}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""The last four bytes are the IPv4 address that is reached."""

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's metadata
        "192.0.0.0/24",  # Oracle's; of this and the next two not every Python says that they are special
        "64:ff9b:1::/48",
        "fec0::/10",
    )
)
"""Networks that `ipaddress` calls global, but that are not public."""


class Unavailable(Exception):
    """The host did not serve this time, but may do so later. The message is the end of a sentence."""


def download(
    url: str,
    most: int,
    *,
    seconds: float = SECONDS,
    resolve: "Callable[[str, int], Sequence[str]] | None" = None,
    permitted: "Callable[[str], bool] | None" = None,
) -> bytes:
    """Downloads a file from a public host.

    Args:
        url: Address, https:// only.
        most: Most bytes of the file.
        seconds: Most seconds of the whole download.
        resolve: Host and port -> IP addresses; the system resolver if None.
        permitted: Whether to connect to an IP address; `is_public` if None.

    Returns:
        The file.

    Raises:
        RowError: ("image") The host refuses, or a rule is broken. A retry would not help.
        Unavailable: The host does not serve now.
    """
    name = shown(without_query(url))
    deadline = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        host, port, target = _parts(url, name)
        addresses = (resolve or _system_addresses)(host, port)
        refused = [address for address in addresses if not (permitted or is_public)(address)]
        if refused or not addresses:
            raise RowError(
                "image",
                f"{name} leads to {host}, which is not a public address: only public ones are contacted.",
            )
        with _Connection(host, port, addresses, deadline) as connection:
            answer = connection.get(target)
            if answer.status in _REDIRECTS and answer.headers["Location"]:
                url = urllib.parse.urljoin(url, answer.headers["Location"])
                continue
            return _body(answer, name, most, connection)
    raise RowError("image", f"{name} redirects more than {MAX_REDIRECTS} times: give its final address.")


def without_query(url: str) -> str:
    """Removes what may be secret from a URL: the query, which may be a signature, and user and password."""
    with suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return "https://"


def shown(path: str) -> str:
    """Formats a path or address for a message: one line of at most 200 characters."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in path)
    return text if len(text) <= 200 else f"{text[:140]}…{text[-59:]}"


def is_public(address: str) -> bool:
    """Tells whether an IP address belongs to the public internet.

    Args:
        address: IPv4 or IPv6 address.

    Returns:
        False for private networks, this machine and its link, metadata services of clouds, addresses that
        embed one of these, and text that is no address.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast and not (ip.version == 4 and ip.is_reserved)


def _parts(url: str, name: str) -> tuple[str, int, str]:
    """Host, port and target of the request, all ASCII."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port or 443
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = urllib.parse.quote(target, safe="%/:=&?~+!$,;'@()*[]")
    except ValueError:
        raise RowError("image", f"{name} is not a valid address: correct it.") from None
    if parts.scheme != "https":
        raise RowError("image", f"{name} leads to {parts.scheme or 'no'}://, but only https:// is read.")
    if not host:
        raise RowError("image", f"{name} names no host: correct it.")
    if parts.username is not None or parts.password is not None:
        raise RowError("image", f"{name} holds a user or password, which no source may: leave it out.")
    return host, port, target


def _system_addresses(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise RowError("image", f"The host {host} does not exist: correct the address.") from None
        raise Unavailable(f"the address of {host} cannot be resolved") from error
    except (OSError, UnicodeError) as error:
        raise Unavailable(f"the address of {host} cannot be resolved") from error
    return [str(address[0]) for *_, address in found]


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Connection(http.client.HTTPSConnection):
    """A connection to one of several addresses, which ends at a deadline whatever its state.

    Timeouts of a socket apply to one read, so a host that sends a byte now and then would hold it forever.
    """

    def __init__(self, host: str, port: int, addresses: Sequence[str], deadline: float):
        super().__init__(host, port, timeout=CONNECT_SECONDS, context=_tls())
        self.addresses, self.deadline = addresses, deadline
        self.timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._cut)
        self.timer.daemon = True
        # http.client drops the socket if the response ends with the connection.
        self.wire: ssl.SSLSocket | None = None
        self.answer: http.client.HTTPResponse | None = None

    def __enter__(self) -> "_Connection":
        self.timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()
        if self.answer is not None:
            self.answer.close()
        self.close()

    def _cut(self) -> None:
        if self.wire is not None:
            with suppress(OSError):
                # Not SSLSocket's shutdown, which would change the object while its reader uses it.
                socket.socket.shutdown(self.wire, socket.SHUT_RDWR)

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    def connect(self) -> None:
        for address in self.addresses:
            try:
                raw = socket.create_connection((address, self.port), CONNECT_SECONDS)
                break
            except OSError as error:
                failure = error
        else:
            raise failure
        # The handshake waits until the timer can see the socket.
        self.wire = _tls().wrap_socket(raw, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = self.wire
        self.wire.do_handshake()

    def get(self, target: str) -> http.client.HTTPResponse:
        headers = {"User-Agent": "wallaroo-batch", "Accept": "*/*", "Accept-Encoding": "identity"}
        try:
            self.request("GET", target, headers=headers)
            self.answer = self.getresponse()
            return self.answer
        except ssl.SSLCertVerificationError as error:
            reason = error.verify_message
            raise RowError("image", f"The certificate of {self.host} is not valid ({reason}).") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(self.failure(error)) from error

    def failure(self, error: Exception | None = None) -> str:
        if self.late:
            return f"{self.host} took too long"
        return f"{self.host} does not send all of it" + (f" ({type(error).__name__})" if error else "")


def _body(answer: http.client.HTTPResponse, name: str, most: int, connection: _Connection) -> bytes:
    if answer.status in _TRY_AGAIN or answer.status >= 500:
        raise Unavailable(f"{connection.host} answers with status {answer.status}")
    if answer.status != 200:
        raise RowError("image", f"{name} cannot be read, its host answers with status {answer.status}.")
    length = answer.length
    data = bytearray()
    try:
        while len(data) <= most and (length is None or length <= most):
            chunk = answer.read1(CHUNK_BYTES)
            if not chunk:
                break
            data += chunk
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(connection.failure(error)) from error
    if len(data) > most or (length or 0) > most:
        raise RowError("image", f"{name} has more than the allowed {most:,} bytes: make it smaller.")
    # A connection cut by the timer looks like one closed by the host.
    if connection.late or (length is not None and len(data) < length):
        raise Unavailable(connection.failure())
    return bytes(data)
