"""The page at `/`, and Swagger UI at `/docs`: static files, and nothing else.

The page's paths need no key (the page asks for one and sends it to the API), so each is an exact name known at start: no path
from a request reaches the disk. The content security policy lets the page load nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
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


def _file(body: bytes, suffix: str, more: dict[str, str] | None = None) -> _File:
    etag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    return _File(body, {**_HEADERS, "content-type": _TYPES[suffix], "etag": etag, **(more or {})})


def _swagger() -> dict[str, _File]:
    """URL path -> file of Swagger UI."""
    folder = files("fastapi_offline") / "static"
    names = ("swagger-ui-bundle.js", "swagger-ui.css")
    return {f"/docs/{name}": _file((folder / name).read_bytes(), Path(name).suffix) for name in names}


def _files() -> dict[str, _File]:
    """URL path -> file."""
    found = {}
    for path in sorted(STATIC.rglob("*")):
        if path.suffix not in _TYPES:
            continue
        found[f"/static/{path.relative_to(STATIC).as_posix()}"] = _file(path.read_bytes(), path.suffix)
    found["/"] = found["/static/index.html"]
    return found


_FILES, _DOCS = _files(), _swagger()

#: Paths that are the page's, and need no key.
PATHS = frozenset(_FILES)


def add_page(app: FastAPI) -> None:
    """Route the page's files."""
    for path in _FILES:
        app.add_api_route(path, _show, methods=["GET", "HEAD"], include_in_schema=False)


def add_docs(app: FastAPI) -> None:
    """Swagger UI of `/openapi.json` at `/docs`. FastAPI's own page would load it from a CDN; these files are
    fastapi-offline's, and need a key as the API does.
    """
    html = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{app.title}: the API",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="static/icon.svg",
    ).body
    scripts = re.findall(rb"<script>(.*?)</script>", bytes(html), re.DOTALL)
    hashes = " ".join(f"'sha256-{b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    policy = _HEADERS["content-security-policy"].replace("script-src 'self'", f"script-src 'self' {hashes}")
    policy = policy.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger UI draws with them
    _DOCS["/docs"] = _file(bytes(html), ".html", {"content-security-policy": policy})
    for path in _DOCS:
        app.add_api_route(path, _show, methods=["GET", "HEAD"], include_in_schema=False)


async def _show(request: Request) -> Response:
    path = request.scope["route"].path
    file = _FILES.get(path) or _DOCS[path]
    if request.headers.get("if-none-match") == file.headers["etag"]:
        return Response(status_code=304, headers=file.headers)
    return Response(file.body, headers=file.headers)
