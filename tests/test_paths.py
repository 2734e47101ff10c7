"""Names, the home directory, shipped files, and directories that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mlx_lora import paths
from mlx_lora.errors import MlxLoraError, NameTaken


@pytest.mark.parametrize(
    "name", ["a", "qwen3-0.6b_4bit", "_x-", "A.b", "console", "com10", "x" * 128, "größe", "日記", "нотатки", "हिन्दी"]
)
def test_names_that_can_be_used(name: str) -> None:
    assert paths.room("adapters", name) == paths.home() / "adapters" / name


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "a/b", "/etc", ".hidden", "a b", "a\n", "a\u200bb", "x" * 129, "日" * 43, "\u0301a", 
        "~", "ｍine", "m\u0456ne", "a\0", "a.", "-x", "NUL", "con.x",
    ],
)  # fmt: skip
def test_names_that_could_lead_elsewhere(name: str) -> None:
    with pytest.raises(MlxLoraError, match="is not a name"):
        paths.room("adapters", name)


def test_a_name_is_one_text_however_it_was_typed() -> None:
    assert paths.room("adapters", "gro\u0308\u00dfe") == paths.home() / "adapters" / "gr\u00f6\u00dfe"


def test_a_name_with_spaces_is_refused_with_one_that_would_do() -> None:
    with pytest.raises(MlxLoraError) as refused:
        paths.room("adapters", "my notes")
    assert refused.value.hint and refused.value.hint.startswith("my-notes would be one")


@pytest.mark.parametrize("kind", ["models", "adapters"])
def test_a_word_is_a_name_first_and_with_a_separator_only_a_path(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rule for models and adapters: ./base doesn't shadow a model called base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert paths.find(kind, "base") == Path("base"), "a directory here, while the home has no such name"
    paths.room(kind, "base").mkdir(parents=True)
    assert paths.find(kind, "base") == paths.home() / kind / "base"
    assert paths.find(kind, "./base") == Path("base")
    assert paths.find(kind, "./other") is None and paths.find(kind, "") is None


@pytest.mark.parametrize(("make", "says"), [("file", "is not a directory"), ("below a file", "is not a directory")])
def test_a_home_that_can_t_be_made_says_what_is_wrong_with_the_path(
    make: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_LORA_HOME", str(tmp_path / "file" / ("inner" if make == "below a file" else "")))
    with pytest.raises(MlxLoraError, match=says) as refused:
        paths.home()
    assert str(tmp_path / "file") in refused.value.message and "MLX_LORA_HOME" in str(refused.value.hint)


def test_a_link_that_leads_out_of_the_home_is_no_place_for_a_name(home: Path, tmp_path: Path) -> None:
    (home / "adapters" / "mine").mkdir(parents=True)
    (home / "adapters" / "again").symlink_to("mine")
    (home / "adapters" / "out").symlink_to(tmp_path)
    (home / "runs").symlink_to(tmp_path)
    assert paths.room("adapters", "again").is_dir()
    for kind, name in (("adapters", "out"), ("runs", "mine")):
        with pytest.raises(MlxLoraError, match="leads out of the home"):
            paths.room(kind, name)


def test_the_home_is_private_and_kept_out_of_backups(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    excluded: list[Path] = []
    monkeypatch.setattr("mlx_lora.paths.exclude_from_backups", excluded.append)
    assert paths.home() == paths.home() == home
    assert excluded == [home], "once, when it is made"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_shipped_files_are_found_from_anywhere_and_the_users_own_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths.existing("data/base") == paths.bundled("data", "base")
    (tmp_path / "data" / "base").mkdir(parents=True)
    assert paths.existing("data/base") == Path("data/base")


@pytest.mark.parametrize("path", ["tests", "README.md", "data/../README.md", "/data/base", "nothing", "~nobody-here/x"])
def test_nothing_else_of_a_clone_counts_as_shipped(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths.existing(path) is None


def listing(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    with paths.written_whole(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert listing(tmp_path) == {"new/target/a": "1"}
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_failure_leaves_nothing_behind_and_the_old_directory_as_it_was(
    tmp_path: Path, existing: bool, error: type[BaseException]
) -> None:
    """Nothing is written in place: a crash must not pair new files with old ones."""
    target = tmp_path / "target"
    if existing:
        target.mkdir()
        (target / "config.json").write_text("1")
    with pytest.raises(error), paths.written_whole(target, force=True) as folder:
        (folder / "half").write_text("2")
        raise error
    assert listing(tmp_path) == ({"target/config.json": "1"} if existing else {})
    assert [entry.name for entry in tmp_path.iterdir()] == (["target"] if existing else [])


def test_a_failing_rename_brings_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("1")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if to == target and (self / "new").exists():
            raise OSError("disk full")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"), paths.written_whole(target, force=True) as folder:
        (folder / "new").write_text("2")
    assert listing(tmp_path) == {"target/config.json": "1"}
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_replacing_needs_force_and_replaces_everything(tmp_path: Path) -> None:
    for content, force in (("1", False), ("2", True)):
        with paths.written_whole(tmp_path / "target", force=force) as folder:
            (folder / "config.json").write_text(content)
            (folder / content).write_text(content)
    assert listing(tmp_path) == {"target/2": "2", "target/config.json": "2"}
    with pytest.raises(NameTaken, match="exists"), paths.written_whole(tmp_path / "target"):
        pytest.fail("the block ran although the target exists")


@pytest.mark.parametrize("place", ["the working directory", "above it", "the user's home", "the home of models"])
def test_force_never_replaces_a_directory_that_holds_more(
    place: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work" / "project"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    os.makedirs(tmp_path / "user")
    targets = {
        "the working directory": Path("."),
        "above it": tmp_path / "work",
        "the user's home": tmp_path / "user",
        "the home of models": home,
    }
    with pytest.raises(NameTaken, match="holds more"), paths.written_whole(targets[place], force=True):
        pytest.fail("the block ran")
    assert work.is_dir()


@pytest.mark.parametrize("inside", [{"thesis.txt": "years"}, {"config.json": "{}", "sub/thesis.txt": "years"}])
def test_force_replaces_only_what_a_command_like_it_made(tmp_path: Path, inside: dict[str, str]) -> None:
    target = tmp_path / "documents"
    for name, text in inside.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    with pytest.raises(NameTaken, match="holds more"), paths.written_whole(target, force=True):
        pytest.fail("the block ran")
    assert listing(target) == dict(sorted(inside.items()))


def test_a_home_that_comes_into_being_by_writing_into_it_is_private(home: Path) -> None:
    with paths.written_whole(home / "models" / "mine"):
        pass
    assert home.stat().st_mode & 0o777 == 0o700
