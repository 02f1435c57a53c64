"""data_prep/rl_prep beside the same preparation with `datasets`: seconds, memory, and whether both keep the same rows.

    python benchmarks/rl_prep.py [--size 200MB] [--gsm8k FOLDER] [--processes 2] [--ours-only] [--json]

On rows made by benchmarks/rl_prep_rows.py, whose duplicates, leaks and bad rows are known, and on FOLDER (or
NEMOTRON_TEST_GSM8K) with GSM8K's train.jsonl and test.jsonl. Both sides parse and check, find exact and near duplicates
and leaks, measure, shuffle and write, in as many processes; one after the other on the same machine. Memory is the
greatest sum of proportional set sizes of a side's processes: pages that several share count once. --folder: where rows
and results lie, about 6 times SIZE; removed again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import rl_prep_rows

REPOSITORY = Path(__file__).resolve().parent.parent
DROPPED = {
    "bad": "bad_row",
    "too_long": "too_long",
    "exact": "exact_duplicate",
    "near": "near_duplicate",
    "leaks": "leakage",
}


@dataclass(frozen=True)
class Side:
    """What one side took and kept. seconds of wall-clock time, start included; cpu_seconds of all its processes."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    train: int
    validation: int


def ours(train: Sequence[Path], validation: Path, folder: Path, processes: int) -> tuple[Side, dict[str, Any]]:
    """data_prep/rl_prep as a user starts it; also its manifest."""
    blend = folder / "blend.json"
    paths = [str(path) for path in train]
    sources = [{"path": paths}, {"path": str(validation), "use": "validation"}]
    blend.write_text(json.dumps({"sources": [{**source, "environment": "math"} for source in sources]}))
    output = folder / "ours"
    settings = {
        "blend_path": blend,
        "output_dir": output,
        "target": "rlvr",
        "tokenizer.name": "bytes",
        "max_length": rl_prep_rows.MAX_LENGTH,
        "validation_size": 0,
        "num_workers": processes,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = ["-m", "nemotron_launch", "steps", "run", "data_prep/rl_prep", *overrides]
    seconds, cpu, peak, _ = _measured(command)
    manifest = json.loads((output / "manifest.json").read_bytes())
    rows = {split: sum(shard["rows"] for shard in manifest[split]) for split in ("train", "validation")}
    return Side(seconds, cpu, peak, rows["train"], rows["validation"]), manifest


def theirs(train: Sequence[Path], validation: Path, folder: Path, processes: int) -> Side:
    """The same with `datasets`, by benchmarks/rl_prep_datasets.py."""
    command = [str(Path(__file__).with_name("rl_prep_datasets.py")), str(folder / "theirs")]
    command += ["--train", *map(str, train), "--validation", str(validation)]
    command += ["--max-length", str(rl_prep_rows.MAX_LENGTH), "--num-proc", str(processes)]
    seconds, cpu, peak, said = _measured(command)
    left = json.loads(said.splitlines()[-1])
    return Side(seconds, cpu, peak, left["train"], left["validation"])


def _measured(command: Sequence[str]) -> tuple[float, float, float, str]:
    """(seconds, CPU seconds, peak MiB, standard output) of a Python program and its processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_DATASETS_OFFLINE": "1"}
    spent: dict[tuple[int, float], float] = {}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        begun = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], stdout=said, stderr=complained, env=environment)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _look(process.pid, spent))
            time.sleep(0.05)
        seconds = time.perf_counter() - begun
        said.seek(0)
        complained.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{complained.read()[-3000:]}")
        return seconds, sum(spent.values()), peak, said.read()


def _look(pid: int, spent: dict[tuple[int, float], float]) -> float:
    """MiB of a process and all below it now, by proportional set sizes; notes the CPU seconds that each has spent."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for one in [root, *root.children(recursive=True)]:
            with suppress(OSError, psutil.Error):
                times = one.cpu_times()
                spent[one.pid, one.create_time()] = times.user + times.system
                lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def compare(name: str, train: Sequence[Path], validation: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on the same files; prints, and returns, what they took."""
    megabytes = sum(path.stat().st_size for path in [*train, validation]) / 1e6
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        own, manifest = ours(train, validation, folder, options.processes)
        other = None if options.ours_only else theirs(train, validation, folder, options.processes)
    result: dict[str, Any] = {"megabytes": megabytes, "ours": own.__dict__, "dropped": manifest["counts"]["dropped"]}
    result["read"] = manifest["counts"]["read"]
    if not options.json:
        print(f"{name}: {megabytes:.0f} MB, {result['read']:,} rows, {options.processes} processes")
        _show("rl_prep", own, megabytes)
    if other:
        result |= {
            "datasets": other.__dict__,
            "times_faster": other.seconds / own.seconds,
            "times_less_cpu": other.cpu_seconds / own.cpu_seconds,
        }
        if not options.json:
            _show("datasets", other, megabytes)
            print(
                f"  rl_prep is {result['times_faster']:.1f} times faster, with {result['times_less_cpu']:.1f} times "
                f"less CPU time and {other.peak_mib / own.peak_mib:.1f} times less memory; rows kept are "
                + (
                    "the same number"
                    if (own.train, own.validation) == (other.train, other.validation)
                    else "NOT the same"
                )
            )
    return result


def _show(name: str, side: Side, megabytes: float) -> None:
    print(
        f"  {name:9} {side.seconds:8.1f} s {side.cpu_seconds:8.1f} s CPU {megabytes / side.seconds:8.1f} MB/s "
        f"{side.peak_mib:8.0f} MiB   {side.train:,} + {side.validation:,} rows kept"
    )


def generated(options: argparse.Namespace) -> dict[str, Any]:
    """Generated rows; also whether every number is the one that is known."""
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        expected = rl_prep_rows.write(folder, options.size)
        result = compare("generated", sorted(folder.glob("train-*.jsonl")), folder / "validation.jsonl", options)
    reasons = {name: count for name, count in expected.items() if name in DROPPED}
    found = {name: result["dropped"].get(reason, 0) for name, reason in DROPPED.items()}
    rows = (expected["read"] + expected["validation"], expected["kept"], expected["validation"])
    result["as_known"] = found == reasons and rows == (
        result["read"],
        result["ours"]["train"],
        result["ours"]["validation"],
    )
    if not options.json:
        print(f"  known of these rows: {reasons}; " + ("all found" if result["as_known"] else f"found: {found}"))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = os.environ.get("NEMOTRON_TEST_GSM8K")
    parser.add_argument("--gsm8k", type=Path, default=Path(default) if default else None)
    parser.add_argument("--size", type=rl_prep_rows.size_of, default="200MB")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ours-only", action="store_true", help="leave `datasets` out")
    parser.add_argument("--folder", type=Path, help="where rows and results lie for the while")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {}
    if options.gsm8k:
        results["gsm8k"] = compare("GSM8K", [options.gsm8k / "train.jsonl"], options.gsm8k / "test.jsonl", options)
    if options.size:
        results["generated"] = generated(options)
    if options.json:
        print(json.dumps(results))
    known = results.get("generated", {}).get("as_known", True)
    same = all(
        (one["ours"]["train"], one["ours"]["validation"]) == (one["datasets"]["train"], one["datasets"]["validation"])
        for one in results.values()
        if "datasets" in one
    )
    return 0 if known and same else 1


if __name__ == "__main__":
    sys.exit(main())
