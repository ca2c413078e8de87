"""What the demo's server takes in: what a browser sends from the page."""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


MAX_BYTES = 100_000  # of a request; the longest query is far shorter


class PageRequests:
    """
    Middleware that refuses what no browser sends from the page, before Gradio fails on it with a traceback.

    Args:
        app: The application.
        searches: Indexes of the functions that may be called.
    """

    def __init__(self, app: ASGIApp, searches: set[int]):
        self.app, self.searches = app, searches

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] != "POST":
            return await self._read(scope, receive, send)
        body = b""
        if Headers(scope=scope).get("content-length", "").isdecimal():
            if int(Headers(scope=scope)["content-length"]) <= MAX_BYTES:
                body = await Request(scope, receive).body()
        path = scope["path"]
        if not (
            path.endswith("/queue/join") and self._is_search(body) or path.endswith("/gradio_api/cancel") and body
        ):
            return await self._refuse(scope, receive, send)

        async def replay() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "/gradio_api/call/" in scope["path"]:
            return await self._refuse(scope, receive, send)
        try:
            await self.app(scope, receive, send)
        except RuntimeError:
            # Of a session that is not known, such as one from before a restart, Gradio says so and then fails.
            if not scope["path"].endswith("/queue/data"):
                raise
            await send({"type": "http.response.body", "body": b""})

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({"detail": "This page takes queries only."}, 400)(scope, receive, send)

    def _is_search(self, body: bytes) -> bool:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return False
        if not isinstance(content, dict) or content.get("fn_index") not in self.searches:
            return False
        data = content.get("data")
        return isinstance(data, list) and len(data) == 1 and (data[0] is None or isinstance(data[0], str))
