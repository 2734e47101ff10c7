"""study subspace: the numbers that programs rely on, the table for people, and the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture
def wider(trained: Ran, run: Run, data: Path, tiny_path: Path) -> None:
    """Beside `mine` of rank 4, `wide` of rank 6 and another seed."""
    words = ["train", "--model", tiny_path, "--data", data, "--name", "wide", "train.iters=2", "adapter.rank=6"]
    assert trained.code == 0 and run(*words, "seed=1").code == 0


@pytest.mark.usefixtures("wider")
def test_phi_of_every_module_beside_its_control(run: Run, tiny_path: Path, tmp_path: Path) -> None:
    ran = run("study", "subspace", "mine", "wide", "--model", tiny_path, "--out", tmp_path / "phi.png", "--json")
    assert ran.code == 0 and len(ran.json["modules"]) == 12 and (tmp_path / "phi.png").stat().st_size > 10_000
    assert np.shape(ran.json["random_phi"]) == (4, 6)
    for module in ran.json["modules"]:
        assert module.keys() == {"module", "phi", "random_phi", "amplification"}
        phi, control = np.array(module["phi"]), np.array(module["random_phi"])
        assert phi.shape == control.shape == (4, 6)
        assert 0 <= phi.min() and phi.max() <= 1 + 1e-9
        assert all(factor > 0 for factor in module["amplification"])


@pytest.mark.usefixtures("wider")
def test_an_adapter_with_itself_and_the_other_factor(run: Run) -> None:
    for factor in ("a", "b"):
        ran = run("study", "subspace", "mine", "mine", "--of", factor, "--json")
        assert ran.json["of"] == factor
        for module in ran.json["modules"]:
            np.testing.assert_allclose(np.diag(module["phi"]), 1, atol=1e-6)
            assert module.keys() == {"module", "phi", "random_phi"}


@pytest.mark.usefixtures("wider")
def test_people_get_a_line_for_each_projection_and_the_papers_figure(run: Run) -> None:
    ran = run("study", "subspace", "mine", "wide")
    assert ran.code == 0
    head, *lines = ran.out.splitlines()
    assert "φ(1,1)" in head and "amplification" not in head
    assert [line.split()[:2] for line in lines[:4]] == [[f"{name}_proj", "3"] for name in "kqvo"] or [
        line.split()[0] for line in lines[:4]
    ] == sorted(f"{name}_proj" for name in "kqvo")
    assert "above 0.5 between ranks 8 and 64" in lines[-1]


WRONG: list[tuple[list[str], int, str]] = [
    (["mine", "yours"], 1, "no adapter 'yours'"),
    (["mine"], 2, "ADAPTER"),
    (["mine", "mine", "--of", "c"], 2, "--of"),
    (["mine", "mine", "--out", "phi.svg"], 1, "heat maps are PNG"),
    (["mine", "mine", "--model", "nowhere"], 1, "nowhere"),
]


def test_what_users_get_wrong(trained: Ran, run: Run) -> None:
    for words, code, said in WRONG:
        ran = run("study", "subspace", *words)
        assert ran.code == code and said in ran.err, ran.err
