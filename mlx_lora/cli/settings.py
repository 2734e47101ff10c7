"""settings: what a recipe may set, as a list; and the commands that take such settings under familiar names."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mlx_lora import ui
from mlx_lora.cli.options import Json
from mlx_lora.errors import RecipeError, nearest

if TYPE_CHECKING:
    from mlx_lora.settings import Setting


def register(app: typer.Typer) -> None:
    app.command()(settings)


def settings(
    word: Annotated[str | None, typer.Argument(metavar="[WORD]", help="Only settings whose name has this.")] = None,
    json: Json = False,
) -> None:
    """List what a recipe or key=value may set: default, allowed values, meaning."""
    from mlx_lora.settings import FAMILIAR, dotted_keys, matching
    from mlx_lora.settings import settings as all_settings

    chosen = matching(word) if word else all_settings()
    if not chosen:
        known = {key.rpartition(".")[2] for key in dotted_keys()} | FAMILIAR.keys()
        raise RecipeError(f"no setting {word!r}{nearest(str(word), known)}", hint="mlx-lora settings lists them")
    if json:
        ui.as_json([asdict(setting) for setting in chosen])
    else:
        rows = [(setting.key, _default(setting), setting.allowed, setting.meaning) for setting in chosen]
        ui.table(["setting", "default", "allowed", "meaning"], rows)


def _default(setting: Setting) -> str:
    """A default as a recipe would write it."""
    if isinstance(setting.default, dict):
        return "{" + ", ".join(f"{key}: {value}" for key, value in setting.default.items()) + "}"
    return setting.default if isinstance(setting.default, str) else json_module.dumps(setting.default)


class RecipeCommand(TyperCommand):
    """A command that takes `key=value` words, also as options: `--lr 1e-4` is `train.learning_rate=1e-4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._as_overrides(args))

    def _as_overrides(self, words: list[str]) -> list[str]:
        """`words` with each option that the command doesn't have, but a recipe does, as `key=value` at the end."""
        own = {name: option for option in self.params for name in option.opts}
        left, kept, overrides = list(words), list[str](), list[str]()
        while left:
            word = left.pop(0)
            name, equals, value = word.partition("=")
            if word == "--":
                return [*kept, *overrides, word, *left]
            if name in own:
                takes_next = not equals and not getattr(own[name], "is_flag", False)
                kept += [word, *left[:1]] if takes_next else [word]
                left = left[1:] if takes_next else left
            elif not name.startswith("--") or name == "--help":
                kept.append(word)
            elif override := _override(name, value if equals else left[0] if left else None):
                overrides.append(override)
                left = left if equals else left[1:]
            else:
                kept.append(word)
        return [*kept, *overrides]


class TrainCommand(RecipeCommand):
    """Its help ends with every setting."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from mlx_lora.settings import settings as all_settings

        with formatter.section("Settings, as key=value or --name value (mlx-lora settings shows what each allows)"):
            formatter.write_dl([(f"{each.key}={_default(each)}", each.meaning) for each in all_settings()])


def _override(option: str, value: str | None) -> str | None:
    """`train.learning_rate=1e-4` for `--lr` and `1e-4`; None where no setting has such a name."""
    from mlx_lora.settings import full_key

    name = option.removeprefix("--")
    key = name if "." in name else full_key(name)
    if key is None:
        return None
    if value is None:
        raise typer.BadParameter(f"{option} needs a value: {key}=…")
    if key != name:
        ui.note(f"{option} {value}: {key}={value}")
    return f"{key}={value}"
