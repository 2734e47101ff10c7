"""What is said and shown at the end of a run, reports, and two runs beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.cli.live import listener
from mlx_lora.cli.train import StopSignal
from mlx_lora.data.read import sha256
from mlx_lora.serve.engine import Engine
from mlx_lora.store import verdict as verdicts
from mlx_lora.tasks import samples
from mlx_lora.train.events import Evaluated, Finished
from tests.cli.conftest import Ran
from tests.conftest import questions

Run = Callable[..., Ran]
# Of prompts and of completions in the rows of `data`.
TEXT = ("twice", "say 2")


@pytest.fixture
def words(tiny_path: Path, data: Path) -> list[Any]:
    """At a low rate, so that five validation rows can't tell what was learned."""
    few = ["train.iters=2", "train.learning_rate=2e-4", "train.eval_every=null", "adapter.rank=4"]
    return ["train", "--model", tiny_path, "--data", data, "--name", "mine", *few]


def test_a_run_ends_with_a_sentence_and_answers_beside_the_wanted_ones(run: Run, words: list[Any], home: Path) -> None:
    ran = run(*words, "--samples")
    figures, sentence, path = ran.out.splitlines()
    assert figures.startswith("mine: train loss") and path == str(home / "adapters" / "mine")
    assert "5 validation rows" in sentence and "too few rows to say more" in sentence
    shown = [line.strip() for line in ran.err.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in shown] == ["asked", "wanted", "answer"] * 3
    assert shown[0] == "asked   say 2 twice" and shown[1] == "wanted  22"
    assert not any(text in ran.out for text in TEXT)
    answer = run("generate", "--adapter", "mine", "--prompt", "say 2 twice", "--max-tokens", 19, "--json").json["text"]
    assert " ".join(answer.split()) == shown[2].removeprefix("answer").strip().removesuffix("…")


@pytest.mark.parametrize(
    ("options", "there"),
    [
        ([], False),  # standard error is no terminal
        (["--json"], False),
        pytest.param(["--json", "--samples"], True, marks=pytest.mark.real),
    ],
)
def test_answers_are_shown_where_they_are_wanted(run: Run, words: list[Any], options: list[str], there: bool) -> None:
    ran = run(*words, *options)
    assert ran.code == 0 and ("  asked " in ran.err) is there
    if "--json" in options:
        assert ran.json["ending"]["kind"] == "too_few" and "twice" not in ran.out


@pytest.mark.real
def test_plain_text_has_no_answers(run: Run, write_rows: Callable[..., Path], tiny_path: Path) -> None:
    folder = write_rows([{"text": f"one two {number}"} for number in range(12)]).parent
    ran = run("train", "--model", tiny_path, "--data", folder, "--name", "mine", "train.iters=1")
    assert ran.code == 0 and "asked" not in ran.err


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (KeyboardInterrupt, 130, "no answers then"),
        pytest.param(RuntimeError("out of memory"), 0, "no answers: out of memory", marks=pytest.mark.real),
    ],
)
def test_what_ends_the_answers_loses_nothing(
    run: Run, words: list[Any], home: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, code: int, says: str
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise fault

    monkeypatch.setattr(Engine, "stream", stopped)
    ran = run(*words, "--samples")
    assert ran.code == code and says in ran.err and ran.out.splitlines()[-1] == str(home / "adapters" / "mine")
    assert "the adapter is stored" in ran.err and run("runs", "show", "mine").out.startswith("mine is finished")


@pytest.mark.real
def test_the_answers_are_those_of_the_adapter_that_was_kept(
    run: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one, where the last one is worse: its arrays are read back from the home."""
    seen: list[Any] = []
    before = samples.read
    monkeypatch.setattr(samples, "read", lambda path: seen.append(path) or before(path))
    assert run(*words, "train.eval_every=1", "--samples").code == 0
    assert [path.name for path in seen] == ["mine"]


def test_a_report_has_texts_only_in_a_file_that_was_named(
    run: Run, trained: Ran, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("report", "mine")
    assert ran.code == 0 and ran.out == "mine.html\n" and "--out mine.html writes those too" in ran.err
    plain = (tmp_path / "mine.html").read_text()
    assert not any(text in plain for text in TEXT) and "Settings" in plain
    named = tmp_path / "named.html"
    assert run("report", "mine", "--out", named, "--json").json["out"] == str(named)
    assert "say 2 twice" in named.read_text() and named.stat().st_mode & 0o777 == 0o600
    assert run("report", "mine", "--out", named, "--no-texts").code == 0, "a report may be replaced"
    assert "say 2 twice" not in named.read_text()
    for file in home.rglob("*"):
        assert not file.is_file() or b"twice" not in file.read_bytes(), file


def test_a_report_replaces_nothing_else_and_knows_its_names(run: Run, trained: Ran, tmp_path: Path) -> None:
    letter = tmp_path / "letter.html"
    letter.write_text("<p>Dear</p>")
    refused = run("report", "mine", "--out", letter)
    assert refused.code == 1 and "is no report of mlx-lora" in refused.err and letter.read_text() == "<p>Dear</p>"
    missing = run("report", "mien")
    assert missing.code == 1 and "no run and no verdict 'mien'; did you mean 'mine'?" in missing.err
    nowhere = run("report", "mine", "--out", tmp_path / "none" / "x.html")
    assert nowhere.code == 1 and "is no directory" in nowhere.err


@pytest.mark.real
def test_a_report_says_where_rows_have_changed(run: Run, trained: Ran, data: Path, tmp_path: Path) -> None:
    file = data / "train.jsonl"
    file.write_text(file.read_text() + json.dumps({"prompt": "another", "completion": "row"}) + "\n")
    ran = run("report", "mine", "--out", tmp_path / "r.html")
    assert ran.code == 0 and "without rows and answers: train.jsonl has changed since the run" in ran.err
    assert "train.jsonl has changed since the run" in (tmp_path / "r.html").read_text()


@pytest.mark.real
def test_a_report_on_a_verdict_shows_its_rows(run: Run, trained: Ran, home: Path, data: Path, tmp_path: Path) -> None:
    judged = verdicts.Judged(
        adapter="mine", verdict="helped", sentence="it helped", metric="accuracy", base=0.0, tuned=0.4, difference=0.4,
        interval=(0.1, 0.7), p_value=0.01, test="McNemar", detectable=0.3, rows=5, fixed=1, broken=1, fixed_rows=[1],
        broken_rows=[3], drift=verdicts.Drift(kl_task=0.5),
    )  # fmt: skip
    rows_of = verdicts.Rows(file="test.jsonl", sha256=sha256(data / "test.jsonl"), rows=5)
    for name in ("mine", "judged"):
        verdicts.write(verdicts.Verdict(created="", name=name, model="tiny", data=rows_of, results=[judged]))
    out = tmp_path / "r.html"
    assert run("report", "mine", "--out", out).code == 0
    rows = questions(5, start=200)
    page = out.read_text()
    assert all(f"row {number + 1}</h3>" in page and rows[number]["prompt"] in page for number in (1, 3))
    assert "mine: it helped" in page and "0.1 to 0.7" in page
    alone = run("report", "judged", "--out", out)
    assert "--data names them" in alone.err and "row 2</h3>" not in out.read_text()
    assert run("report", "judged", "--data", data / "test.jsonl", "--out", out).code == 0
    assert "row 2</h3>" in out.read_text()
    other = run("report", "judged", "--data", data / "train.jsonl", "--out", out)
    assert "is the one that the verdict was given on" in other.err
    moved = data.rename(tmp_path / "moved")
    assert run("report", "mine", "--data", moved, "--out", out).code == 0
    page = out.read_text()
    assert "row 2</h3>" in page and "say 2 twice" in page, "--data names the run's rows and the verdict's"
    assert run("report", "mine", "--data", moved / "test.jsonl", "--out", out).code == 0
    page = out.read_text()
    assert "row 2</h3>" in page and "say 2 twice" not in page and str(tmp_path) not in page
    (home / "verdicts" / "judged" / "verdict.json").write_text('{"results": [1]}')
    damaged = run("report", "judged", "--out", out)
    assert damaged.code == 1 and "verdict.json" in damaged.err and "make the verdict again" in damaged.err


def test_two_runs_are_compared(run: Run, trained: Ran, words: list[Any]) -> None:
    assert run(*words[:6], "other", *words[7:], "--no-samples", "train.eval_every=1").code == 0
    shown = run("runs", "compare", "mine", "other").out
    assert "adapter.rank" not in shown and "train.iters" in shown and "best valid loss" in shown and "┤" in shown
    found = run("runs", "compare", "mine", "other", "--json").json
    assert found["runs"] == ["mine", "other"] and found["settings"]["train.iters"] == [4, 2]
    assert found["settings"]["train.eval_every"] == [4, 1] and "name" not in found["settings"]
    mine, other = found["results"]
    assert mine["best_valid_loss"] == trained.json["best_valid_loss"] and mine["rows"] == 24 and other["steps"] == 2
    assert [step for step, _ in found["losses"][1]] == [0, 1, 2]
    assert run("runs", "compare", "mine", "none").code == 1


@pytest.mark.parametrize("quiet", [True, False])
def test_a_worse_adapter_is_said_once(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """`train` ends with a sentence; of several trainings each has a warning in its place."""
    with ExitStack() as stack:
        heard = listener(stack, StopSignal(stack), quiet=quiet)
        heard.event(Evaluated(0, 1.0, False))
        heard.event(Finished(**dict.fromkeys((one.name for one in fields(Finished)), 2)))
    assert ("worse on the validation rows" in capsys.readouterr().err) is quiet


@pytest.mark.real
def test_tensorboard_itself_reads_what_the_run_recorded(run: Run, words: list[Any], home: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard: pip install -e '.[real]'"
    )
    assert run(*words, "--tensorboard", tmp_path / "events").code == 0
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    lines = [json.loads(line) for line in (home / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    for name, event, key in (("train/loss", "step", "loss"), ("validation/loss", "evaluated", "loss")):
        recorded = {line["step"]: line[key] for line in lines if line["event"] == event}
        shown = {each.step: each.value for each in events.Scalars(name)}
        assert shown == pytest.approx(recorded, rel=1e-6) and recorded
