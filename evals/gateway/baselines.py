"""What the gateway is compared with: the least that FastAPI and a client can do. Bytes in, bytes out; no routing, no
checks, no metrics. ``python -m evals.gateway.baselines --client aiohttp --port 8001 --upstream 8000``.
"""

import argparse
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

JSON = {"content-type": "application/json"}


def aiohttp_app(url: str) -> FastAPI:
    import aiohttp

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def forward(request: Request) -> Response:
        upstream = await app.state.session.post(url, data=await request.body(), headers=JSON)
        if upstream.content_type == "text/event-stream":
            return StreamingResponse(upstream.content.iter_any(), media_type="text/event-stream")
        return Response(await upstream.read(), media_type="application/json")

    return app


def httpx_app(url: str) -> FastAPI:
    import httpx

    return _httpx_app(url, httpx.AsyncHTTPTransport)


def httpx_aiohttp_app(url: str) -> FastAPI:
    from httpx_aiohttp import AiohttpTransport  # type: ignore[import-not-found]  # measured where it is installed

    return _httpx_app(url, AiohttpTransport)


def _httpx_app(url: str, transport: Callable[[], Any]) -> FastAPI:
    import httpx

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with httpx.AsyncClient(transport=transport(), timeout=60) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def forward(request: Request) -> Response:
        client = app.state.client
        asked = client.build_request("POST", url, content=await request.body(), headers=JSON)
        upstream = await client.send(asked, stream=True)
        if upstream.headers["content-type"].startswith("text/event-stream"):
            return StreamingResponse(upstream.aiter_raw(), media_type="text/event-stream")
        return Response(await upstream.aread(), media_type="application/json")

    return app


CLIENTS: dict[str, Callable[[str], FastAPI]] = {
    "aiohttp": aiohttp_app,
    "httpx": httpx_app,
    "httpx-aiohttp": httpx_aiohttp_app,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", choices=CLIENTS, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", type=int, required=True)
    args = parser.parse_args()
    app = CLIENTS[args.client](f"http://127.0.0.1:{args.upstream}/v1/chat/completions")
    uvicorn.run(app, port=args.port, loop="uvloop", http="httptools", access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
