"""The server of `nemotron ui`: who it tells what, and what it says of runs that are hostile, broken or gone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.log_text import clean
from nemotron_launch.jobs.run import Run
from nemotron_launch.ui import places
from nemotron_launch.ui.server import open_server
from tests.jobs.rows import row
from tests.ui.conftest import Pages
from tests.ui.ledgers import damage

REPOSITORY = Path(__file__).resolve().parents[2]
PATHS = ("/", "/api/runs", "/api/report?run=a-run", "/run?run=a-run", "/assets/app.css", "/report?run=a-run")


def add(*runs: Run) -> None:
    with Ledger() as ledger:
        ledger.add(runs)


def finished(folder: Path, run_id: str = "a-run", lines: str = "", **fields: Any) -> Run:
    """A run that is over, with these metrics."""
    run = row(run_id, folder, **{"state": "finished", "exit_code": 0, "started": 1.0, "ended": 9.0, **fields})
    output = Path(run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.jsonl").write_text(lines)
    return run


def numbers(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "time": 100.0 + step, "train/loss": 1 / step}) + "\n" for step in steps)


# Who may see it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "wrong"])
def test_nothing_is_told_without_the_token(pages: Pages, tmp_path: Path, token: str) -> None:
    add(finished(tmp_path, lines=numbers(1)))
    for path in (*PATHS, f"/?token={token}"):
        status, headers, text = pages.ask(path, token=token)
        assert status == 403 and "token" in text, path
        assert "a-run" not in text and "Set-Cookie" not in headers, path


def test_the_token_goes_into_a_cookie_and_out_of_the_address(pages: Pages) -> None:
    status, headers, _ = pages.ask(f"/?token={pages.server.gate.token}", token="")
    assert (status, headers["Location"]) == (303, "/")
    name, _, more = headers["Set-Cookie"].partition("=")
    assert name == f"nemotron-{pages.port}" and "HttpOnly" in more and "SameSite=Lax" in more
    # Beside cookies of other servers here, whatever these write.
    other = f'a={{"x"; {name}={pages.server.gate.token}; b'
    assert pages.ask("/api/runs", token="", Cookie=other)[0] == 200


def test_a_name_that_was_made_to_lead_here_is_refused(pages: Pages) -> None:
    for host in ("evil.example", f"evil.example:{pages.port}", "127.0.0.1", "127.0.0.1:1", f"[::1]:{pages.port}", ""):
        status, _, text = pages.ask("/api/runs", Host=host)
        assert status == 421 and "rows" not in text, host
    assert pages.ask("/api/runs", Host=f"LocalHost:{pages.port}")[0] == 200


def test_a_page_of_another_site_may_link_here_and_not_read(pages: Pages) -> None:
    assert pages.ask("/api/runs", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="cors")[0] == 403
    assert pages.ask("/", Sec_Fetch_Site="same-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="iframe")[0] == 403
    assert pages.ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document")[0] == 200
    _, headers, _ = pages.ask("/api/runs", Origin="http://evil.example")
    assert not [name for name in headers if name.startswith("Access-Control")]


def test_it_only_answers_get(pages: Pages) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE"):
        status, headers, text = pages.ask("/api/runs", method=method)
        assert status == 405 and "rows" not in text and "Allow-Origin" not in str(headers), method
    status, _, text = pages.ask("/", method="HEAD")
    assert (status, text) == (200, "")


def test_no_path_leads_out_of_the_assets(pages: Pages) -> None:
    for path in (
        "../server.py",
        "..%2fserver.py",
        "%2e%2e/pages.py",
        "/etc/passwd",
        "app.css/../../page.py",
        "",
        "%00",
    ):
        assert pages.ask(f"/assets/{path}")[0] == 404, path
    for path in ("//etc/passwd", "/../../etc/passwd", "/%2e%2e/jobs.db", "/jobs.db", "/assets"):
        assert pages.ask(path)[0] == 404, path


def test_every_answer_keeps_to_itself(pages: Pages, tmp_path: Path) -> None:
    add(finished(tmp_path, lines=numbers(1)))
    for path in (*PATHS, "/nothing"):
        _, headers, text = pages.ask(path)
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        policy = headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy
        if not path.startswith("/report"):
            assert policy.startswith("default-src 'none'; script-src ") and "unsafe" not in policy and "*" not in policy
        assert not re.findall(r"(?:src|href)=\"?https?:", text)


def test_it_listens_on_this_machine_alone(pages: Pages) -> None:
    assert pages.server.socket.getsockname()[0] == "127.0.0.1"


# Runs ----------------------------------------------------------------------------------------------------------------

_BAD = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u202e'\"&"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_texts_stay_texts(pages: Pages, tmp_path: Path) -> None:
    texts = {"reason": _BAD, "overrides": (_BAD,), "profile": _BAD, "host": _BAD, "job_id": _BAD, "config": _BAD}
    name = "x" + _BAD.replace("/", "-")
    add(finished(tmp_path, name, json.dumps({"step": 1, _BAD: 1, "train/loss": 2}), **texts))
    quoted = quote(name, safe="")
    for path in ("/", f"/run?run={quoted}", f"/report?run={quoted}", f"/run?run=none-{quoted}"):
        tags = _Tags()
        tags.feed(pages.ask(path)[2])
        assert not [one for one in tags.found if one[0] == "img" or any(key.startswith("on") for key in one[1])], path
        scripts = [more for tag, more in tags.found if tag == "script"]
        assert path.startswith("/report") or all("src" in one or "application/json" in one.values() for one in scripts)


def test_the_list_is_told_once_and_then_what_is_new(pages: Pages) -> None:
    add(row("one", created=1.0), row("two", created=2.0, state="running"))
    first = pages.json("/api/runs")
    assert [one["run_id"] for one in first["rows"]] == ["two", "one"]
    again = pages.json(f"/api/runs?since={first['change']}")
    assert (again["rows"], again["gone"]) == ([], [])
    with Ledger() as ledger:
        ledger.change(ledger.find("one")[0], state="refused")
        ledger.remove(["two"])
    news = pages.json(f"/api/runs?since={first['change']}")
    assert [(one["run_id"], one["state"]) for one in news["rows"]] == [("one", "refused")]
    assert news["gone"] == ["two"]
    add(row("two", created=3.0))  # the name is taken again
    assert "two" not in pages.json(f"/api/runs?since={news['change']}")["gone"]


def test_secrets_in_overrides_are_masked(pages: Pages) -> None:
    add(row("one", overrides=("a.api_key=abc123xyz", "b.lr=1e-3", "c.name=hf_abcdefghijkl")))
    _, _, text = pages.ask("/")
    assert "abc123xyz" not in text and "hf_abc" not in text and "b.lr=1e-3" in text


def test_a_run_is_told_whole_and_then_only_its_news(pages: Pages, tmp_path: Path) -> None:
    run = finished(tmp_path, lines=numbers(1, 2, 3))
    add(run)
    whole = pages.json("/api/report?run=a-run")
    told, live = whole["report"]["runs"][0], whole["live"]["a-run"]
    assert told["metrics"]["axes"][told["metrics"]["of"]["train/loss"]["axis"]] == [1, 2, 3]
    with (Path(run.output_dir) / "metrics.jsonl").open("a") as file:
        file.write(numbers(4, 5))
    path = f"/api/news?run=a-run&mark={live['mark']}&step=3"
    news = _until(lambda: (one := pages.json(path)["runs"]["a-run"]) and one["last_step"] == 5 and one)
    # The last point that was known is told again: a later line of the same step may have completed it.
    assert news["metrics"] == {"axes": [[3, 4, 5]], "of": {
        "time": {"axis": 0, "y": [103, 104, 105]}, "train/loss": {"axis": 0, "y": [0.333333, 0.25, 0.2]},
    }}  # fmt: skip
    (Path(run.output_dir) / "metrics.jsonl").write_text(numbers(1))  # it went back
    assert _until(lambda: pages.json(path)["runs"]["a-run"] is None or None)


def _until(holds: Any) -> Any:
    end = time.monotonic() + 30
    while not (value := holds()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def test_a_corrupt_line_is_named_and_the_rest_shown(pages: Pages, tmp_path: Path) -> None:
    add(finished(tmp_path, lines=numbers(1) + '{"step": 2, "tr\n' + numbers(3)))
    run = pages.json("/api/report?run=a-run")["report"]["runs"][0]
    assert run["problems"] == ["metrics.jsonl:2: is not a JSON object; the line is left out"]
    assert run["last_step"] == 3


def test_a_run_that_is_gone_says_so(pages: Pages, tmp_path: Path) -> None:
    status, _, text = pages.ask("/run?run=nobody")
    assert status == 404 and "There is no run nobody: it may have been pruned." in text
    run = finished(tmp_path)
    add(run)
    (Path(run.output_dir) / "metrics.jsonl").unlink()
    Path(run.output_dir).rmdir()
    live = pages.json("/api/report?run=a-run")["live"]["a-run"]
    assert live["missing"] == "the output of a-run is gone"
    assert pages.ask("/run")[0] == 404 and pages.ask("/nothing")[0] == 404
    assert json.loads(pages.ask("/api/logs?run=nobody")[2]) == {
        "error": "There is no run nobody: it may have been pruned. What it made stays where it was."
    }


def test_a_damaged_ledger_is_one_message(pages: Pages, state: Path) -> None:
    add(row("one", state="finished"))
    assert not pages.json("/api/runs")["problem"]
    damage(state)
    told = pages.json("/api/runs")
    assert told["problem"].startswith(f"{state / 'jobs.db'}: ") and "move it away" in told["problem"]
    assert [one["run_id"] for one in told["rows"]] == ["one"]  # what was known stays
    assert pages.ask("/run?run=two")[0] == 500
    (state / "jobs.db").unlink()
    told = pages.json("/api/runs")
    assert (told["problem"], told["rows"]) == ("", [])


def test_an_executor_is_asked_at_one_pace_whatever_the_number_of_pages(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = places.refresh

    def counted(*arguments: Any) -> Any:
        asked.append(time.monotonic())
        return real(*arguments)

    monkeypatch.setattr(places, "refresh", counted)
    add(*(row(f"run-{n}", state="running", host="elsewhere") for n in range(5)))
    end = time.monotonic() + 2.5

    def look(n: int) -> None:
        while time.monotonic() < end:
            pages.json("/api/runs")
            pages.json(f"/api/report?run=run-{n % 5}")
            time.sleep(0.05)

    tabs = [threading.Thread(target=look, args=(n,)) for n in range(8)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    # Runs at work are asked after every 5 to 30 s, once more at first news: as by `jobs attach`.
    assert 1 <= len(asked) <= 2


# Logs ----------------------------------------------------------------------------------------------------------------


def test_logs_are_read_from_their_end_and_on(pages: Pages, tmp_path: Path) -> None:
    run = finished(tmp_path, state="running", host=os.uname().nodename)
    add(run)
    logs = Path(run.state_dir) / "logs" / "attempt-0"
    logs.mkdir(parents=True)
    log = logs / "node-0.log"
    log.write_bytes(b"".join(b"\x1b[31mline %06d\x1b[0m\n" % n for n in range(40_000)) + b"half")
    (logs / "node-1.log").write_text("another node\n")
    told = _until(lambda: (one := pages.json("/api/logs?run=a-run&source=")) and one["lines"] and one)
    assert told["sources"] == [{"attempt": 0, "name": "node-0"}, {"attempt": 0, "name": "node-1"}]
    assert told["source"] == "0/node-0" and told["cut"]
    assert told["lines"][-1] == "line 039999" and len(told["lines"]) == 1000
    with log.open("ab") as file:
        file.write(b" and the other\n 10%\r 99%\n")
    news = _until(
        lambda: (one := pages.json(f"/api/logs?run=a-run&source=0/node-0&from={told['next']}"))["lines"] and one
    )
    assert news["lines"] == ["half and the other", " 99%"] and news["first"] == told["next"]
    other = _until(lambda: (one := pages.json("/api/logs?run=a-run&source=0/node-1")) and one["lines"] and one)
    assert other["lines"] == ["another node"] and not other["cut"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b"plain \xc3\xa4\n", "plain ä"),
        (b"\x1b[1;31mred\x1b[0m \x1b[2K\x1b[1Gagain", "red again"),
        (b"\x1b]0;a title\x07text\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "textlink"),
        (b"10%\r50%\r100%\r\n", "100%"),
        (b"\x1b(Bbox\x1b7\x1b8 \x1b[38;2;1;2;3mcolour\x1b[m", "box colour"),
        (b"bell\x07 back\x08 \xff \xe2\x80\xae", "bell\ufffd back\ufffd \ufffd \ufffd"),
        (b"cut \x1b[", "cut "),
        (b"a\tb", "a\tb"),
    ],
)
def test_a_line_of_a_log_is_what_a_terminal_would_leave(written: bytes, read: str) -> None:
    assert clean(written) == read


# The command ---------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_said_and_the_next_one_used(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"port {pages.port} is taken") as raised:
        open_server(pages.port)
    assert raised.value.where == "--port"
    monkeypatch.setattr("nemotron_launch.ui.server.PORT", pages.port)
    server = open_server(None)
    assert server.gate.port > pages.port
    server.close()


def test_the_browser_is_sent_to_a_file_so_that_no_command_line_has_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\n')
    browser.chmod(0o755)
    code = "import sys; from nemotron_launch.ui.opening import *; print(open_browser(sys.argv[1], Path(sys.argv[2])))"
    command = [sys.executable, "-c", code, "http://127.0.0.1:1/?token=secret&<b>", str(tmp_path / "state")]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DISPLAY": ":9", "BROWSER": f"{browser} %s"}
    assert subprocess.run(command, env=environ, capture_output=True, text=True).stdout == "True\n"
    file = tmp_path / "state" / "ui.html"
    assert _until((tmp_path / "given").exists) and (tmp_path / "given").read_text().strip() == file.as_uri()
    assert "token=secret&amp;&lt;b&gt;" in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    environ = {name: value for name, value in environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    assert subprocess.run(command, env=environ, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_end(state: Path, number: int) -> None:
    command = [sys.executable, "-m", "nemotron_launch", "ui", "--no-browser", "--port", "0"]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout and process.stderr
        try:
            address = process.stdout.readline().strip()
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{32})", address)
            assert found, address + process.stderr.read()
            with socket.create_connection(("127.0.0.1", int(found[1])), timeout=30) as client:
                client.sendall(f"GET /?token={found[2]} HTTP/1.1\r\nHost: 127.0.0.1:{found[1]}\r\n\r\n".encode())
                assert client.recv(100).startswith(b"HTTP/1.1 303 ")
                process.send_signal(number)  # with a connection open
                assert process.wait(30) == 0
        finally:
            process.kill()
        assert process.stderr.read() == ""
