"""Names, paths and model directories that mean harm: refused by one error, and nothing outside the home changes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_lora import files
from mlx_lora.models import template
from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]


def picture(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time of change and bytes of everything in a folder, and of the folder itself."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *sorted(folder.rglob("*"))]
    }


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the home with a whole adapter and a whole model in it; the test fails if any of it changes."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    (folder / "letters.txt").write_text("private")
    (folder / "manifest.json").write_text("{}")
    shutil.copytree(folder, folder / "x")
    before = picture(folder)
    yield folder
    assert picture(folder) == before


@pytest.fixture
def linked(home: Path, outside: Path) -> Path:
    """A home whose adapters, runs and models hold links that lead out of it."""
    for kind in ("adapters", "runs", "models"):
        (home / kind).mkdir(parents=True, exist_ok=True)
        (home / kind / "link").symlink_to(outside)
        (home / kind / "relative").symlink_to(Path("..", "..", "outside", "x"))
    return home


NAMES = {
    "parent": "..", "here": ".", "beside": "../outside", "through a name": "mine/../../../outside", "below": "mine/x",
    "absolute": "/tmp/outside", "home of the user": "~", "home of root": "~root", "hidden": ".mine", "nothing": "",
    "space": "mine ", "newline": "mine\n", "null": "mine\0", "trailing dot": "mine.", "option": "-mine",
    "device": "CON", "device with an ending": "nul.txt", "backslash": "..\\outside", "drive": "C:mine", "url": "file:///x",
    "fullwidth dots": "\uff0e\uff0e\uff0foutside", "fullwidth": "\uff4dine", "cyrillic": "m\u0456ne",
    "right to left": "\u202eenim", "zero width": "mi\u200bne", "percent": "%2e%2e%2foutside",
    "too long": "x" * 129, "link": "link", "relative link": "relative",
}  # fmt: skip


def test_hostile_names_are_refused(run: Run, trained: Ran, linked: Path, data: Path, tiny_path: Path) -> None:
    """By every command that writes to a name, or deletes one; the adapter and the run there are stay as they are."""
    before = {kind: picture(linked / kind / "mine") for kind in ("adapters", "runs")}
    for case, name in NAMES.items():
        for words in (
            ("adapters", "remove", "--yes", "--", name),
            ("adapters", "rename", "--", "mine", name),
            ("adapters", "rename", "--", name, "other"),
            ("train", "--model", tiny_path, "--data", data, f"--name={name}", "--force", "train.iters=1"),
            ("train", f"--name={name}", "--resume"),
        ):
            ran = run(*words)
            assert ran.code in (1, 2) and ran.err.count("error: ") == 1, (case, words, ran)
            assert "unexpected" not in ran.err and "\u202e" not in ran.err and len(ran.err) < 1000, (case, ran.err)
        assert {kind: picture(linked / kind / "mine") for kind in before} == before, case
        assert sorted(path.name for path in (linked / "adapters").iterdir()) == ["link", "mine", "relative"], case
    assert [entry["name"] for entry in run("adapters", "list", "--json").json] == ["mine"]


def test_a_link_that_leads_out_is_no_model_and_no_adapter(run: Run, linked: Path) -> None:
    for words in (("adapters", "show", "link"), ("adapters", "verify", "link"), ("adapters", "path", "relative")):
        ran = run(*words)
        assert ran.code == 1 and "leads out of the home" in ran.err
    ran = run("generate", "--model", "link", "--prompt", "x")
    assert ran.code == 1 and "leads out of the home" in ran.err


def test_a_link_inside_the_home_goes_without_what_it_leads_to(run: Run, trained: Ran, home: Path) -> None:
    (home / "adapters" / "again").symlink_to("mine")
    assert run("adapters", "remove", "again", "--yes").code == 0
    assert not (home / "adapters" / "again").is_symlink()
    assert run("adapters", "verify", "mine").code == 0


@pytest.mark.real
def test_force_over_a_link_takes_the_place_of_the_link_only(
    run: Run, trained: Ran, tiny_path: Path, outside: Path, tmp_path: Path
) -> None:
    """A model directory elsewhere, and a link to it as the place to write to."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_path, elsewhere)
    before = picture(elsewhere)
    (tmp_path / "out").symlink_to(elsewhere)
    fuse = ("fuse", "--model", tiny_path, "--adapter", "mine", "--bits", "keep", "--out", tmp_path / "out")
    assert run(*fuse).code == 1
    assert run(*fuse, "--force").code == 0
    assert picture(elsewhere) == before and not (tmp_path / "out").is_symlink()


def test_removing_asks_first(run: Run, trained: Ran, home: Path) -> None:
    ran = run("adapters", "remove", "mine")
    assert ran.code == 1 and "--yes removes without asking" in ran.err
    assert (home / "adapters" / "mine").is_dir()
    assert run("adapters", "remove", "mine", "--yes").code == 0
    assert not (home / "adapters" / "mine").exists() and not (home / "runs" / "mine").exists()


def changed(file: str, **values: object) -> Callable[[Path, Path], None]:
    def change(path: Path, outside: Path) -> None:
        config = json.loads((path / file).read_text()) if (path / file).exists() else {}
        (path / file).write_text(json.dumps(config | values))

    return change


def code(path: Path, outside: Path) -> None:
    (path / "evil.py").write_text(f"open({str(outside / 'ran')!r}, 'w')")
    changed("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})(
        path, outside
    )
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text("{}")


class Harm:
    """A pickle that writes a file when it is read."""

    def __init__(self, outside: Path):
        self.outside = outside

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.outside / "ran"),)


def pickled(name: str) -> Callable[[Path, Path], None]:
    def change(path: Path, outside: Path) -> None:
        (path / "model.safetensors").unlink()
        (path / name).write_bytes(pickle.dumps(Harm(outside)))

    return change


def replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def change(path: Path, outside: Path) -> None:
        (path / file).unlink(missing_ok=True)
        make(path / file)

    return change


def templated(text: str) -> Callable[[Path, Path], None]:
    return lambda path, outside: (path / "chat_template.jinja").write_text(text) and None


def large(file: Path) -> None:
    with open(file, "wb") as stream:
        stream.truncate(files.SMALL + 1)


LAUGHS = "{% set x = namespace(y='ha') %}" + "{% for i in range(40) %}{% set x.y = x.y ~ x.y %}{% endfor %}{{ x.y }}"
DIRECTORIES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "code in a part": (changed("config.json", text_config={"a": [{"model_file": "x.py"}]}), "asks to run code"),
    "code in a file": (changed("config.json", model_file="evil.py"), "asks to run code"),
    "code for attention": (changed("config.json", _attn_implementation_internal="a/b"), "asks to run code"),
    "code for a tokenizer": (code, "only code that comes with the model can make its tokenizer, Evil"),
    "weights kept elsewhere": (
        replaced("model.safetensors", lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")),
        "is a Git LFS pointer",
    ),
    "only a pickle": (pickled("pytorch_model.bin"), "is never read"),
    "a pickle by another name": (pickled("model.safetensors"), "is a pickle"),
    "an archive": (replaced("model.safetensors", lambda file: file.write_bytes(b"PK\x03\x04..")), "is a zip archive"),
    "weights without end": (replaced("model.safetensors", lambda file: file.symlink_to("/dev/zero")), "a device"),
    "weights to wait for": (replaced("model.safetensors", os.mkfifo), "is a pipe"),
    "settings to wait for": (replaced("config.json", os.mkfifo), "is a pipe"),
    "a template to wait for": (replaced("chat_template.jinja", os.mkfifo), "is a pipe"),
    "a directory for a tokenizer": (replaced("tokenizer.json", Path.mkdir), "is a directory"),
    "settings without end": (replaced("config.json", large), "more than any such file needs"),
    "layers without end": (changed("config.json", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "an architecture by path": (changed("config.json", model_type="../../evil"), "not supported"),
    "a template without end": (
        templated("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"), "takes more than",
    ),
    "a template that doubles": (templated(LAUGHS), "takes more than"),
    "a template that writes on": (templated("{{ 'a' * 20000000 }}"), "wrote 20000000 characters"),
    "a template that reads": (templated("{% include '/etc/passwd' %}"), "refuses this conversation"),
}  # fmt: skip
# They run until their time is over.
SLOW = ("a template without end", "a template that doubles")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.real if case in SLOW else ()) for case in DIRECTORIES]
)
def test_hostile_model_directories_are_refused(
    run: Run, tmp_path: Path, outside: Path, data: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "MOST_SECONDS", 1.0)
    change, said = DIRECTORIES[case]
    path = write_model(tmp_path / "model")
    change(path, outside)
    for words in (
        ("generate", "--model", path, "--prompt", "x"),
        ("train", "--model", path, "--data", data, "--name", "x"),
    ):
        ran = run(*words)
        assert ran.code == 1 and said in ran.err, ran.err
        assert ran.err.count("error: ") == 1 and "unexpected" not in ran.err


def test_code_that_is_only_named_is_noted_once_and_never_runs(
    run: Run, tmp_path: Path, outside: Path, data: Path
) -> None:
    path = write_model(tmp_path / "model")
    (path / "evil.py").write_text(f"open({str(outside / 'ran')!r}, 'w')")
    for file in ("config.json", "tokenizer_config.json"):
        changed(file, auto_map={"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})(path, outside)
    changed("model.safetensors.index.json", weight_map={"a": "../outside/letters.txt"})(path, outside)
    for words in (
        ("generate", "--model", path, "--prompt", "x", "--max-tokens", 1),
        ("train", "--model", path, "--data", data, "--name", "x", "train.iters=1"),
        ("quantize", path, tmp_path / "packed", "--verify", "none"),
    ):
        ran = run(*words)
        assert ran.code == 0, ran.err
        assert ran.err.count("note: ") == 3 and ran.err.count("names code that comes with the model") == 2
        assert "names ../outside/letters.txt, not here: ignored" in ran.err


@pytest.mark.parametrize("name", ["rows.pkl", "rows.npz", "rows.pt", "train.jsonl"])
def test_rows_that_are_a_pickle_are_never_opened_as_one(run: Run, tmp_path: Path, outside: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Harm(outside)))
    ran = run("data", "check", tmp_path / name)
    assert ran.code == 1 and "pickle, and reading one runs code" in ran.out + ran.err


@pytest.mark.parametrize(("name", "make"), [("train.jsonl", os.mkfifo), ("train.json", Path.mkdir)])
def test_rows_that_are_no_file_are_not_waited_for(
    run: Run, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "data").mkdir()
    make(tmp_path / "data" / name)
    ran = run("data", "check", tmp_path / "data")
    assert ran.code == 1 and "not a file" in ran.out + ran.err


SECRET = "the patient in room seven is Ada Lovelace, born 1815, and nobody may know it"


@pytest.mark.parametrize(
    "row",
    [
        {SECRET: 1}, {SECRET + "1": 1, SECRET + "2": 2}, {"prompt": [SECRET], "completion": "a"},
        {"text": {"a": SECRET}},
        {"messages": [{"role": SECRET, "content": "a"}]}, {"messages": [{"role": "user", "content": [SECRET]}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": SECRET}]},
        {"messages": [{"role": "user", "content": "a"}], "tools": [SECRET]},
        {"conversations": [{"from": SECRET, "value": "a"}]}, {"conversations": [SECRET]},
        {"instruction": SECRET, "output": [SECRET]}, {"instruction": SECRET, "output": "a", "history": [[SECRET]]},
        {"prompt": SECRET, "completion": SECRET + "\ud800"}, [SECRET], SECRET,
        {"messages": [{"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET + "<|end|>"}]},
        {"messages": [{"role": "developer", "content": SECRET}, {"role": "assistant", "content": SECRET}]},
        {"prompt": SECRET, "completion": SECRET, "text": SECRET * 40},
    ],
)  # fmt: skip
def test_no_message_shows_more_than_forty_characters_of_a_row(
    run: Run, write_rows: Callable[..., Path], tiny_path: Path, row: object
) -> None:
    file = write_rows([row])
    broken = file.with_name("broken.jsonl")
    broken.write_text(json.dumps(row)[:-2])
    for data in (file, broken):
        for words in (
            ("data", "check", data, "--model", tiny_path, "data.max_seq_length=60"),
            ("train", "--model", tiny_path, "--data", data, "--name", "x", "data.max_seq_length=60"),
        ):
            ran = run(*words)
            assert ran.code == 1
            shown = ran.out + ran.err
            pieces = [SECRET[at : at + 4] for at in range(0, len(SECRET) - 3, 4)]
            assert sum(piece in shown for piece in pieces) <= 40 // 4, shown
