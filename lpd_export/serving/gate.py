"""What every request passes: its key, its size, its time; and the headers of every answer.

Knows HTTP alone. In front of the application, so that nothing is read of who may not ask.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lpd_export.serving.refusals import RefusedError

MOST_BYTES = 32 * 2**20
"""Of a body: a picture and its mask."""
MOST_JSON_BYTES = 64 * 2**10
BODY_SECONDS = 60
"""In which a body must be here."""
GUARDED = ("/v1/", "/metrics")
FRAMED = "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    f"connect-src 'self'; {FRAMED}"
)
DOCS_POLICY = PAGE_POLICY.replace("-src 'self'; st", "-src 'self' 'unsafe-inline'; st").replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)
"""Of the API's documentation, whose page has a script in it."""


class Gate:
    """ASGI in front of the application.

    Args:
        app: what is behind.
        keys: of which one must be given, if there are any.
        on_refusal: told each refusal of the gate.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: frozenset[bytes],
        on_refusal: Callable[[RefusedError], None],
    ) -> None:
        self._app, self._keys, self._on_refusal = app, keys, on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                policy = DOCS_POLICY if scope["path"].startswith("/docs") else PAGE_POLICY
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", policy.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, limited(receive, most_bytes(headers)), send_with_headers)
        except RefusedError as refused:
            self._on_refusal(refused)
            if begun:
                raise
            await refused.response()(scope, receive, send_with_headers)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises RefusedError unless this may be asked from here."""
        if headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] != "GET":
            raise RefusedError(403, "another site's page may not use this server")
        if self._keys and scope["path"].startswith(GUARDED):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            fits = [hmac.compare_digest(given.strip(), key) for key in self._keys]
            if scheme.lower() != b"bearer" or not any(fits):
                raise RefusedError(
                    401,
                    "this server wants one of its API keys, as Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        limit = most_bytes(headers)
        if not length.isdigit() or int(length[:20]) > limit:
            raise too_large(limit)


def most_bytes(headers: dict[bytes, bytes]) -> int:
    """How large a body of this type may be."""
    form = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
    return MOST_BYTES if form else MOST_JSON_BYTES


def too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"the body is too large: it may have {limit} bytes")


def limited(receive: Receive, most: int) -> Receive:
    """`receive`, but for bodies that are larger or slower than they may be."""
    size, whole = 0, False
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive_limited() -> Message:
        nonlocal size, whole
        if whole:  # only that the client leaves is left to come
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise RefusedError(408, f"the body did not come in {BODY_SECONDS} s") from None
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > most:
            raise too_large(most)
        return message

    return receive_limited
