"""A real run on this machine that does what a test tells it: so many steps, then an end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.step_trees import SCHEMA, add_step

STEP = "sft/live"
TOTAL = 40  # steps that its config asks for
_SCHEMA: dict[str, Any] = {**SCHEMA, "properties": {**SCHEMA["properties"], "sft": {"type": "object"}}}
_CONFIG = f"output_dir: out/live\nsft: {{max_num_steps: {TOTAL}}}\n"
# Writes metrics and coloured lines up to the step in `goal`, and ends with the code in `end`.
_SCRIPT = """\
import argparse, json, math, pathlib, sys, time
import yaml
parser = argparse.ArgumentParser()
parser.add_argument("--config", type=pathlib.Path)
config = yaml.safe_load(parser.parse_known_args()[0].config.read_text())
output = pathlib.Path(config["output_dir"])
output.mkdir(parents=True, exist_ok=True)
(output / "config.yaml").write_text(yaml.safe_dump(config))
step = 0
while True:
    goal = int((output / "goal").read_text() or 0) if (output / "goal").exists() else 3
    while step < goal:
        step += 1
        loss = 2 / (1 + step / 10) + 0.05 * math.sin(step)
        row = {"step": step, "epoch": 0, "time": time.time(), "train/loss": loss, "train/grad_norm": 1.0}
        with (output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\\n")
        print(f"\\x1b[32mstep {step}\\x1b[0m loss {loss:.3f}", flush=True)
    if (output / "end").exists() and (code := (output / "end").read_text()):
        print("<b>the last words</b>", flush=True)
        sys.exit(int(code))
    time.sleep(0.02)
"""


def add_live_step(root: Path) -> None:
    """Put the step `sft/live` into a tree of steps; it needs no input."""
    folder = add_step(root, STEP, {"default": _CONFIG}, schema=_SCHEMA, consumes=[])
    (folder / "train.py").write_text(_SCRIPT)


class LiveRun:
    """The run, by what its submission said, and how it is told what to do."""

    def __init__(self, submitted: dict[str, Any], output: Path) -> None:
        self.run_id: str = submitted["run_id"]
        self.run_dir = Path(submitted["run_dir"])
        self.output = output.absolute()

    def go_on(self, step: int) -> None:
        """Train up to this step."""
        _write(self.output / "goal", str(step))

    def end(self, code: int) -> None:
        _write(self.output / "end", str(code))

    def kill(self) -> None:
        """End its supervisor and with it the run, where a test has failed."""
        self.end(1)
        claim = self.run_dir / "claim"
        if claim.exists():
            pid = int(claim.read_text().rsplit(":", 2)[1])
            end = time.monotonic() + 5
            while time.monotonic() < end and _supervises(pid):
                time.sleep(0.05)
            if _supervises(pid):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def live_run(nemotron: Any, *more: str, output: Path = Path("out/live")) -> Iterator[LiveRun]:
    """Submit the run in the background, through the real command; it has ended afterwards."""
    done = nemotron("steps", "run", STEP, "-b", "local", "--json", f"output_dir={output}", *more)
    assert done.returncode == 0, done.stderr
    run = LiveRun(json.loads(done.stdout), output)
    try:
        yield run
    finally:
        run.kill()


def _supervises(pid: int) -> bool:
    try:
        return b"local_supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    passing = path.with_name(f".{path.name}")
    passing.write_text(text)
    passing.replace(path)
