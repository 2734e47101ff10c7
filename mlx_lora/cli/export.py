"""export: base and adapter, as files that other programs load."""

from __future__ import annotations

import typer

from mlx_lora.cli import export_gguf, export_hf, export_lmstudio, export_ollama

app = typer.Typer(help="Export for other programs.", no_args_is_help=True, rich_markup_mode=None)
for command in (export_gguf, export_hf, export_ollama, export_lmstudio):
    command.register(app)
