"""metrics.jsonl as columns: pieces of any size, restarts, damaged lines, what is no number."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import pytest

from nemotron_launch.reports import parts
from nemotron_launch.reports.metrics_file import MetricsFile


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(data: bytes) -> MetricsFile:
    metrics = MetricsFile()
    metrics.feed(data)
    return metrics


def columns(metrics: MetricsFile) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(s, v) for s, v in zip(metrics.steps(name), metrics.values(name), strict=True) if not math.isnan(v)]
        for name in metrics.names
    }


def test_each_metric_is_a_column_over_the_steps_that_have_it() -> None:
    metrics = read(lines({"step": 0, "val": 0.5}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "val": 0.7}))
    assert metrics.names == ["val", "loss"]
    assert columns(metrics) == {"val": [(0, 0.5), (2, 0.7)], "loss": [(1, 2.0), (2, 1.5)]}
    assert metrics.last == {"step": 2, "loss": 1.5, "val": 0.7}
    assert metrics.last_step == 2
    assert list(metrics.steps("nothing")) == list(metrics.values("nothing")) == []


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_pieces_of_any_size_give_the_same_columns(size: int) -> None:
    rng = random.Random(size)
    rows = []
    for step in range(1, 300):
        row: dict[str, object] = {"step": step, "time": 1e9 + step, "loss": rng.random(), "µ": rng.random()}
        if step % 10 == 0:
            row["val"] = rng.random() if step % 20 else None
        rows.append(row)
    data = lines(*rows[:200], *rows[150:])  # it went back once
    whole, pieces = read(data), MetricsFile()
    for start in range(0, len(data), size):
        pieces.feed(data[start : start + size])
    assert columns(pieces) == columns(whole)
    assert (pieces.last, pieces.offset, pieces.tail) == (whole.last, len(data), data[-64:])
    assert columns(whole)["loss"] == [(row["step"], row["loss"]) for row in rows]


def test_a_torn_line_waits_for_its_end() -> None:
    metrics = read(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert list(metrics.steps("loss")) == [1]
    metrics.feed(b'ss": 1.0}\n')
    assert columns(metrics) == {"loss": [(1, 2.0), (2, 1.0)]}
    assert metrics.problems == []


def test_a_last_line_without_an_end_counts_when_no_more_comes() -> None:
    metrics = read(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    metrics.end()
    assert list(metrics.steps("loss")) == [1, 2]
    torn = read(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    torn.end()
    assert (list(torn.steps("loss")), torn.problems) == ([1], [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "metrics.jsonl:17: is not a JSON object; the line is left out"),
        (b"[1, 2]", "metrics.jsonl:17: is not a JSON object; the line is left out"),
        (b'"step"', "metrics.jsonl:17: is not a JSON object; the line is left out"),
        (b"\xff\xfe", "metrics.jsonl:17: is not a JSON object; the line is left out"),
        (b"[" * 100_000, "metrics.jsonl:17: is not a JSON object; the line is left out"),
        (b"\0" * 100, "metrics.jsonl:17: is not a JSON object; the line is left out"),
        (b'{"loss": 1}', "metrics.jsonl:17: has no step; the line is left out"),
        (b'{"step": "three"}', "metrics.jsonl:17: has no step; the line is left out"),
        (b'{"step": true, "loss": 1}', "metrics.jsonl:17: has no step; the line is left out"),
        (b'{"step": 1.5, "loss": 1}', "metrics.jsonl:17: has no step; the line is left out"),
        (b'{"step": 1e300, "loss": 1}', "metrics.jsonl:17: has no step; the line is left out"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_a_damaged_line_is_named_once_and_the_rest_is_used(line: bytes, message: str) -> None:
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 41)]
    metrics = read(lines(*rows[:16]) + line + b"\n" + lines(*rows[16:]))
    assert metrics.problems == [message]
    assert columns(metrics)["loss"] == [(row["step"], row["loss"]) for row in rows]


def test_lines_that_look_whole_only_together_are_none() -> None:
    metrics = read(b'{"step": 1}, {"step": 2\n}\n{"step": 3, "loss": 1}\n')
    assert [problem.split(": ")[0] for problem in metrics.problems] == ["metrics.jsonl:1", "metrics.jsonl:2"]
    assert columns(metrics) == {"loss": [(3, 1.0)]}


def test_a_thousand_damaged_lines_are_counted_and_twenty_named() -> None:
    metrics = read(b"x\n" * 1000)
    assert (metrics.bad_lines, len(metrics.problems)) == (1000, 20)


def test_a_run_that_went_back_says_later_lines_only() -> None:
    """What was between is gone even where the later lines lack a metric: the earlier attempt never happened."""
    metrics = read(
        lines(
            {"step": 1, "loss": 3.0},
            {"step": 2, "loss": 2.0, "val": 0.1},
            {"step": 3, "loss": 1.0, "val": 0.2},
            {"step": 2, "loss": 2.5},
            {"step": 3, "loss": 1.5},
        )
    )
    assert columns(metrics) == {"loss": [(1, 3.0), (2, 2.5), (3, 1.5)], "val": []}
    assert metrics.restarts == 1


def test_two_lines_of_a_step_complete_each_other() -> None:
    metrics = read(lines({"step": 5, "time": 1.0, "loss": 2.0}, {"step": 5, "time": 2.0, "val": 0.5}))
    assert columns(metrics) == {"time": [(5, 1.0)], "loss": [(5, 2.0)], "val": [(5, 0.5)]}
    assert metrics.restarts == 0


def test_what_is_no_number_is_no_value() -> None:
    data = b'{"step": 1, "a": null, "b": NaN, "c": "text", "d": {"e": 1}, "f": 1%s, "g": true}\n' % (b"0" * 400)
    metrics = read(data)
    assert metrics.names == ["a", "b", "f", "g"]
    assert all(math.isnan(metrics.values(name)[0]) for name in "abf")
    assert metrics.values("g")[0] == 1
    assert metrics.problems == []


def test_names_without_end_do_not_fill_the_memory() -> None:
    metrics = read(lines(*({"step": step, f"name-{step}": 1.0} for step in range(5000))))
    assert len(metrics.names) == 2000
    assert metrics.problems == ["metrics.jsonl: more than 2000 different names; the rest is left out"]


def test_a_hundred_thousand_lines_take_about_as_long_as_parsing_them() -> None:
    """Measured beside json.loads of the same lines; 3 leaves room for a noisy machine, 1.0 to 1.3 is usual."""
    row = {f"train/metric_{i}": 0.1234567891 * (i + 1) for i in range(30)}
    text = lines(*({"step": step, "time": 1e9 + step, **row} for step in range(10_000)))
    began = time.process_time()
    for line in text.splitlines():
        json.loads(line)
    parsed = time.process_time() - began
    began = time.process_time()
    metrics = read(text)
    assert time.process_time() - began < 3 * parsed
    assert len(metrics.times) == 10_000


LONG_ROWS = [{"step": step, "time": 1e9 + step, "loss": 1 / step} for step in range(1, 2001)]


@pytest.mark.parametrize("rows", [LONG_ROWS, [*LONG_ROWS[:1500], *LONG_ROWS[900:]]], ids=["straight", "went back"])
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[object], processes: int
) -> None:
    data = lines(*rows[:700]) + b"oops\n" + lines(*rows[700:1300]) + b"[]\n" + lines(*rows[1300:]) + b'{"step": 9'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    monkeypatch.setattr(parts, "LONG", len(data) // processes - 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(processes)))
    whole, read_in_parts = read(data), MetricsFile()
    parts.read_long(read_in_parts, path)
    assert columns(read_in_parts) == columns(whole)
    assert read_in_parts.problems == whole.problems
    assert (read_in_parts.last, read_in_parts.offset, read_in_parts.tail) == (whole.last, whole.offset, whole.tail)
    for metrics in (whole, read_in_parts):
        metrics.feed(b'999, "loss": 0.5}\n')
    assert read_in_parts.last == {"step": 9999, "loss": 0.5}
    assert columns(read_in_parts) == columns(whole)


def test_a_file_that_is_not_long_is_left_to_one_process(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(*LONG_ROWS))
    metrics = MetricsFile()
    parts.read_long(metrics, path)
    parts.read_long(metrics, tmp_path / "nothing")
    assert metrics.offset == 0
