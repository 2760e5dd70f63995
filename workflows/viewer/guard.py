"""Which requests are answered, and the security headers of every answer.

- The Host header must be a loopback name, against DNS rebinding.
- Requests from other sites are refused by Sec-Fetch-Site, except links to a page.
- A write must have an Origin of the viewer itself.
- A viewer that other machines can reach requires a token.

Knows nothing of pages.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
COOKIE = "wallaroo-view"

POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer, with which browsers say `Origin: null` of our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def guard(app: Any, hosts: Sequence[str] | None, token: str | None) -> Any:
    """Wraps an ASGI application so that only allowed requests reach it.

    Args:
        app: The application.
        hosts: Names that the Host header may have, None for any.
        token: What the address or the cookie must hold, None for no token.

    Returns:
        The guarded ASGI application.
    """

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        request = Request(scope)
        answer = _refusal(request, hosts, token)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                named = {name.lower() for name, _ in message["headers"]}
                for name, value in HEADERS.items():
                    if name.lower().encode() not in named:
                        message["headers"].append((name.lower().encode(), value.encode()))
            await send(message)

        await (answer or app)(scope, receive, with_headers)

    return guarded


def _refusal(request: Request, hosts: Sequence[str] | None, token: str | None) -> Response | None:
    host = request.headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if hosts is not None and name.lower() not in hosts:
        return _plain(421, f"The viewer answers as {' or '.join(dict.fromkeys(hosts))} only.")
    site = request.headers.get("sec-fetch-site", "none")
    navigation = request.headers.get("sec-fetch-mode") == "navigate" and request.method == "GET"
    if site not in ("none", "same-origin") and not navigation:
        return _plain(403, "Pages of other sites may not read the viewer.")
    own = request.headers.get("origin") in (f"http://{host}", f"https://{host}")
    if request.method not in ("GET", "HEAD") and not own:
        return _plain(403, "Votes come from pages of the viewer itself only.")
    if token is None:
        return None
    given = request.query_params.get("token")
    if given is not None and secrets.compare_digest(given.encode(), token.encode()):
        rest = URL(scope=request.scope).remove_query_params("token")
        path = "/" + rest.path.lstrip("/")
        answer = RedirectResponse(f"{path}?{rest.query}" if rest.query else path, 303)
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return answer
    if secrets.compare_digest(request.cookies.get(COOKIE, "").encode(), token.encode()):
        return None
    return _plain(403, "The address lacks its token: open the whole address that the command printed.")


def _plain(status: int, words: str) -> Response:
    return Response(words + "\n", status, media_type="text/plain; charset=utf-8")
