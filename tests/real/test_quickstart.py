"""The first command, from an installed wheel, outside the clone, in a network namespace without interfaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import chat_session
from tests.real.conftest import ROOT

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def wheel_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment holding the project's wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (wheel,) = folder.glob("*.whl")
    packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    shutil.unpack_archive(wheel, packages, "zip")
    ours = Path(pytest.__file__).parents[1]
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    return folder / "venv"


def namespace() -> list[str]:
    """A prefix that takes every network interface away, or nothing where the system doesn't let us."""
    for command in (["unshare", "-n"], ["unshare", "-r", "-n"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("this system doesn't let us make a network namespace")


def test_quickstart_without_any_network_and_a_chat_with_what_it_made(wheel_environment: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"MLX_LORA_HOME": str(tmp_path / "home")}
    python = wheel_environment / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import mlx_lora; print(mlx_lora.__file__)"], capture_output=True, text=True, cwd=tmp_path
    ).stdout
    assert str(wheel_environment) in where, "the wheel must be what runs, not the clone"
    start = time.monotonic()
    done = subprocess.run(
        [*namespace(), python, "-m", "mlx_lora", "quickstart", "--json"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    took = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{took:.0f} s: {result}")
    assert [task["name"] for task in result["tasks"]] == ["notes", "mail", "sql"]
    for task in result["tasks"]:
        assert task["base_exact_match"] <= 0.10, task
        assert task["adapter_exact_match"] >= 0.90, task
        assert task["adapter_bytes"] <= 300_000, task
    assert result["swap_milliseconds"] <= 20
    assert result["fused_matches"] is True
    if shutil.which("tmux"):  # the chat says what its documentation says
        shown = chat_session.run(tmp_path / "home")
        assert chat_session.words(shown) == chat_session.words(chat_session.written())
