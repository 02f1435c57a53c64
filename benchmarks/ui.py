"""How long `nemotron ui` takes from its command to what a person can read, with many runs and a very long one.

    python benchmarks/ui.py [--rows 100000] [--keys 30] [--runs 1000] [--json] [--check]

Makes the ledger and the run of benchmarks/report.py, then takes turns: a process that reads the ledger, json.loads of
every line of the run's metrics, the command until the list shows its first rows in Chromium, the command until the
run's first plot is drawn there. Both times begin before the command starts; the browser is open already. The smallest
of the turns counts. --check ends with 1 where one of the two takes more than 2 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TURNS = 3
LIMIT = 2.0  # seconds
REPOSITORY = Path(__file__).resolve().parent.parent
_READ = "from nemotron_launch.jobs.ledger import Ledger\nwith Ledger() as ledger: ledger.runs()"


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "NEMOTRON_STATE_DIR": str(folder / "state")}


def read_ledger(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", _READ], env=environment(folder), check=True)


def opened(browser: Any, folder: Path, path: str, shown: str) -> float:
    """Seconds from the start of the command until `shown` is true in the page."""
    command = [sys.executable, "-m", "nemotron_launch", "ui", "--no-browser", "--port", "0"]
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment(folder), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            browser.driver.get(address if path == "/" else address.replace("/?", f"{path}&"))
            while not browser.run(shown):
                time.sleep(0.005)
            return time.perf_counter() - began
        finally:
            process.terminate()


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("--rows", 100_000), ("--keys", 30), ("--runs", 1000)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY)]
    from report import make, parse

    from tests.browser import open_browser

    seconds: dict[str, list[float]] = {"ledger": [], "json.loads": [], "list": [], "run": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = make(folder, rows=given.rows, keys=given.keys, runs=given.runs)
        with open_browser(folder / "browser") as browser:
            for _ in range(TURNS):
                seconds["ledger"].append(timed(lambda: read_ledger(folder)))
                seconds["json.loads"].append(timed(lambda: parse(out)))
                rows = "return document.querySelectorAll('.list tbody tr').length > 20"
                seconds["list"].append(opened(browser, folder, "/", rows))
                plot = "return document.querySelector('.u-over') !== null"
                seconds["run"].append(opened(browser, folder, "/run?run=long", plot))
    best = {name: min(all_) for name, all_ in seconds.items()}
    ratios = {"list/ledger": best["list"] / best["ledger"], "run/json.loads": best["run"] / best["json.loads"]}
    if given.json:
        print(json.dumps({"seconds": best, "ratios": ratios}))
    else:
        print(f"{best['ledger']:.2f} s  a process that reads {given.runs} runs from the ledger")
        print(f"{best['list']:.2f} s  the command until their list is shown: {ratios['list/ledger']:.2f} times")
        print(f"{best['json.loads']:.2f} s  json.loads of {given.rows} rows of {given.keys} metrics")
        print(f"{best['run']:.2f} s  the command until the run's first plot: {ratios['run/json.loads']:.2f} times")
    if given.check and max(best["list"], best["run"]) > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
