"""Runs on this machine: files, signals, exit codes."""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Nemotron
from tests.step_trees import REPOSITORY

COMMAND = [sys.executable, "-m", "nemotron_launch", "steps", "run", "small", "wait=true"]


@contextmanager
def waiting_run(**kwargs: object) -> Iterator[subprocess.Popen[bytes]]:
    """A run whose script waits for a signal, notes which came, and leaves with 85."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process: subprocess.Popen[bytes] = subprocess.Popen(COMMAND, env=env, **kwargs)  # type: ignore[call-overload]
    try:
        until(lambda: Path("out/sft/ready").exists(), process)
        yield process
    finally:
        process.kill()
        process.wait()


def until(holds, process: subprocess.Popen[bytes], seconds: float = 30) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, "ended early"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def asked() -> list[int]:
    found: list[int] = json.loads(Path("out/sft/asked.json").read_text())
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_step_once_and_its_exit_code_comes_back(tree: Path, number: signal.Signals) -> None:
    with waiting_run() as process:
        process.send_signal(number)
        assert process.wait(timeout=30) == 85
    assert asked() == [number]


def test_ctrl_c_in_a_terminal_reaches_the_step_once(tree: Path) -> None:
    main, side = pty.openpty()
    setsid_and_take = lambda: os.login_tty(side)  # noqa: E731
    with waiting_run(preexec_fn=setsid_and_take) as process:
        os.close(side)
        os.write(main, b"\x03")
        assert process.wait(timeout=30) == 85
    os.close(main)
    assert asked() == [signal.SIGINT]


def test_a_step_killed_by_a_signal_is_128_plus_its_number(tree: Path, nemotron: Nemotron) -> None:
    (tree / "sft/small/train.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert nemotron("steps", "run", "small").returncode == 128 + signal.SIGKILL


def test_a_killed_launcher_takes_the_step_with_it(tree: Path) -> None:
    with waiting_run() as process:
        pid = child_of(process.pid)
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while alive(pid):
            assert time.monotonic() < end, "the step outlived its launcher"
            time.sleep(0.02)


def child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_config_lies_in_the_runs_folder_private_and_ignored_by_git(tree: Path, nemotron: Nemotron) -> None:
    assert nemotron("steps", "run", "small").returncode == 0
    assert nemotron("steps", "run", "small").returncode == 0
    runs = sorted(Path(".nemotron/runs").iterdir())
    assert len(runs) == 2, "each run has its own folder"
    assert stat.S_IMODE((runs[0] / "config.yaml").stat().st_mode) == 0o600
    assert Path(".nemotron/.gitignore").read_text() == "*\n"


def test_the_run_section_stays_with_the_launcher(tree: Path, nemotron: Nemotron) -> None:
    nemotron("steps", "run", "pairs", "-c", "tiny")
    assert "run" not in json.loads(Path("out/pairs-tiny/seen.json").read_text())["config"]


def test_a_place_that_cannot_be_written_is_one_message(tree: Path, nemotron: Nemotron) -> None:
    Path(".nemotron").write_text("a file where the folder should be")
    done = nemotron("steps", "run", "small")
    assert done.returncode == 2
    assert done.stderr.startswith("error: .nemotron")
    assert "Traceback" not in done.stderr


def test_without_the_trainer_the_message_says_how_to_install_it(tree: Path) -> None:
    # A Python without site-packages finds nothing of the trainer; YAML and click are put there by hand.
    import click
    import yaml

    manifest = tree / "sft/small/step.yaml"
    manifest.write_text(manifest.read_text().replace("launch: python", "launch: processes"))
    few = Path("few")
    few.mkdir()
    for module in (click, yaml):
        (few / module.__name__).symlink_to(Path(module.__file__ or "").parent)
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{few.absolute()}"}
    command = [sys.executable, "-S", *COMMAND[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr == (
        "error: sft/small trains in this Python, which lacks torch and megatron-core\n"
        "       install the trainer:  pip install 'nemotron-launch[train]'   (with uv:  uv sync --extra train)\n"
    )
