"""Serve the page on this machine: no telemetry, no request to another host, one line where a port is taken."""

import os
import socket
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from modiff.errors import ConfigError
from modiff.web.jobs import Jobs
from modiff.web.models import Models

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; frame-ancestors 'none'"
)
HEADERS = [
    ("content-security-policy", POLICY),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
]
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
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, headers=HEADERS)
        bound = listener.getsockname()[1]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{bound}")
        uvicorn.Server(config).run(sockets=[listener])
        raise KeyboardInterrupt  # the server returns at Ctrl-C alone; asyncio may have swallowed the exception


def application(models: Models, jobs: Jobs, folder: Path, host: str) -> Any:
    """The ASGI application. folder: where files to download are kept."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from modiff.web.app import Page

    blocks = Page(models, jobs, folder).blocks.queue(max_size=64, api_open=False)
    theme = gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="ui-monospace")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:  # a page of another site that points its name at this machine is refused
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    css = files("modiff.web").joinpath("page.css").read_text(encoding="utf-8")
    return gr.mount_gradio_app(app, blocks, path="/", css=css, theme=theme, footer_links=[], ssr_mode=False,
                               show_error=True, max_file_size="1kb", enable_monitoring=False, pwa=False,
                               mcp_server=False, server_name=host)  # fmt: skip


def listening(host: str, port: int) -> socket.socket:
    """A socket that has the port. Raises: ConfigError if it cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"port: expected one that is free on {host}, got {port} ({reason}). Another program has it, "
                          "or it may not be used. Use port=0 for any.") from error  # fmt: skip
