"""Warnings: each sign fires on numbers that show it and stays silent on those that do not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.catalog import Step, Strategy, find_step, load_steps
from nemotron_launch.config.compose import compose
from nemotron_launch.frozen import replace
from nemotron_launch.reports.metrics_file import MetricsFile
from nemotron_launch.reports.signs import KINDS, metrics_of, parameters, warnings_of

Series = Callable[[int], float | None]


def metrics(steps: int = 100, **series: Series) -> MetricsFile:
    """Numbers of steps 1 to `steps`; names with __ for /."""
    read = MetricsFile()
    for step in range(1, steps + 1):
        row = {name.replace("__", "/"): of(step) for name, of in series.items()}
        read.feed(json.dumps({"step": step, **row}).encode() + b"\n")
    return read


def noisy(of: Callable[[int], float], spread: float) -> Series:
    rng = random.Random(7)
    return lambda step: of(step) + rng.uniform(-spread, spread)


def seen(condition: dict[str, Any], read: MetricsFile, config: Mapping[str, Any] | None = None, **sign: Any) -> str:
    """What a step with this one condition says of the run; empty where it is silent."""
    step = replace(find_step("dpo"), strategies=(Strategy("When.", "Change a.b.", {"all": [condition], **sign}),))
    found = warnings_of(step, config or {}, read)
    return found[0].seen if found else ""


RISING, FALLING, STILL = noisy(lambda s: s / 100, 0.03), noisy(lambda s: 2 - s / 100, 0.03), noisy(lambda s: 0.5, 0.03)


@pytest.mark.parametrize(
    ("condition", "fires", "silent"),
    [
        ({"above": 0.8}, RISING, STILL),
        ({"below": 0.8}, STILL, RISING),
        ({"rises": 0.5}, RISING, STILL),
        ({"falls": 0.5}, FALLING, RISING),
        ({"grows": 2.0}, RISING, STILL),
        ({"shrinks": 0.3}, FALLING, STILL),
        ({"flat": 0.02}, STILL, RISING),
        ({"above_least": 0.2}, noisy(lambda s: 1 + abs(s - 50) / 50, 0.02), FALLING),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_condition_fires_where_it_holds_and_is_silent_elsewhere(
    condition: dict[str, Any], fires: Series, silent: Series
) -> None:
    assert seen({"metric": "m", **condition}, metrics(m=fires)).startswith("m ")
    assert seen({"metric": "m", **condition}, metrics(m=silent)) == ""


def test_every_kind_of_condition_is_tested_and_in_the_schema() -> None:
    schema = json.loads((find_step("dpo").folder.parents[2] / "schemas/manifest.json").read_text())
    assert {*schema["$defs"]["condition"]["properties"]} == {"metric", *KINDS}


def test_the_words_have_numbers_and_steps() -> None:
    text = seen({"metric": "m", "above": 0.5}, metrics(m=lambda step: 0.75))
    assert text == "m is 0.75 (steps 81-100), above 0.5."
    assert seen({"metric": "m", "rises": 0.1}, metrics(m=lambda step: step / 100)) == (
        "m went from 0.105 (steps 1-20) to 0.905 (steps 81-100)."
    )


def test_a_blip_is_no_level_and_a_return_is_no_rise() -> None:
    assert seen({"metric": "m", "above": 0.5}, metrics(m=lambda step: 5.0 if step == 99 else 0.1)) == ""
    assert seen({"metric": "m", "rises": 0.1}, metrics(m=lambda step: 1 - abs(step - 40) / 60)) == ""


def test_a_short_run_says_nothing() -> None:
    bad: Series = lambda step: 9.0  # noqa: E731
    assert seen({"metric": "m", "above": 0.5}, metrics(19, m=bad)) == ""
    assert seen({"metric": "m", "above": 0.5}, metrics(20, m=bad)) != ""
    assert seen({"metric": "m", "above": 0.5}, metrics(20, m=bad), after=50) == ""
    once: Series = lambda step: 9.0 if step == 60 else None  # noqa: E731
    assert seen({"metric": "m", "above": 0.5}, metrics(m=once)) == "", "one value is no trend"


def test_what_a_run_does_not_have_is_silent() -> None:
    assert seen({"metric": "other", "below": 1}, metrics(m=STILL)) == ""
    assert seen({"metric": "m", "below": 1}, metrics(m=lambda step: None)) == ""
    assert warnings_of(find_step("dpo"), {}, MetricsFile()) == []


def test_the_first_metric_that_is_there_counts() -> None:
    read = metrics(b=lambda step: 0.1, c=lambda step: 9.0)
    assert seen({"metric": ["a", "b", "c"], "below": 0.5}, read).startswith("b is 0.1")


def test_a_bound_may_be_a_share_of_what_the_config_says() -> None:
    bound = {"metric": "m", "above": {"key": "policy.generation.max_new_tokens", "times": 0.9}}
    config = {"policy": {"generation": {"max_new_tokens": 100}}}
    read = metrics(m=lambda step: 95.0)
    assert seen(bound, read, config) == (
        "m is 95 (steps 81-100), above 90, 0.9 times policy.generation.max_new_tokens."
    )
    assert seen(bound, metrics(m=lambda step: 80.0), config) == ""
    for other in ({}, {"policy": None}, {"policy": {"generation": {"max_new_tokens": None}}}):
        assert seen(bound, read, other) == ""


# The shipped manifests ---------------------------------------------------------------------------------------------

SIGNED = [(step, strategy) for step in load_steps() for strategy in step.strategies if strategy.sign]


@pytest.mark.parametrize(("step", "strategy"), SIGNED, ids=lambda one: getattr(one, "when", getattr(one, "id", "")))
def test_a_warning_names_a_parameter_that_the_step_has(step: Step, strategy: Strategy) -> None:
    named = parameters(strategy)
    assert named
    config = compose(step.folder / "config/default.yaml", schema=step.folder / "schema.json", env={}).data
    for key in named:
        value: Any = config
        for part in key.split("."):
            assert part in value, f"{key} is no key of {step.id}"
            value = value[part]


def of_step(tail: str, **series: Series) -> list[str]:
    step = find_step(tail)
    config = compose(step.folder / "config/tiny.yaml", schema=step.folder / "schema.json", env={}).data
    return [warning.when for warning in warnings_of(step, config, metrics(**series))]


BAD: list[tuple[str, str, dict[str, Series]]] = [
    ("dpo", "The policy drifts", {"validation-default__kl_to_reference": lambda s: s / 50}),
    ("dpo", "The probability of the chosen", {"train__rewards_chosen_mean": lambda s: -s / 5}),
    ("dpo", "Answers grow longer", {"validation-default__response_length_mean": lambda s: 4 + s / 10}),
    ("dpo", "The accuracy stays", {"train__accuracy": noisy(lambda s: 0.5, 0.1)}),
    (
        "dpo",
        "Training loss falls",
        {"train__loss": lambda s: 1 / s, "validation-default__loss": lambda s: 1 + (s - 50) ** 2 / 1e3},
    ),
    (
        "sft/megatron",
        "Training loss falls",
        {"train__loss": lambda s: 1 / s, "validation-default__loss": lambda s: 1 + (s - 50) ** 2 / 1e3},
    ),
    ("sft/megatron", "The training loss does not fall", {"train__loss": noisy(lambda s: 5.5, 0.01)}),
    (
        "rm/hf",
        "Validation accuracy",
        {"train__accuracy": noisy(lambda s: 0.5, 0.1), "validation-default__accuracy": lambda s: 0.52},
    ),
    (
        "rm/hf",
        "Training accuracy nears 1",
        {"train__accuracy": lambda s: 1 - 1 / s, "validation-default__loss": lambda s: 0.5 + s / 100},
    ),
    *(
        (step, when, series)
        for step in ("rlvr", "rlhf")
        for when, series in [
            (
                "Rewards hardly differ",
                {"train__groups_without_variance": lambda s: 0.9, "train__all_best_groups": lambda s: 0.1},
            ),
            ("The policy goes far", {"train__reference_kl": lambda s: s / 50}),
            ("Clipping stops", {"train__clip_high_share": lambda s: 0.3}),
            ("The policy has become nearly certain", {"train__approx_entropy": lambda s: 0.5 / s**1.3}),
            ("Answers are cut off", {"train__truncation_rate": lambda s: 0.25}),
            (
                "Answers grow longer",
                {"train__mean_gen_tokens_per_sample": lambda s: 4 + s / 10, "train__reward": lambda s: s / 100},
            ),
        ]
    ),
    ("rlvr", "The held-out reward stays", {"validation__accuracy": noisy(lambda s: 0.4, 0.005)}),
    ("rlvr", "Generation and training", {"train__token_mult_prob_error": lambda s: 1.2}),
]


@pytest.mark.parametrize(("step", "when", "series"), BAD, ids=lambda one: one if isinstance(one, str) else "")
def test_each_sign_of_the_steps_fires(step: str, when: str, series: dict[str, Series]) -> None:
    assert [found for found in of_step(step, **series) if found.startswith(when)]


def test_no_sign_of_the_steps_is_untested() -> None:
    tested = {(find_step(step).id, when) for step, when, _ in BAD}
    for step, strategy in SIGNED:
        assert any(step.id == name and strategy.when.startswith(when) for name, when in tested), strategy.when


def test_signs_name_metrics_that_the_trainer_writes() -> None:
    trainer = Path(__file__).parents[2] / "nemotron_launch/trainer"
    text = "".join(path.read_text() for path in trainer.glob("*.py"))
    for _, strategy in SIGNED:
        assert strategy.sign
        for name in metrics_of(strategy.sign):
            assert f'"{name.rpartition("/")[2]}"' in text, name


HEALTHY: dict[str, dict[str, Series]] = {
    "dpo": {
        "train__loss": noisy(lambda s: 0.5 + 1 / s, 0.05), "train__accuracy": lambda s: 1 - 1 / s,
        "validation-default__loss": lambda s: 0.55 + 1 / s if s % 20 == 0 else None,
        "validation-default__accuracy": lambda s: 0.95 if s % 20 == 0 else None,
        "validation-default__kl_to_reference": lambda s: 0.15 if s % 20 == 0 else None,
        "train__rewards_chosen_mean": lambda s: 0.7, "validation-default__response_length_mean": lambda s: 6.0,
    },
    "rlvr": {
        "train__reward": noisy(lambda s: 0.95 - 0.4 / s, 0.03), "train__groups_without_variance": lambda s: 0.84,
        "train__all_best_groups": lambda s: 0.84, "train__reference_kl": noisy(lambda s: 0.2, 0.05),
        "train__approx_entropy": noisy(lambda s: 0.03 + 0.07 / s, 0.01), "train__truncation_rate": lambda s: 0.0,
        "train__mean_gen_tokens_per_sample": noisy(lambda s: 6, 0.1), "train__clip_high_share": lambda s: 0.01,
        "validation__accuracy": lambda s: 0.98 - 0.4 / s, "train__token_mult_prob_error": lambda s: 1.0001,
    },
    "sft/megatron": {"train__loss": lambda s: 5.5 / s, "validation-default__loss": lambda s: 0.1 + 5 / s},
    "rm/hf": {"train__accuracy": lambda s: 1 - 0.5 / s, "validation-default__loss": lambda s: 0.4 + 0.3 / s},
}  # fmt: skip


@pytest.mark.parametrize("step", HEALTHY)
def test_a_healthy_run_has_no_warning(step: str) -> None:
    assert of_step(step, **HEALTHY[step]) == []
