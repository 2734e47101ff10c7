"""serve: many tasks over HTTP, one base in memory."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapters, Model

if TYPE_CHECKING:
    from mlx_lora.serve.http.access import Access
    from mlx_lora.serve.service import Service


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    model: Model = None,
    adapter: Adapters = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="An API key, else that of MLX_LORA_API_KEY.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A name of this server; repeatable.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option("--allow-origin", metavar="URL", help="Whose pages may ask; repeatable.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for each request, without its text.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print where it listens as a line of JSON.")] = False,
) -> None:
    """Answer OpenAI's API: the base and its adapters, each request naming its own.

    At http://127.0.0.1:8080/ is a page to try them on. Ctrl-C ends the server.
    """
    try:
        from mlx_lora.serve.http import server
    except ImportError as error:
        from mlx_lora.errors import MlxLoraError

        raise MlxLoraError(f"serve needs {error.name}", hint="pip install 'mlx-lora[serve]'") from None

    from mlx_lora.serve.service import open_service

    address = server.address_of(host)
    access = server.access(address, api_key_file, allow_host or [], allow_origin or [])
    with server.bound(address, port) as listening:
        where = server.url(address, listening.getsockname()[1])
        with ExitStack() as stack:
            with ui.working(f"loading {model or 'the base of the adapters'}"):
                # clients see names, never where a directory is
                opened = open_service(model, adapter or [], label=lambda path: path.name)
                service = stack.enter_context(opened)
            ended = server.Server(
                service, listening, access=access,
                on_ready=lambda: _say(service, where, access, json=json),
                on_stop=lambda: ui.note("ending: no more requests are taken, those that run have a few seconds"),
                on_request=ui.note if verbose else lambda line: None,
            ).serve_until_stopped()  # fmt: skip
    if ended is not None:
        signal.raise_signal(ended)


def _say(service: Service, where: str, access: Access, *, json: bool) -> None:
    """Say what is served, and where."""
    names = service.names()
    found: dict[str, Any] = {"url": f"{where}/v1", "page": f"{where}/", "base": service.base, "adapters": names}
    if json:
        return ui.as_json(found)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    ui.result(f"base      {service.base}")
    ui.result(f"adapters  {shown or 'none yet: one that is trained appears by itself'}")
    ui.result(f"API       {where}/v1{'' if access.key is None else ', with the API key'}")
    ui.result(f"page      {where}/")
    ui.note("Ctrl-C ends it")
