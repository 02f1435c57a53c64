"""The page as a file: whole, the same every time, with hostile texts kept where they belong."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.reports.page import ASSETS, SCRIPTS, STYLES, asset, embedded, page
from nemotron_launch.reports.run_data import report_data
from nemotron_launch.reports.sources import open_folder, update
from tests.reports.conftest import HOSTILE, make_run


class Elements(HTMLParser):
    """The tags of a page, and the texts of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    one = open_folder(make_run(tmp_path / "a-run"))
    update([one], print)
    return report_data([one])


def test_it_is_one_file_of_ascii_that_loads_nothing(data: dict[str, Any]) -> None:
    text = page(data)
    assert text.isascii()
    tags = Elements(text).tags
    assert not [attributes for _, attributes in tags if {"src", "href"} & attributes.keys()]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|importScripts|sendBeacon", text)


def test_its_policy_allows_exactly_what_is_in_it(data: dict[str, Any]) -> None:
    found = Elements(page(data))
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy
    for name in (*SCRIPTS, *STYLES):
        digest = base64.b64encode(hashlib.sha256(asset(name).encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert sum(tag == "script" for tag, _ in found.tags) == len(SCRIPTS) + 1


def test_the_same_data_give_the_same_bytes(data: dict[str, Any]) -> None:
    assert page(data) == page(json.loads(json.dumps(data)))


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """As a name, a metric, a config's key and value, a sample, a problem: none opens or closes an element."""
    folder = make_run(tmp_path / "x<img src=x onerror=alert(1)>", evil={HOSTILE: HOSTILE})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, HOSTILE + "\ud800": 1.0, "train/<b>": 2.0}) + "\n")
    (folder / "samples.jsonl").write_text(
        json.dumps({"step": 1, "answer": HOSTILE + "\ud800", "question": HOSTILE}) + "\n"
    )
    one = open_folder(folder)
    update([one], print)
    data = report_data([one])
    plain = page(report_data([open_folder(make_run(tmp_path / "plain"))]))
    text = page(data, title=HOSTILE)
    assert [tag for tag, _ in Elements(text).tags] == [tag for tag, _ in Elements(plain).tags]
    kept = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert kept
    assert json.loads(kept[1]) == data, "and they come through unchanged"


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "\u2028", "&lt;", "\ud800", "\0"])
def test_embedded_data_hold_no_letter_that_a_page_could_take_for_its_own(text: str) -> None:
    written = embedded({text: [text]})
    assert not set("<>&") & set(written)
    assert written.isascii()
    assert json.loads(written) == {text: [text]}


def test_the_title_is_the_run_or_their_number(data: dict[str, Any]) -> None:
    assert "<title>a-run</title>" in page(data)
    assert "<title>2 runs</title>" in page({**data, "runs": data["runs"] * 2})
    assert "<title>My run</title>" in page(data, title="My run")


def test_the_plotting_library_is_there_with_its_licence() -> None:
    text = (ASSETS / "uplot-LICENSE.txt").read_text()
    assert "MIT License" in text
    assert "Leon Sorokin" in text
    version = re.search(r"\(v([\d.]+)\)", (ASSETS / SCRIPTS[0]).read_text())
    assert version
    assert version[1] in SCRIPTS[0]


def test_its_own_scripts_make_no_html_of_texts() -> None:
    """Elements are made, texts are set: nothing that a run wrote is ever parsed."""
    for name in SCRIPTS[1:]:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", asset(name))
