"""The page at `/`: four files of this package, and nothing from anywhere else."""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.routing import Route

from tokenwire.gateway.asgi import Receive, Scope, Send, header, respond

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

# The page's own files and calls alone.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageFile:
    def __init__(self, name: str, content_type: str) -> None:
        self._content = resources.files("tokenwire.gateway").joinpath("page").joinpath(name).read_bytes()
        self._content_type = content_type
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:16]}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        extra = {"cache-control": "no-cache", "etag": self._tag, "content-security-policy": _POLICY}
        if header(scope, b"if-none-match") == self._tag:
            await respond(send, 304, b"", self._content_type, extra)
            return
        content = b"" if scope["method"] == "HEAD" else self._content
        await respond(send, 200, content, self._content_type, extra)


def page_routes() -> list[Route]:
    return [Route(path, PageFile(*file), methods=["GET"]) for path, file in FILES.items()]
