"""API keys: every path asks for one, once one is set, but those of `OPEN`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from llmx.serve.errors import ApiError
from starlette.types import ASGIApp, Receive, Scope, Send

#: Paths that need no key, besides the page's static files (web.PATHS). Never an endpoint that reads or runs anything.
OPEN = frozenset({"/health"})


class Keys:
    """ASGI middleware. Keys are compared by their digests, in constant time, all of them whichever fits."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str] = OPEN) -> None:
        self._app, self._open = app, open_paths
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in self._open:
            error = self._refusal(scope)
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        headers = {"www-authenticate": "Bearer"}
        if scheme.lower() != b"bearer" or not key.strip():
            message = "This server asks for an API key; send it as the header Authorization: Bearer KEY."
            return ApiError(401, "invalid_api_key", message, headers=headers)
        digest = _digest(key.strip())
        if sum(hmac.compare_digest(digest, known) for known in self._digests):
            return None
        return ApiError(401, "invalid_api_key", "The API key is not one of this server's.", headers=headers)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
