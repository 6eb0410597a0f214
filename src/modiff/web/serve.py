"""Serve the page on this machine: no telemetry, no request to another host, one line where a port is taken."""

import os
import socket
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from modiff.config import check
from modiff.errors import ConfigError
from modiff.web.jobs import Jobs
from modiff.web.models import Models

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "frame-ancestors 'none'; form-action 'self'"
)
"""What a browser may load for the page: nothing from another host, whatever a library asks for."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    root: Path, open_model: Callable[[str], DiffusionPipeline], *, host: str = "127.0.0.1", port: int = 7860,
    ready: Callable[[str], object] = lambda url: None,
) -> None:  # fmt: skip
    """Serve until Ctrl-C, which raises KeyboardInterrupt.

    Args:
        root: nothing outside of it is read. ready: called with the address once the port is ours; port 0 is any.
    Raises: ConfigError for a root that is no folder, or a port that cannot be had.
    """
    models = Models(root, open_model)
    with listening(host, port) as listener, tempfile.TemporaryDirectory(prefix="modiff-ui-") as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1",
                          HF_HUB_DISABLE_TELEMETRY="1")  # fmt: skip
        import uvicorn  # these read the environment

        app = application(models, Jobs(), Path(folder), host)
        config = uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=1)
        bound = listener.getsockname()[1]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{bound}")
        uvicorn.Server(config).run(sockets=[listener])


def application(models: Models, jobs: Jobs, folder: Path, host: str) -> Any:
    """The ASGI application. folder: where files to download are kept."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from modiff.web.app import Page, build

    blocks = build(Page(models, jobs, folder)).queue(max_size=64, api_open=False)
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:  # a page of another site that points its name at this machine is refused
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    app.add_middleware(_Policy)
    css = files("modiff.web").joinpath("page.css").read_text(encoding="utf-8")
    return gr.mount_gradio_app(app, blocks, path="/", css=css, theme=theme, footer_links=[], ssr_mode=False,
                               show_error=True, max_file_size="1kb", enable_monitoring=False, pwa=False,
                               mcp_server=False, server_name=host)  # fmt: skip


class _Policy:
    """ASGI middleware that adds POLICY to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = {b"content-security-policy": POLICY.encode(), b"referrer-policy": b"no-referrer",
                        b"x-content-type-options": b"nosniff"}  # fmt: skip
                message = message | {"headers": [*message["headers"], *more.items()]}
            await send(message)

        await self.app(scope, receive, add if scope["type"] == "http" else send)


def listening(host: str, port: int) -> socket.socket:
    """A socket that has the port. Raises: ConfigError if it cannot be had."""
    check("port", port, 0 <= port < 2**16, "0 to 65535", "0 is any that is free. Use port=7860.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"port: expected one that is free on {host}, got {port} ({reason}). Another program has it, or "
                          "it may not be used. Use port=0 for any.") from error  # fmt: skip
    return listener
