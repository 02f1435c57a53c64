"""A run as data: small whatever it has written, true to it, without secrets, the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.reports.metrics_file import MetricsFile
from nemotron_launch.reports.run_data import differences, flat_config, report_data, run_data, thinned
from nemotron_launch.reports.sources import RunFiles, open_folder, update
from tests.reports.conftest import make_run


def opened(folder: Path) -> RunFiles:
    one = open_folder(folder)
    update([one], print)
    return one


def test_a_short_curve_is_told_as_it_is() -> None:
    assert thinned([1, 2, 3], [0.5, float("nan"), 2.0], 10) == ([1, 2, 3], {"y": [0.5, None, 2]})


def test_a_long_curve_keeps_the_extremes_of_every_point() -> None:
    steps = list(range(100_000))
    values = [1.0] * 100_000
    values[77_777] = 9.0
    values[5] = float("nan")
    x, curve = thinned(steps, values, 1000)
    assert len(x) == len(curve["y"]) == 1000
    assert max(value for value in curve["hi"] if value is not None) == 9
    at = curve["hi"].index(9)
    assert x[at] == pytest.approx(77_777, abs=100)
    assert (curve["lo"][at], curve["y"][at]) == (1, pytest.approx(1.08))
    assert curve["y"][0] == 1, "what is no number is not counted"


def test_a_point_without_any_number_is_null() -> None:
    nan = float("nan")
    assert thinned([1, 2, 3, 4], [nan, nan, 1.0, 3.0], 2)[1] == {"y": [None, 2], "lo": [None, 1], "hi": [None, 3]}


def test_data_of_a_long_run_are_small_and_plain_json(tmp_path: Path) -> None:
    data = report_data([opened(make_run(tmp_path / "run", steps=20_000))])
    text = json.dumps(data, allow_nan=False)
    assert len(text) < 1_000_000
    run = data["runs"][0]
    assert (run["last_step"], run["total_steps"]) == (20_000, 60)
    assert run["last"]["train/unheard_of"] == 60_000
    curve = run["metrics"]["of"]["train/reward"]
    assert len(curve["y"]) == len(run["metrics"]["axes"][curve["axis"]]) == 1000


def test_many_runs_share_the_points_of_a_page(tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=2000)
    data = report_data([opened(tmp_path / "run") for _ in range(40)])
    assert len(data["runs"][0]["metrics"]["of"]["train/loss"]["y"]) == 150
    assert len(json.dumps(data)) < 3_000_000


def test_curves_of_the_same_steps_share_their_list(tmp_path: Path) -> None:
    metrics = run_data(opened(make_run(tmp_path / "run")))["metrics"]
    assert len(metrics["axes"]) == 3, "all lines, training, validation"
    assert metrics["axes"][metrics["of"]["validation/accuracy"]["axis"]] == [0, 20, 40, 60]
    assert metrics["of"]["time"]["y"][:2] == [1.8e9, 1.8e9 + 2], "not rounded to six digits"


def test_time_is_shared_out_over_the_parts_of_steps_and_validation(tmp_path: Path) -> None:
    shares = run_data(opened(make_run(tmp_path / "run")))["time_shares"]
    assert {one["part"]: one["seconds"] for one in shares} == {
        "generation": 1.2, "reward": 0.6, "policy training": 3, "rest of the step": 0.6, "validation": 0.4,
    }  # fmt: skip


def test_the_same_run_gives_the_same_data(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    first, again = (json.dumps(report_data([opened(tmp_path / "run")])) for _ in range(2))
    assert first == again


def test_a_run_without_anything_has_data_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    data = report_data([opened(tmp_path)])
    assert data["figures"] == []
    assert data["runs"][0]["last_step"] is None
    json.dumps(data, allow_nan=False)


def test_configs_are_told_by_key_and_differences_are_found() -> None:
    a = flat_config({"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 1}, {"e": 2}], "f": {}, "output_dir": "/x"})
    assert a == {"a.b": 1, "a.c": [1, 2], "d.0.e": 1, "d.1.e": 2, "f": "{}", "output_dir": "/x"}
    assert differences([{"a": 1, "b": 2, "output_dir": "x"}, {"a": 1, "b": 3, "output_dir": "y"}]) == ["b"]
    assert differences([{"a": 1}, {}]) == ["a"]
    assert differences([{"a": 1}]) == differences([]) == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"env": {"judge": {"api_key": "s3cret-value"}}}, "env.judge.api_key"),
        ({"logger": {"wandb": {"WANDB_API_KEY": "s3cret-value"}}}, "logger.wandb.WANDB_API_KEY"),
        ({"hf_token": "s3cret-value"}, "hf_token"),
        ({"passwords": ["s3cret-value"]}, "passwords"),
        ({"url": "https://me:s3cret-value@host/x"}, "url"),
        ({"args": ["--token", "hf_s3cretvaluethatislong"]}, "args"),
        ({"note": "use nvapi-s3cret-value please"}, "note"),
    ],
)
def test_secrets_are_masked(config: dict[str, Any], key: str) -> None:
    shown = json.dumps(flat_config(config)[key])
    assert "s3cret" not in shown
    assert "\\u2022" in shown


@pytest.mark.parametrize(
    "config",
    [{"data": {"prompt_key": "question"}}, {"max_tokens": 8}, {"tokenizer": "bytes"}, {"chosen_key": "chosen"}],
)
def test_what_is_no_secret_is_shown(config: dict[str, Any]) -> None:
    assert "\\u2022" not in json.dumps(flat_config(config))


def test_texts_of_samples_are_cut_and_of_any_type(tmp_path: Path) -> None:
    make_run(tmp_path, samples=False)
    rows = [{"step": "x", "answer": "a" * 10_000, "reward": float("nan")}, {"answer": ["b"], "question": None}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    long, odd = run_data(opened(tmp_path))["samples"]
    assert long["answer"] == "a" * 4000 + " … (10000 characters)"
    assert (long["step"], long["reward"], odd["answer"], odd["question"]) == (None, None, "['b']", "")


def test_problems_are_told(tmp_path: Path) -> None:
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("oops\n")
    run = run_data(opened(tmp_path))
    assert run["problems"] == ["metrics.jsonl:62: is not a JSON object; the line is left out"]
    assert MetricsFile().problems == []
