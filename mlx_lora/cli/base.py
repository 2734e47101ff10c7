"""pull, import-gguf, quantize and fuse: what makes model directories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.models import show_models
from mlx_lora.cli.options import Bits, Force, Json, Model, NewModel, Out, new_model, progress
from mlx_lora.methods import MODES

Mode = StrEnum("Mode", {mode: mode for mode in MODES})  # type: ignore[misc]
Dtype = StrEnum("Dtype", ["keep", "float16", "float32"])
PACK = "Quantize again in 2, 3, 4, 5, 6 or 8 bits what MLX can't hold as it is, such as Q6_K; otherwise it is float16."
ZeroPoints = StrEnum("ZeroPoints", ["float32"])


def register(app: typer.Typer) -> None:
    app.command()(pull)
    app.command("import-gguf")(import_gguf)
    app.command()(quantize)
    app.command()(fuse)


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Like mlx-community/Qwen3-0.6B-4bit.")],
    name: Annotated[str | None, typer.Option("--name", help="Its name here; the repository's own by default.")] = None,
) -> None:
    """Download a base model. The only command that uses the network; run it again to continue."""
    from mlx_lora.models.pull import pull as download

    ui.result(str(download(repo, name=name)))


def import_gguf(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="A GGUF file, any part of a split one, or a name of --list.")
    ] = None,
    out: Out = None,
    name: NewModel = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="keep leaves packed what MLX can hold.")] = Dtype.keep,
    pack: Annotated[int | None, typer.Option("--pack", metavar="BITS", help=PACK)] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the GGUF files that other programs keep here.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a model directory from a GGUF file on disk.

    Architectures: llama (Mistral and SmolLM too), qwen2, qwen3, qwen3moe, gemma2, gemma3, phi3, granite, lfm2, gpt-oss.
    """
    from mlx_lora.places import found, listing

    if listed:
        return show_models(kind=found.GGUF, json=json)
    if file is None:
        raise typer.BadParameter("name a GGUF file, or --list those that are on this disk")
    out = new_model(out, name)
    source = listing.gguf_file(file)

    from mlx_lora.models.gguf import import_gguf as convert

    with ExitStack() as stack:
        bars = progress(stack)
        advance = None

        def count(done: int, total: int) -> None:
            nonlocal advance
            advance = advance or bars("importing", total)
            advance()

        report = convert(source, out, dtype=str(dtype), pack_bits=pack, force=force, on_progress=count)
    if json:
        ui.as_json(report)
    else:
        changed = ", ".join(f"{kind} {error:.1e}" for kind, error in report["errors"].items())
        for note in [*([f"relative error by type of tensor: {changed}"] if changed else []), *report["notes"]]:
            ui.note(note)
        ui.result(f"{out}: {report['architecture']}, {ui.size(report['bytes'])}")


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or name.")],
    out: Out = None,
    name: NewModel = None,
    mode: Annotated[Mode, typer.Option("--mode", help="The number format; mlx_lm has no nf4.")] = Mode.affine,  # type: ignore[attr-defined]
    bits: Annotated[int | None, typer.Option("--bits", help="Bits per weight; the mode's own by default.")] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", help="Weights that share a scale.")] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4: quantize the scales as well.")] = False,
    verify: Annotated[
        str | None, typer.Option("--verify", help="Rows to measure on, in place of a text of ours; none: don't.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Quantize a model directory, and say what it cost."""
    from mlx_lora.recipe import load_recipe
    from mlx_lora.tasks.quantize import quantize_model

    out = new_model(out, name)
    settings = {
        "quantize.mode": str(mode),
        "quantize.bits": bits,
        "quantize.group_size": group_size,
        "quantize.double_quant": double_quant,
    }
    chosen = load_recipe(None, settings=settings, where="mlx-lora quantize").quantize
    assert chosen is not None
    with ExitStack() as stack:
        bars = progress(stack)
        report = quantize_model(model, out, chosen, verify=verify, force=force, warn=ui.warning, progress=bars)
    if json:
        ui.as_json(report)
        return
    ui.result(f"{out}: {report['bits_per_weight']:.2f} bits per weight, {ui.size(report['bytes'])}")
    for line in _carried(report["carried"]):
        ui.result(line)
    if report["kept"]:
        ui.result(f"{len(report['kept'])} layers keep the packing that they come from, without a second loss")
    ui.result(f"relative error of the weights {report['relative_error']:.4f}")
    if "kl" in report:
        ui.result(
            f"KL {report['kl']:.4f} nats, same top token {report['top1_agreement']:.1%}, "
            f"perplexity {report['perplexity_before']:.3f} -> {report['perplexity_after']:.3f}"
        )


def fuse(
    adapter: Annotated[str, typer.Option("--adapter", help="A name in the home, or a directory like ./mine.")],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.")],
    model: Model = None,
    bits: Annotated[Bits | None, typer.Option("--bits", help="mixed: touched layers at 8 bits or more.")] = None,
    zero_points: Annotated[
        ZeroPoints | None,
        typer.Option("--zero-points", help="For a QA-LoRA adapter that was trained without rounding."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Measure on these rows instead of generated text.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Merge an adapter into its base, and measure whether it survived."""
    from mlx_lora.tasks.fuse import fuse_adapter

    with ExitStack() as stack:
        settings = {
            "bits": None if bits is None else str(bits),
            "zero_points": None if zero_points is None else str(zero_points),
        }
        bars = progress(stack)
        report = fuse_adapter(model, adapter, out, **settings, data=data, force=force, progress=bars).as_dict()
    if json:
        ui.as_json(report)
        return
    ui.result(f"{report['out']}: {report['bits']}, {ui.size(report['bytes'])}")
    for line in _carried(report["carried"]):
        ui.result(line)
    if report["zero_points_bytes"]:
        ui.result(
            f"zero-points and scales in float32 take {ui.size(report['zero_points_bytes'])} more; mlx_lm computes in "
            "float32 from the first of these layers on, so activations and the cache take twice half precision's memory"
        )
    ui.result(
        f"{report['delta_survival']:.1%} of the update survived; against base and adapter: "
        f"KL {report['kl']:.4f} nats, same top token {report['top1_agreement']:.1%}"
    )


def _carried(carried: dict[str, Any]) -> Iterator[str]:
    """What went along with the text model, and what was left out; nothing of a model that is text alone."""
    if carried["files"]:
        yield f"carried along unchanged: {carried['vision']} vision tensors; {', '.join(carried['files'])}"
    if carried["stale"]:
        yield f"left out, stale once the model has changed: {', '.join(carried['stale'])}"
