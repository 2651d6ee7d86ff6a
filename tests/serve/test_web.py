"""The page's files at the real server: open without a key, cached, and nothing else of the disk."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

import httpx
import pytest
from harness import Running
from llmx.serve.web import PATHS


def test_the_page_needs_no_key_and_everything_else_does(serving: Callable[..., Running]) -> None:
    server = serving(api_key=["sesame"])
    with httpx.Client(base_url=server.url) as client:
        for path in PATHS:
            answer = client.get(path)
            assert answer.status_code == 200 and answer.content, path
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert client.get(path, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
            assert client.head(path).status_code == 200
            assert client.post(path, json={}).status_code == 405
        for path in ("/metrics", "/v1/models", "/docs", "/static", "/static/", "/static/js", "/static/js/none.js"):
            assert client.get(path).status_code == 401, path


def test_the_apis_description_is_drawn_with_the_servers_own_files(served: Running) -> None:
    answer = served.http.get("/docs")
    assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    named = re.findall(r"""(?:src|href|url)[=:] ?["']([^"']+)["']""", answer.text)
    assert len(named) == 4 and "//" not in "".join(named)
    for url in named:
        assert served.http.get(url).status_code == 200, url


@pytest.mark.parametrize(
    "path",
    [
        "/static/../web.py", "/static/%2e%2e/web.py", "/static/js/..%2f..%2f..%2fweb.py", "/static//etc/passwd",
        "/static/js/main.js/../../../../pyproject.toml", "/static/js/main.js%00.txt", "/static/....//web.py", "/..%5cweb.py",
    ],
)  # fmt: skip
def test_paths_reach_nothing_else(served: Running, path: str) -> None:
    with socket.create_connection(served.address) as sock:  # a client would tidy the path
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    assert answer.split(b" ", 2)[1] in (b"404", b"400"), answer[:200]
    assert b"import" not in answer and b"root:" not in answer
