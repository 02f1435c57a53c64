"""What the tests of data preparation share: blends made on the spot, prepared in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_launch.config.compose import compose
from nemotron_launch.data_prep.engine import prepare
from nemotron_launch.resources import steps_dir

STEP = steps_dir() / "data_prep/rl_prep"
Row = dict[str, Any]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """One a line; text as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_blend(folder: Path, sources: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "blend.yaml"
    path.write_text(json.dumps({"sources": list(sources), **more}, indent=1))
    return path


def composed(blend: Path, output: Path, *overrides: str) -> dict[str, Any]:
    """The step's defaults, with everything done in this process unless an override says otherwise."""
    empty = output.parent / "empty.yaml"
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.write_text("{}\n")
    own = [f"blend_path={blend}", f"output_dir={output}", "num_workers=1", "offline=true"]
    return compose(empty, [*own, *overrides], schema=STEP / "schema.json", env={}).data


def run(blend: Path, output: Path, *overrides: str) -> dict[str, Any]:
    """Prepare here; the manifest."""
    path = prepare(composed(blend, output, *overrides), STEP)
    manifest: dict[str, Any] = json.loads(path.read_bytes())
    return manifest


def rows_of(output: Path, split: str = "train") -> list[Row]:
    """The rows of all shards of a split, in order."""
    return [json.loads(line) for file in sorted(output.glob(f"{split}-*.jsonl")) for line in file.open("rb")]


def contents(output: Path) -> dict[str, bytes]:
    """Everything that a preparation leaves for others."""
    patterns = ("*.jsonl", "*.jsonl.zst", "manifest.json")
    return {file.name: file.read_bytes() for pattern in patterns for file in output.glob(pattern)}


def adds_up(counts: Mapping[str, Any]) -> bool:
    """Every row that was read is somewhere."""
    found: bool = counts["read"] + counts["repeated"] == counts["kept"] + sum(counts["dropped"].values())
    return found


#: Prepares in small units, so that little data makes many; says how much memory it took at most (KiB).
#: A fourth argument `stage:count:signal` sends itself a signal when that stage has told so often of what is done.
SCRIPT = """
import os, pathlib, resource, shutil, sys
from nemotron_launch.data_prep import engine, progress, run, shards, sources

stage, count, signal = sys.argv[4].split(":") if len(sys.argv) > 4 else ("", 0, 0)
left, at, move = int(count), progress.Bar.at, shutil.move

def tick(now):
    global left
    left -= now == stage
    if left == 0 and now == stage:
        os.kill(os.getpid(), int(signal))

def told(self, done):
    at(self, done)
    tick(self._stage)

def moved(*paths):
    move(*paths)
    tick("publishing")

if __name__ == "__main__":
    progress.Bar.at, shutil.move = told, moved
    sources.UNIT_BYTES = shards.RANGE_BYTES = int(sys.argv[1])
    code = run.main(pathlib.Path(sys.argv[2]), ["--config", sys.argv[3]])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    sys.exit(code)
"""


def prepare_apart(
    folder: Path, blend: Path, output: Path, *overrides: str, unit: int, at: str = ""
) -> subprocess.CompletedProcess[str]:
    """Prepare in a process of its own, in units of so many bytes; with a signal to itself where `at` says."""
    config = folder / f"{output.name}.json"
    config.write_text(json.dumps({**composed(blend, output, *overrides), "run": None}))
    script = folder / "prepare.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(STEP.parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(script), str(unit), str(STEP), str(config), *([at] if at else [])],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": path},
    )
