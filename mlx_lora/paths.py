"""Where things are on disk: the home directory, names inside it, and the files that come with the package.

Knows names and directories only; what is inside an adapter is `store`'s business, inside a model `models`'.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lora import files, ui
from mlx_lora.errors import MlxLoraError, NameTaken

# The folders that come with the package.
SHIPPED = ("data", "recipes")
# Files that tell a directory made by this package, or by another tool for the same purpose, from anything else.
MARKS = ("config.json", "adapter_config.json", "training.json", "verdict.json", "Modelfile")
# Names that devices have on the systems that a disk may be carried to, whatever ending follows.
DEVICES = re.compile(r"(?i:aux|con|nul|prn|com[0-9]|lpt[0-9])(?:\.|$)")
MOST_NAME_BYTES = 128
# Scripts with letters that look the same.
ALIKE = {"LATIN", "CYRILLIC", "GREEK"}
OTHER_HOME = "MLX_LORA_HOME names another directory for models, adapters and runs"


def home() -> Path:
    """`$MLX_LORA_HOME` or `~/.mlx-lora`, made private (mode 0700) and kept out of backups at first use.

    Raises MlxLoraError, saying what is wrong with the path, where it can't be made.
    """
    root = _home()
    if not root.is_dir():
        try:
            root.mkdir(parents=True, mode=0o700, exist_ok=True)  # another process may just have made it
        except OSError as error:
            raise MlxLoraError(
                f"the home {root} can't be made: {_obstacle(root) or error.strerror}",
                hint=OTHER_HOME,
            ) from None
        exclude_from_backups(root)
    return root


def unusable(fault: OSError) -> MlxLoraError:
    """What the system says of a file or a directory, as an error for people."""
    file = str(fault.filename or "")
    in_home = file and Path(file).absolute().is_relative_to(_home().absolute())
    said = f"{file}: {fault.strerror}" if file and fault.strerror else str(fault) or type(fault).__name__
    return MlxLoraError(said, hint=OTHER_HOME if in_home else "--debug shows where")


def _obstacle(path: Path) -> str | None:
    """The part of a path that keeps a directory from being made there, or None where that isn't to be seen."""
    for part in (path, *path.parents):
        if os.path.lexists(part):
            if not part.is_dir():
                return f"{part} is not a directory"
            return None if os.access(part, os.W_OK | os.X_OK) else f"{part} can't be written to"
    return None


def _home() -> Path:
    return Path(os.path.expanduser(os.environ.get("MLX_LORA_HOME") or "~/.mlx-lora"))


def is_name(word: str) -> bool:
    """Whether a word may name an entry of the home.

    A name has letters of any script with their accents, digits, `_`, and not first also `.` and `-`, which would make a
    hidden file or an option. It is normalised and short, because file systems write accents differently and count a
    name's length in bytes. Letters that only look like others are none: full-width ones (NFKC), nor those of two
    scripts that look alike in one name. Upper and lower case are told apart only where the file system does: usually
    not on macOS, where a name that differs in case alone is taken.
    """
    kinds = [unicodedata.category(character)[0] for character in word]
    allowed = all(kind in "LMN" or character in "._-" for kind, character in zip(kinds, word, strict=True))
    ends = bool(word) and (kinds[0] in "LN" or word[0] == "_") and not word.endswith(".")
    short = len(word.encode(errors="replace")) <= MOST_NAME_BYTES
    alike = {unicodedata.name(character, "").partition(" ")[0] for character in word} & ALIKE
    one_text = unicodedata.normalize("NFKC", word) == word and len(alike) <= 1
    return allowed and ends and short and one_text and not DEVICES.match(word)


def check_name(name: str) -> str:
    """`name`, normalised (NFC), where it is one. Raises MlxLoraError, proposing one where there is one close to it."""
    normal = unicodedata.normalize("NFC", name)
    if is_name(normal):
        return normal
    hint = f"a name has letters, digits, '.', '_' and '-', at most {MOST_NAME_BYTES} bytes; first a letter or a digit"
    proposed = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFKC", normal)).strip(".-")
    if is_name(proposed):
        hint = f"{proposed} would be one; {hint}"
    raise MlxLoraError(f"{name[:140]!r} is not a name", hint=hint)


def is_path(word: str) -> bool:
    """Whether a word for a model or an adapter can only be a path: it has a separator, or begins with `.` or `~`."""
    return os.sep in word or word.startswith((".", "~"))


def find(kind: str, word: str) -> Path | None:
    """What a word stands for where a model (`models`) or an adapter (`adapters`) is asked for, or None.

    One rule for both. A word with a separator, or that begins with `.` or `~`, is a path and nothing else. Any other
    word is a name in the home. Only where the home has none of that name is it a file or directory here. So `base` is
    the home's, whatever lies in the working directory, and `./base` is the one that lies there.
    """
    normal = unicodedata.normalize("NFC", word)
    if not is_path(word) and is_name(normal) and room(kind, normal).is_dir():
        return room(kind, normal)
    return existing(word) if word else None


def room(kind: str, name: str) -> Path:
    """The directory of a `models`, `adapters` or `runs` entry called `name`; it need not exist.

    Raises MlxLoraError for what is no name, and for a link that leads out of the home: a name never does.
    """
    path = home() / kind / check_name(name)
    if not files.inside(path, home()):
        raise MlxLoraError(f"{path} leads out of the home", hint="name the directory it leads to instead")
    return path


def bundled(*parts: str) -> Path:
    """A file that comes with the project: from the clone's own folders, or from inside an installed wheel."""
    package = Path(__file__).parent
    for root in (package / "_bundled", package.parent):
        if (root / "data" / "base").is_dir():
            return root.joinpath(*parts)
    raise MlxLoraError("the example data that comes with mlx-lora is missing", hint="reinstall the package")


def existing(path: str | Path) -> Path | None:
    """`path` if it exists; else, for a relative path, the file of that name that comes with the project; else None."""
    path = Path(os.path.expanduser(path))
    if os.path.exists(path):  # unlike Path.exists, False for what is too long to be a name
        return path
    if path.parts[0] not in SHIPPED or ".." in path.parts:
        return None
    shipped = bundled(*path.parts)
    return shipped if shipped.exists() else None


@contextmanager
def written_whole(target: Path, *, force: bool = False, needs: int = 0) -> Iterator[Path]:
    """Yield a temporary directory beside `target` that takes its place by rename, only if the block succeeds.

    Everything in it is on the disk before the rename, and the rename before this returns; inside the home, only the
    user can read it. Raises NameTaken when `target` exists and `force` is false, or when it holds anything but a model,
    an adapter or a checkpoint; MlxLoraError where the disk has no room for the `needs` bytes to come. With `force` the
    old directory goes only after the new one is complete.
    """
    target = Path(os.path.abspath(target))
    check_target(target, force=force)
    private = target.is_relative_to(_home().absolute())
    if private:
        home()  # private from the start
    target.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
    check_space(target.parent, needs)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if private:
                path.chmod(0o700 if path.is_dir() else 0o600)
            synchronize(path)
        replace_directory(temporary, target)
        synchronize(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_space(folder: Path, needs: int) -> None:
    """Raise MlxLoraError unless the disk of `folder` has room for that many bytes; worth knowing before the work."""
    free = shutil.disk_usage(folder).free
    if free < needs:
        raise MlxLoraError(
            f"{folder} has {ui.size(free)} free, and {ui.size(needs)} are to be written",
            hint="free some space, or choose a folder on another disk",
        )


def clear_leftovers(target: Path) -> None:
    """Remove what a process that died while it wrote `target` left beside it, and put back what it had set aside.

    Only for whoever holds the right to write there: another process may be writing at this moment.
    """
    for leftover in target.parent.glob(f".{target.name}.*"):
        if not re.fullmatch(re.escape(f".{target.name}.") + "[a-z0-9_]{8}", leftover.name):
            continue
        if (leftover / "old").is_dir() and not target.exists():
            (leftover / "old").rename(target)
        shutil.rmtree(leftover, ignore_errors=True)


def synchronize(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk; on macOS also out of the disk's own cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):
            with contextlib.suppress(OSError):  # not every file system has it
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def created(path: Path, mode: str = "wb") -> Any:
    """Open a file for writing that only the user can read."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))


def check_target(target: Path, *, force: bool) -> None:
    """Raise NameTaken unless a directory may be written at `target`; worth knowing before the work is done."""
    target = Path(os.path.abspath(target))
    entries = list(target.iterdir()) if target.is_dir() else [target] if target.exists() else []
    ours = all(entry.is_file() for entry in entries) and any((target / name).is_file() for name in MARKS)
    if os.path.lexists(target) and not force:
        raise NameTaken(f"{target} exists", hint="choose another name, or --force to replace it")
    places = (Path.cwd(), Path(os.path.expanduser("~")), _home().absolute())
    if (entries and not ours) or any(place.is_relative_to(target) for place in places):
        raise NameTaken(
            f"{target} holds more than a model or an adapter, and --force replaces nothing else",
            hint="choose a directory of its own",
        )


def check_apart(target: Path, **sources: Path) -> None:
    """Raise NameTaken where `target` is one of the directories that it is made of, or lies inside one; each of
    `sources` is called by its keyword. With --force it would otherwise take the place of its own source."""
    place = Path(os.path.realpath(target))
    for what, source in sources.items():
        path = Path(os.path.realpath(source))
        if place == path or path in place.parents:
            where = "is" if place == path else "lies in"
            raise NameTaken(f"{target} {where} the {what} itself", hint="choose another directory")


def replace_directory(temporary: Path, target: Path) -> None:
    """Give a complete directory the place of `target`, which is removed only afterwards, if it is there at all.

    A process that dies between the two renames leaves the old one aside, where `clear_leftovers` finds it.
    """
    old = None
    if os.path.lexists(target):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)) / "old"
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
            old.parent.rmdir()
        raise
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)


def directory_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def exclude_from_backups(path: Path) -> None:
    """Keep a directory out of Time Machine, as far as macOS lets us: a backup is a copy that nobody thinks of.

    `tmutil` marks the directory itself, so the mark stays when it is moved. Where there is no such tool, or it fails,
    nothing happens.
    """
    if tool := shutil.which("tmutil"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([tool, "addexclusion", str(path)], capture_output=True, timeout=10, check=False)
