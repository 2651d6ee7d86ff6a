"""The page at `/`: static files of this package, and nothing else.

Its paths need no key (the page asks for one and sends it to the API), so each is an exact name known at start: no path
from a request reaches the disk. The content security policy lets the page load nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

STATIC = Path(__file__).with_name("static")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}
_HEADERS = {
    "cache-control": "no-cache",  # kept, and asked for again by its ETag
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class _File:
    body: bytes
    headers: dict[str, str]


def _files() -> dict[str, _File]:
    """URL path -> file."""
    found = {}
    for path in sorted(STATIC.rglob("*")):
        if path.suffix not in _TYPES:
            continue
        body = path.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
        url = f"/static/{path.relative_to(STATIC).as_posix()}"
        found[url] = _File(body, {**_HEADERS, "content-type": _TYPES[path.suffix], "etag": etag})
    found["/"] = found["/static/index.html"]
    return found


_FILES = _files()

#: Paths that are the page's, and need no key.
PATHS = frozenset(_FILES)


def add_page(app: FastAPI) -> None:
    """Route the page's files."""
    for path in _FILES:
        app.add_api_route(path, _show, methods=["GET", "HEAD"], include_in_schema=False)


async def _show(request: Request) -> Response:
    file = _FILES[request.scope["route"].path]
    if request.headers.get("if-none-match") == file.headers["etag"]:
        return Response(status_code=304, headers=file.headers)
    return Response(file.body, headers=file.headers)
