"""The page at `/`: a handful of files read once, sent with a policy that lets nothing else in."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

SCRIPTS = ("page.js", "compare.js", "adapters.js", "server.js", "parts.js")
"""In the order of the walk: the frame, its two views, and what both stand on."""

HEADERS = {
    "Content-Security-Policy": "; ".join([
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src data:", "base-uri 'none'",
        "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    ]),
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}  # fmt: skip
"""The browser runs the page's own scripts, talks to this server alone, and shows the page in no other's frame."""


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    path: str
    """Where the server has it."""
    media_type: str
    content: bytes

    @property
    def etag(self) -> str:
        """Name its content, so that a browser asks again and is told that nothing changed."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


def page_files() -> list[PageFile]:
    """Read the page from the installed package."""
    folder = files("lora_tune.serving") / "page"
    named = [("/", "index.html", "text/html"), ("/page/page.css", "page.css", "text/css")]
    named += [(f"/page/{name}", name, "text/javascript") for name in SCRIPTS]
    return [PageFile(path, f"{kind}; charset=utf-8", (folder / name).read_bytes()) for path, name, kind in named]


def page_routes() -> list[Route]:
    """Return a GET route for each file: the same bytes for everyone, no keys, nothing of the server's state."""
    return [Route(file.path, _sending(file), methods=["GET"], include_in_schema=False) for file in page_files()]


def _sending(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    headers = {**HEADERS, "ETag": file.etag}

    async def send(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if file.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return send
