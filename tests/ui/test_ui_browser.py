"""`nemotron ui` in a real browser: what a person sees and does, on a laptop and on a phone."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron_launch.backends.local_client import OUT
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run, State
from tests.browser import LAPTOP, PHONE, Browser
from tests.conftest import Nemotron
from tests.jobs.rows import row
from tests.live_runs import TOTAL, LiveRun, add_live_step, live_run
from tests.ui.conftest import Pages
from tests.ui.ledgers import damage

pytestmark = pytest.mark.slow
STATES: tuple[State, ...] = ("finished", "finished", "finished", "failed", "cancelled", "stopped", "lost")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def add_runs(folder: Path, count: int, waiting: int = 3) -> None:
    """So many runs, every tenth a point of a sweep, the newest first in time."""
    chance = random.Random(0)
    now, found = time.time(), list[Run]()
    for n in range(count):
        sweep, point = (f"sweep-{n // 10:03}", n % 10) if n // 10 % 10 == 5 else ("", None)
        state: State = "pending" if n < waiting else chance.choice(STATES)
        found.append(
            row(
                f"{sweep}.{point}" if sweep else f"run-{n:04}", folder, sweep=sweep, point=point, state=state,
                step="sft/small" if n % 3 else "rl/nemo_rl/rlvr", profile="dgx" if n % 2 else "local", host="elsewhere",
                created=now - 600 * n, started=None if state == "pending" else now - 600 * n + 60,
                ended=None if state == "pending" else now - 600 * n + 400,
                exit_code=1 if state == "failed" else None, reason="it fell over" if state == "failed" else "",
                overrides=(f"optim.lr={n}e-6",) if sweep or n % 4 == 0 else (),
            )
        )  # fmt: skip
    with Ledger() as ledger:
        ledger.add(found)


def quiet(browser: Browser) -> None:
    """Nothing in the console, no request to anybody else, no scrolling sideways."""
    assert browser.complaints() == []
    assert browser.strangers() == [] and browser.requests()
    assert browser.overflow() == 0


def shown(browser: Browser) -> list[str]:
    return browser.texts(".list tbody th a")


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_a_thousand_runs_are_listed_found_and_filtered(
    pages: Pages, browser: Browser, tmp_path: Path, width: int
) -> None:
    add_runs(tmp_path, 1000)
    browser.open(pages.address, width=width, dark=width == PHONE)
    assert browser.run("return location.href") == f"{pages.base}/"  # the token is not in it
    browser.until("return document.querySelectorAll('.list tbody tr').length === 910", "all runs, sweeps as one row")
    assert shown(browser)[:2] == ["run-0000", "run-0001"]
    assert "sweep of 10 points" in browser.text("tr[data-run=sweep-005]")
    browser.type("#search", "fell optim.lr=8e-6")
    browser.until("return document.querySelectorAll('.list tbody tr').length < 9", "the search")
    assert "run-0008" in shown(browser) or browser.text(".empty").startswith("No run matches")
    browser.driver.switch_to.active_element.send_keys("\ue00c")  # Escape
    browser.click(".chip[data-state=failed]")
    assert set(browser.texts(".list tbody tr:not(.sweep) .state")) == {"failed, exit 1"}
    assert browser.run("return location.search") == "?state=failed"
    browser.click(".chip[data-state=failed]")
    browser.click("option[value='rl/nemo_rl/rlvr']")
    assert shown(browser)[:2] == ["run-0000", "run-0003"]
    browser.click("tr[data-run=sweep-005] .fold")
    assert browser.text("tr.point .c-run").startswith("point ")
    quiet(browser)


def test_the_list_is_sorted_and_walked_by_keys(pages: Pages, browser: Browser, tmp_path: Path) -> None:
    add_runs(tmp_path, 40)
    browser.open(pages.address)
    browser.click("[data-sort=run]")
    assert shown(browser)[0] == "run-0000" and browser.text("[aria-sort=ascending]").startswith("Run")
    browser.click("[data-sort=run]")
    assert shown(browser)[0] == "run-0039"
    keys = browser.driver.switch_to.active_element.send_keys
    keys("/run-000")
    assert browser.run("return document.getElementById('search').value") == "run-000"
    keys("\ue015")  # arrow down: into the list
    browser.driver.switch_to.active_element.send_keys("x")
    browser.driver.switch_to.active_element.send_keys("jx")
    assert browser.text(".chosen span") == "2 runs chosen"
    browser.driver.switch_to.active_element.send_keys("c")
    browser.until("return location.pathname === '/run'", "the comparison")
    assert browser.run("return new URLSearchParams(location.search).getAll('run').length") == 2
    browser.until("return document.querySelector('h1')", "the runs")
    quiet(browser)


@pytest.fixture
def live(pages: Pages, tree: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRun]:
    """A run at work that has made three steps, in the ledger of the pages."""
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(pages.server.rows.folder))
    add_live_step(tree)
    with live_run(nemotron) as run:
        yield run


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_a_run_is_seen_as_it_goes_on(pages: Pages, browser: Browser, live: LiveRun, width: int) -> None:
    browser.open(pages.address, width=width)
    row_ = f"tr[data-run='{live.run_id}']"
    browser.until(f"return document.querySelector(\"{row_}\")?.innerText.includes('running')", "the run in the list")
    browser.click(f"{row_} th a")
    says = "return document.getElementById('report')?.innerText.includes('{}')"
    browser.until(says.format(f"step 3 of {TOTAL}"), "three steps")
    browser.until("return document.querySelector('.u-over')", "a plot")
    before = browser.text("#plot-loss .legend b")
    for step in (9, 15):
        live.go_on(step)
        browser.until(says.format(f"step {step} of {TOTAL}"), f"step {step}")
    assert browser.text("#plot-loss .legend b") != before
    live.end(7)
    browser.until("return document.querySelector('.head .state').innerText === 'failed, exit code 7'", "the end")
    quiet(browser)


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_logs_are_followed(pages: Pages, browser: Browser, live: LiveRun, width: int) -> None:
    browser.open(pages.address, width=width, dark=True)
    browser.driver.get(f"{pages.base}/run?run={live.run_id}#logs")
    lines = "return [...document.querySelectorAll('.log .line:not([hidden])')].map(e => e.textContent)"
    browser.until("return document.querySelectorAll('.log .line').length === 3", "three lines")
    assert browser.run(lines)[2].startswith("step 3 loss 1.")
    live.go_on(60)
    browser.until("return document.querySelectorAll('.log .line').length === 60", "sixty lines")
    assert "The end of the log" not in browser.text(".log")
    at_end = "const a = document.querySelector('.log'); return a.scrollHeight - a.scrollTop - a.clientHeight < 5"
    browser.until(at_end, "the end in view")
    browser.type(".logbar input[type=search]", "step 4")
    assert [line[:7] for line in browser.run(lines)] == ["step 4 ", *(f"step 4{n}" for n in range(10))]
    live.end(0)
    browser.until("return document.querySelectorAll('.log .line').length === 61", "the last words")
    assert browser.run("return document.querySelector('.log .line:last-of-type b')") is None  # <b> is text
    quiet(browser)


def test_the_job_script_makes_way_for_the_first_node(pages: Pages, browser: Browser, tmp_path: Path) -> None:
    run = row("a-run", tmp_path, state="running", host=os.uname().nodename)
    with Ledger() as ledger:
        ledger.add([run])
    logs = Path(run.state_dir) / "logs" / "attempt-0"
    logs.mkdir(parents=True)
    (Path(run.state_dir) / OUT).write_text("the node begins\n")
    browser.open(pages.address)
    browser.driver.get(f"{pages.base}/run?run=a-run#logs")
    lines = "return [...document.querySelectorAll('.log .line')].map(e => e.textContent).join() === '{}'"
    browser.until(lines.format("the node begins"), "the script's line")
    (logs / "node-0.log").write_text("step 1\nstep 2\n")
    browser.until(lines.format("step 1,step 2"), "the node's lines")
    quiet(browser)


def test_hostile_runs_do_nothing(pages: Pages, browser: Browser, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "-")
    bad = row(name, tmp_path, state="failed", reason=HOSTILE, overrides=(HOSTILE,), profile=HOSTILE, config=HOSTILE)
    output = Path(bad.output_dir)
    output.mkdir(parents=True)
    rows = [{"step": n, "time": n, "train/loss": 1 / n, f"train/{HOSTILE}": n} for n in range(1, 5)]
    (output / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (output / "config.yaml").write_text(json.dumps({"a": HOSTILE, HOSTILE: 1}))
    (output / "samples.jsonl").write_text(json.dumps({"step": 1, "question": HOSTILE, "answer": HOSTILE, "reward": 1}))
    with Ledger() as ledger:
        ledger.add([bad])
    browser.open(pages.address)
    assert name in browser.text(".list")
    browser.click(".list tbody th a")
    browser.until("return document.querySelector('.u-over')", "a plot")
    assert name in browser.text("h1")
    browser.driver.get(browser.run("return document.querySelector('a.save').href").replace("save=", ""))
    browser.until("return document.querySelector('.u-over')", "the report")
    assert browser.run("return window.hacked") is None
    quiet(browser)


def test_what_is_wrong_is_said_in_the_page(pages: Pages, browser: Browser, tmp_path: Path, state: Path) -> None:
    browser.open(pages.address)
    assert "There are no runs yet" in browser.text(".empty") and "nemotron steps run" in browser.text(".empty")
    add_runs(tmp_path, 1, waiting=0)
    browser.until("return document.querySelectorAll('.list tbody tr').length === 1", "a run that is new")
    damage(state)
    browser.until("return document.querySelector('.banner')?.innerText.includes('move it away')", "the ledger's error")
    assert len(browser.texts(".list tbody tr")) == 1
    quiet(browser)
    pages.server.shutdown()
    pages.server.close()
    browser.until("return document.querySelector('[data-kind=server]')?.innerText.includes('has ended')", "the end")


def test_it_can_be_read_without_eyes(pages: Pages, browser: Browser, tmp_path: Path) -> None:
    """Every control has a name, states are words, and nothing is reached by the mouse alone."""
    add_runs(tmp_path, 60)
    unnamed = """return [...document.querySelectorAll('button, input, select, a')].filter(one => one.offsetParent &&
        !(one.innerText.trim() || one.getAttribute('aria-label') || one.title ||
          one.closest('label')?.innerText.trim()))
        .map(one => one.outerHTML)"""
    faint = _contrast()
    for path in ("/", "/run?run=run-0004", "/run?run=run-0004#logs"):
        for dark in (False, True):
            browser.open(pages.address, dark=dark)
            browser.driver.get(pages.base + path)
            browser.until("return document.querySelector('.list tbody tr, .head, .log')", "the page")
            assert browser.run(unnamed) == []
            assert browser.run(faint) == [], (path, dark)
    assert browser.run("return document.documentElement.lang") == "en"


def _contrast() -> str:
    """Texts of the list's own parts below 4.5 to 1 against what is behind them (WCAG 2.2, 1.4.3)."""
    return """
    const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const parse = (text) => {
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = text;
      pen.fillRect(0, 0, 1, 1);
      return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const linear = (value) => (value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
    const light = (colour) => [.2126, .7152, .0722].reduce((sum, part, i) => sum + part * linear(colour[i] / 255), 0);
    const behind = (one) => {
      for (let each = one; each; each = each.parentElement) {
        const colour = parse(getComputedStyle(each).backgroundColor);
        if (colour[3] > 200) return colour;
      }
      return [255, 255, 255, 255];
    };
    const found = new Set();
    for (const one of document.querySelectorAll('.top *, .filters *, .chips *, .list tr *, .logbar *')) {
      const written = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
      if (!written || !one.offsetParent) continue;
      const [a, b] = [light(parse(getComputedStyle(one).color)), light(behind(one))];
      const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      if (ratio < 4.5) found.add(`${one.className} ${one.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
    }
    return [...found];"""
