"""The report in a real browser: drawn without a complaint or a request, at both widths; what can be pressed works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_launch.reports.page import page
from nemotron_launch.reports.run_data import report_data
from nemotron_launch.reports.sources import open_folder, update
from tests.browser import LAPTOP, PHONE, Browser
from tests.reports.conftest import HOSTILE, make_run

pytestmark = pytest.mark.slow
WARNING = {
    "step": "rl/nemo_rl/rlvr", "when": "Rewards hardly differ.", "then": "Raise grpo.num_generations_per_prompt to 16.",
    "seen": "train/reward is 1.", "metrics": ["train/reward"], "parameters": ["grpo.num_generations_per_prompt"],
}  # fmt: skip
RLVR = {"kind": "run", "step": "rl/nemo_rl/rlvr", "config": "tiny", "state": "finished", "places": []}
FILE = {"id": "/data/" + HOSTILE, "kind": "source", "step": "", "config": "", "state": "", "places": []}
LINEAGE = {
    "roots": ["run@1"],
    "nodes": [{**RLVR, "id": "run@1"}, {**RLVR, "id": "sft@1"}, FILE],
    "links": [
        {"maker": FILE["id"], "user": "sft@1", "type": "training_jsonl", "key": "data.train.data_path"},
        {"maker": "sft@1", "user": "run@1", "type": "checkpoint_megatron", "key": "policy.x"},
    ],
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose texts are hostile."""
    folder = make_run(tmp_path_factory.mktemp("one") / "run-0", evil={HOSTILE: HOSTILE})
    with (folder / "samples.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 99, "kind": "train", "question": HOSTILE, "answer": HOSTILE, "reward": 1}) + "\n"
        )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("oops\n")
    files = open_folder(folder)
    update([files], print)
    path = folder / "page.html"
    path.write_text(page(report_data([files], warnings={files.name: [WARNING]}, lineage=LINEAGE)))
    return path


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of six runs that differ in a number and in a word."""
    root = tmp_path_factory.mktemp("several")
    files = []
    for i in range(6):
        optimizer = {"optimizer": {"lr": 10.0 ** -(i + 3), "kind": "adam" if i % 2 else "sgd"}}
        files.append(open_folder(make_run(root / f"run-{i}", speed=1 / (i + 1), policy=optimizer)))
    update(files, print)
    path = root / "page.html"
    path.write_text(page(report_data(files)))
    return path


def shown(browser: Browser, what: str = "canvas") -> int:
    return int(browser.run(f"return document.querySelectorAll({what!r}).length"))


def drag(browser: Browser, selector: str) -> None:
    """With the mouse, over a third of an element's width."""
    from selenium.webdriver import ActionChains

    found = browser.run(
        "const e = document.querySelector(arguments[0]);"
        "e.scrollIntoView({block: 'center', behavior: 'instant'}); return e",
        selector,
    )
    step = found.size["width"] // 6
    actions = ActionChains(browser.driver, duration=20).move_to_element(found).move_by_offset(-step, 0).click_and_hold()
    actions.move_by_offset(step, 4).move_by_offset(step, 0).release().perform()


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
@pytest.mark.parametrize("which", ["one", "several"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_drawn_without_a_complaint_or_a_request(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int, dark: bool
) -> None:
    path = request.getfixturevalue(which)
    browser.open(path, width=width, dark=dark)
    browser.until("return document.querySelectorAll('.plot canvas').length > 0", "a plot")
    assert browser.run("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
    browser.run("window.scrollTo(0, document.body.scrollHeight)")
    browser.until("return document.getBoundingClientRect ? true : document.querySelector('.config details')", "config")
    assert browser.overflow() <= 0
    assert browser.complaints() == []
    assert browser.requests() == [path.resolve().as_uri()]


def test_hostile_texts_are_shown_and_not_run(browser: Browser, one: Path) -> None:
    browser.open(one)
    browser.until("return document.querySelectorAll('.plot canvas').length > 0", "a plot")
    assert browser.run("return document.title") == "run-0"
    assert "document.title='pwned'" in browser.text(".samples")
    browser.type(".config input, #section-config input", "evil")
    assert "document.title='pwned'" in browser.text("#section-config")


def test_a_warning_says_what_to_change_and_leads_to_its_plot(browser: Browser, one: Path) -> None:
    browser.open(one)
    assert "Rewards hardly differ." in browser.text(".warnings")
    assert browser.texts(".warning code") == ["grpo.num_generations_per_prompt"]
    assert "metrics.jsonl:62: is not a JSON object" in browser.text(".warning.bad")
    browser.click(".warning a.jump")
    assert browser.run("return location.hash") == "#plot-reward"
    assert browser.run("return document.getElementById('plot-reward').getBoundingClientRect().top") < 900


def test_the_state_of_a_run_is_told_at_its_head(browser: Browser, one: Path) -> None:
    browser.open(one)
    head = browser.text(".head")
    assert "run-0" in head
    assert "step 60 of 60" in head
    assert "held-out reward" in head.lower()


def test_smoothing_log_time_and_zoom_redraw_every_plot(browser: Browser, one: Path) -> None:
    browser.open(one)
    browser.until("return document.querySelectorAll('.plot canvas').length > 2", "plots")
    before = shown(browser)
    browser.run(
        "const s = document.querySelector('input[type=range]'); s.value = 90; s.dispatchEvent(new Event('input'))"
    )
    assert browser.text(".tools output") == "0.90"
    browser.click(".tools > .icon:not([hidden])")
    browser.run("document.querySelectorAll('.choice button')[1].click()")
    assert "after" not in browser.text(".legend")
    browser.run("document.querySelectorAll('.choice button')[0].click()")
    drag(browser, "#plot-reward .u-over")
    see_all = "[...document.querySelectorAll('.tools .icon')].find(b => b.textContent === 'see all')"
    browser.until(f"return !{see_all}.hidden", "the zoom")
    browser.run(f"{see_all}.click()")
    assert browser.run(f"return {see_all}.hidden")
    assert shown(browser) >= before
    assert browser.complaints() == []


def test_what_never_moves_is_drawn_when_asked_for(browser: Browser, one: Path) -> None:
    browser.open(one)
    assert "Truncated answers" in browser.text("#section-length .still")
    browser.run("document.querySelector('#section-length .still button').click()")
    browser.run("document.querySelector('#plot-truncation').scrollIntoView({behavior: 'instant'})")
    browser.until("return !!document.querySelector('#plot-truncation canvas')", "the plot")


def test_other_metrics_are_drawn_when_asked_for(browser: Browser, one: Path) -> None:
    browser.open(one)
    browser.run("document.querySelector('#section-other-metrics > button').click()")
    browser.run("document.querySelector('#section-other-metrics').scrollIntoView()")
    browser.until("return document.querySelectorAll('#section-other-metrics canvas').length > 0", "the plots")


def test_samples_are_sorted_and_searched(browser: Browser, one: Path) -> None:
    browser.open(one)
    browser.run(
        "[...document.querySelectorAll('#section-samples .choice button')].find(b => b.textContent === 'worst').click()"
    )
    assert browser.texts(".sample .reward")[0] == "reward 0"
    browser.type("#section-samples input", "sort 17:")
    assert browser.texts(".sample .question") == ["sort 17:"]


def test_the_config_is_searched_and_opened(browser: Browser, one: Path) -> None:
    browser.open(one)
    browser.type("#section-config input", "optimizer.lr")
    assert browser.texts("#section-config td") == ["policy.megatron_cfg.optimizer.lr", "0.0001"]


def test_lineage_is_drawn_from_left_to_right(browser: Browser, one: Path) -> None:
    browser.open(one)
    rows = browser.run("""
        return [...document.querySelectorAll('.lineage g')].map(
            g => [g.querySelector('text').textContent, +g.querySelector('rect').getAttribute('x')])
    """)
    left = dict(rows)
    source = next(name for name in left if "pwned" in name or "31m" in name)
    assert left[source] < left["sft@1"] < left["run@1"]
    assert shown(browser, ".lineage path") == 2


def test_runs_are_sorted_hidden_and_told_apart(browser: Browser, several: Path) -> None:
    browser.open(several)
    heads = browser.texts(".runs thead th")
    assert any("lr" in head for head in heads)
    assert any("held-out reward" in head for head in heads)
    browser.run("document.querySelector('.runs th[title=\"policy.optimizer.lr\"] button').click()")
    assert browser.texts(".runs tbody td:first-child")[0] == "run-5", "the least learning rate"
    browser.run("document.querySelector('.runs tbody input').click()")
    assert shown(browser, ".runs tbody tr.off") == 1
    assert shown(browser, ".parallel path.off") == 1
    browser.until("return document.querySelectorAll('.plot canvas').length > 0", "plots again")


def test_a_brush_keeps_the_runs_within(browser: Browser, several: Path) -> None:
    browser.open(several)
    browser.until("return document.querySelectorAll('.parallel rect.hit').length > 2", "the axes")
    brush = """
        const hit = document.querySelector('.parallel rect.hit'), box = hit.getBoundingClientRect();
        const at = (type, y) => hit.dispatchEvent(new PointerEvent(type,
            {bubbles: true, pointerId: 1, clientX: box.left + 18, clientY: box.top + box.height * y}));
        hit.setPointerCapture = () => {};
        at('pointerdown', 0); at('pointermove', .5); at('pointerup', .5);
    """
    browser.run(brush)
    hidden = shown(browser, ".parallel path.off")
    assert 0 < hidden < 6
    assert shown(browser, ".runs tbody tr.off") == hidden
    browser.run("document.querySelector('.runs thead input').click()")
    assert shown(browser, ".parallel path.off") == 0


def test_differences_of_configs_are_set_apart(browser: Browser, several: Path) -> None:
    browser.open(several)
    different = ["policy.optimizer.lr", "policy.optimizer.kind"]
    assert browser.texts("#section-config td:first-child") == different
    browser.run("document.querySelector('#section-config input[type=checkbox]').click()")
    browser.run("for (const one of document.querySelectorAll('#section-config details')) one.open = true")
    assert browser.texts("#section-config tr.differs td:first-child") == different
    assert "grpo.seed" in browser.texts("#section-config td:first-child")


def test_the_theme_is_changed_and_news_are_drawn(browser: Browser, one: Path) -> None:
    browser.open(one)
    browser.click(".brand button")
    assert browser.run("return document.documentElement.dataset.theme") == "dark"
    browser.run("""
        const data = JSON.parse(document.getElementById('data').textContent);
        data.runs[0].last_step = 61; data.runs[0].state = 'running';
        const reward = data.runs[0].metrics.of['train/reward'];
        data.runs[0].metrics.axes[reward.axis].push(61);
        for (const curve of Object.values(data.runs[0].metrics.of)) {
            if (curve.axis === reward.axis) curve.y.push(curve === reward ? 0.125 : curve.y.at(-1));
        }
        window.before = document.querySelector('#plot-reward canvas');
        document.querySelector('#section-config input').value = 'kept';
        Nemotron.show(data);
    """)
    assert "running" in browser.text(".head")
    assert "step 61" in browser.text(".head")
    assert "0.125" in browser.text("#plot-reward .legend")
    assert browser.run("return document.querySelector('#plot-reward canvas') === window.before"), "drawn on, not anew"
    assert browser.run("return document.querySelector('#section-config input').value") == "kept"
    assert browser.complaints() == []
    browser.run("localStorage.clear()")
