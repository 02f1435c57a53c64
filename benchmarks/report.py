"""How long a report of a very long run takes, beside json.loads of the same lines, and how long its page takes to open.

    python benchmarks/report.py [--rows 100000] [--keys 30] [--runs 1000] [--cpu-time] [--json] [--check]

Makes an output folder with so many rows of metrics and a ledger with so many runs, then takes turns: json.loads of
every line, `nemotron jobs report`, the page in Chromium until its first plots are drawn (where chromium and selenium
are there). The smallest of three turns counts. --check ends with 1 where command and page together take more than 2 s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TURNS = 3
LIMIT = 2.0  # seconds


def make(folder: Path, *, rows: int, keys: int, runs: int) -> Path:
    """The long run's output folder; the ledger's folder is `state` beside it."""
    sys.path.insert(0, str(REPOSITORY))
    from nemotron_launch.jobs.ledger import Ledger
    from tests.jobs.rows import row

    out, rng = folder / "out", random.Random(1)
    out.mkdir()
    names = ["train/loss", "train/reward", "train/reward_std_within_groups", "train/reference_kl"]
    names += [f"train/metric_{i}" for i in range(keys - len(names))]
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            line = {"step": step, "epoch": 0, "time": 1.8e9 + step}
            line |= {name: math.exp(-step / rows) * rng.uniform(0.8, 1.2) for name in names}
            file.write(json.dumps(line) + "\n")
    known = {"state": "finished", "step": "rl/nemo_rl/rlvr"}
    with Ledger(folder / "state") as ledger:
        ledger.add([row(f"run-{i:04}", folder, created=1.8e9 + i, **known) for i in range(runs - 1)])
        ledger.add([row("long", folder, created=1.8e9, output_dir=str(out), **known)])
    return out


def command(folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NEMOTRON_STATE_DIR": str(folder / "state")}
    run = [sys.executable, "-m", "nemotron_launch", "jobs", "report", "long", "-o", str(folder / "long.html")]
    subprocess.run(run, env=env, cwd=folder, check=True, stderr=subprocess.DEVNULL)


def parse(out: Path) -> None:
    for line in (out / "metrics.jsonl").read_bytes().splitlines():
        json.loads(line)


def opener(folder: Path) -> tuple[Callable[[], None], Callable[[], None]] | None:
    """What opens the page in a browser that runs already, and what ends it; None where there is none."""
    try:
        from selenium import webdriver
    except ImportError:
        return None
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/browser"):
        options.add_argument(flag)
    options.add_argument("--window-size=1440,900")
    os.environ["no_proxy"] = "localhost,127.0.0.1"
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))

    def load() -> None:
        browser.get((folder / "long.html").as_uri())
        while not browser.execute_script("return document.querySelectorAll('.plot canvas').length"):
            time.sleep(0.005)

    return load, browser.quit


def timed(work: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def processor_time() -> float:
    """Of this process and those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--keys", type=int, default=30)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--cpu-time", action="store_true", help="Processor seconds of all processes; without the page.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = make(folder, rows=given.rows, keys=given.keys, runs=given.runs)
        command(folder)  # fills the caches of byte code
        browser = None if given.cpu_time else opener(folder)
        clock = processor_time if given.cpu_time else time.perf_counter
        turns: dict[str, list[float]] = {"json.loads": [], "jobs report": [], "page": []}
        try:
            for _ in range(TURNS):
                turns["json.loads"].append(timed(lambda: parse(out), clock))
                turns["jobs report"].append(timed(lambda: command(folder), clock))
                if browser:
                    turns["page"].append(timed(browser[0]))
        finally:
            if browser:
                browser[1]()
        size = (folder / "long.html").stat().st_size
        bytes_ = (out / "metrics.jsonl").stat().st_size
    best = {name: min(values) for name, values in turns.items() if values}
    whole = best["jobs report"] + best.get("page", 0.0)
    if given.json:
        print(json.dumps({"seconds": turns, "ratio": best["jobs report"] / best["json.loads"], "page_bytes": size}))
    else:
        print(f"{given.rows} rows of {given.keys} metrics, {bytes_ / 2**20:.0f} MiB; {given.runs} runs in the ledger")
        for name, seconds in best.items():
            print(f"{name:<12} {seconds:6.2f} s  {seconds / best['json.loads']:5.2f} x json.loads")
        print(f"{'together':<12} {whole:6.2f} s; the page has {size / 2**20:.1f} MiB")
    return 1 if given.check and whole > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
