"""The playground: the files of a page that asks this server's own HTTP API, from the folder `page` beside this one."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

FOLDER = pathlib.Path(__file__).with_name("page")
PREFIX = "/page/"
"""Path under which the page's files lie; the page itself is at /."""
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_PACKED = {".png"}
"""Kinds of files that gzip does not make smaller."""
SECURITY = {
    # Scripts and styles of this server's files alone; no text of a model can become markup (trusted types), and no
    # other site's page can show this one in a frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file of the page, as it is sent."""

    body: bytes
    gzipped: bytes | None
    """The body packed; None where that would be no smaller."""
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: pathlib.Path) -> Asset:
        body = path.read_bytes()
        gzipped = None if path.suffix in _PACKED else gzip.compress(body, mtime=0)
        # Weak: packed and plain have the same.
        etag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
        return cls(body=body, gzipped=gzipped, media_type=_TYPES[path.suffix], etag=etag)

    def respond(self, request: Request) -> Response:
        """The file, or 304 to a browser that has it: it asks each time, so an upgrade never mixes old and new files."""
        headers = {**SECURITY, "cache-control": "no-cache", "etag": self.etag, "vary": "accept-encoding"}
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        if self.gzipped is None or "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.body, media_type=self.media_type, headers=headers)
        return Response(self.gzipped, media_type=self.media_type, headers={**headers, "content-encoding": "gzip"})


def assets() -> Mapping[str, Asset]:
    """The page's files by the path of their URL; the page itself by the empty one, which is / without its slash."""
    files = {PREFIX + path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.suffix in _TYPES}
    found = {url: Asset.read(path) for url, path in files.items()}
    return {"": found.pop(f"{PREFIX}index.html"), **found}
