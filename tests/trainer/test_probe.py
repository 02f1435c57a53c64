"""What a probe says of rewards: numbers worked by hand, findings in plain words, a page that runs nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from runs import REPOSITORY, Run

from nemotron_launch.trainer.data.prompts import Prompt
from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.grpo_rollouts import Rollouts
from nemotron_launch.trainer.probe import Limits, findings, summarise
from nemotron_launch.trainer.probe_page import page, table
from nemotron_launch.trainer.rollouts import Completion


def rollouts(groups, *, lengths=None, stopped=True, errors=(), lost=(), text="an answer") -> Rollouts:
    """Of rewards by group; errors and lost: places of such rollouts."""
    flat = [reward for group in groups for reward in group]
    lengths = lengths or [3] * len(flat)
    prompts = [
        Prompt(np.arange(2, dtype=np.int32), [{"role": "user", "content": f"question {g}"}], {}, f"rows.jsonl:{g + 1}")
        for g, group in enumerate(groups)
        for _ in group
    ]
    first = {id(prompt.messages): prompt for prompt in prompts}
    assert len(first) == len(flat)
    shared = []
    for g, group in enumerate(groups):
        shared += [prompts[sum(map(len, groups[:g]))]] * len(group)
    return Rollouts(
        prompts=shared,
        keys=list(range(len(flat))),
        completions=[Completion(np.zeros(n, dtype=np.int32), np.zeros(n), stopped) for n in lengths],
        scores=[
            Score(reward, error="broke" if i in errors else "", lost=i in lost, seconds=0.001 * i)
            for i, reward in enumerate(flat)
        ],
        texts=[text] * len(flat),
    )


def names(rolled: Rollouts, samples: int) -> list[str]:
    return [finding.name for finding in findings(summarise(rolled, samples), Limits())]


def test_spread_within_and_between_prompts_is_told_apart():
    summary = summarise(rollouts([[0, 2], [4, 6]]), 2)
    reward = summary["reward"]
    # By hand: means 1 and 5, within each group ±1; all together mean 3, variance (9 + 1 + 1 + 9) / 4 = 5.
    assert reward["mean"] == 3
    assert reward["std_within_prompts"] == pytest.approx(1)
    assert reward["std_between_prompts"] == pytest.approx(2)
    assert reward["std"] == pytest.approx(math.sqrt(5))
    assert summary["groups_without_variance"] == 0
    assert sum(reward["histogram"]["counts"]) == 4


def test_a_lost_rollout_is_in_no_mean():
    summary = summarise(rollouts([[1, 9], [3, 5]], lost=[1]), 2)
    assert summary["reward"]["mean"] == 3
    assert summary["verifier"]["lost"] == 1
    assert summary["by_prompt"][0]["mean"] == 1


def test_equal_groups_leave_nothing_to_learn():
    found = findings(summarise(rollouts([[1, 1], [0, 0]]), 2), Limits())
    assert [(finding.name, finding.fatal) for finding in found] == [("all_groups_equal", True)]
    assert "nothing to learn from" in found[0].text


def test_a_few_equal_groups_are_no_finding_and_most_are_a_note():
    assert names(rollouts([[1, 0], [1, 1]]), 2) == []
    assert names(rollouts([[1, 0], *[[1, 1]] * 9]), 2) == ["few_groups_differ"]


def test_a_verifier_that_fails_on_most_stops_and_on_some_is_noted():
    groups = [[0, 1], [0, 1]]
    [stop] = findings(summarise(rollouts(groups, errors=[0, 1, 2]), 2), Limits())
    assert (stop.name, stop.fatal, stop.advice) == ("verifier_fails", True, "most often: broke")
    [note] = findings(summarise(rollouts(groups, errors=[0]), 2), Limits())
    assert (note.name, note.fatal) == ("verifier_errors", False)


def test_no_score_at_all_stops():
    assert names(rollouts([[0, 1]], errors=[0, 1], lost=[0, 1]), 2)[0] == "no_rewards"


def test_answers_that_never_end_stop():
    [stop] = findings(summarise(rollouts([[0, 1]], stopped=False), 2), Limits())
    assert (stop.name, stop.fatal) == ("truncated", True)


@pytest.mark.parametrize(("rewards", "word"), [([1, 2, 3], "longer"), ([3, 2, 1], "shorter")])
def test_a_reward_that_follows_length_within_groups_is_noted(rewards, word):
    summary = summarise(rollouts([rewards, rewards], lengths=[10, 20, 30, 110, 120, 130]), 3)
    assert abs(summary["length"]["correlation_with_reward"]) == pytest.approx(1)
    [note] = findings(summary, Limits())
    assert note.name == "reward_follows_length"
    assert word in note.text


def test_length_that_differs_between_prompts_only_is_no_correlation():
    """A hard prompt has long answers and low rewards; within its group nothing follows length."""
    summary = summarise(rollouts([[1, 2], [8, 9]], lengths=[90, 90, 10, 10]), 2)
    assert summary["length"]["correlation_with_reward"] is None


def test_the_best_and_worst_to_read_are_of_different_prompts():
    summary = summarise(rollouts([[9, 8, 7], [3, 2, 1]]), 3)
    assert [sample["reward"] for sample in summary["best"]] == [9, 3]
    assert [sample["reward"] for sample in summary["worst"]] == [1, 7]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)


def test_the_page_needs_no_network_and_runs_nothing_that_a_model_wrote():
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>{0}{rows}"
    summary = {"policy": hostile, **summarise(rollouts([[0, 1]], text=hostile), 2)}
    found = findings(summary, Limits())
    text = page({**summary, "findings": [asdict(finding) for finding in found]}, found)
    tags = _Tags()
    tags.feed(text)
    assert not {"script", "img", "link", "iframe"} & set(tags.seen)
    assert "&lt;script&gt;" in text
    assert "http" not in text


def test_the_table_is_plain_text_also_without_any_reward():
    summary = {"policy": "p", **summarise(rollouts([[0, 1]], errors=[0, 1], lost=[0, 1]), 2)}
    found = findings(summary, Limits())
    text = table({**summary, "findings": [asdict(finding) for finding in found]})
    assert "stop: no rollout could be scored" in text
    assert page({**summary, "findings": []}, []).startswith("<!doctype html>")


@pytest.mark.slow
def test_the_command_probes_a_warm_start_and_its_exit_code_gates(tmp_path: Path):
    warm = Run("sft", tmp_path / "sft")
    assert warm.go().code == 0
    small = Run("grpo", tmp_path / "grpo").with_(checkpointing__pretrained_checkpoint__path=str(warm.checkpoints))
    config = small.config()

    def probe(*more: str) -> subprocess.CompletedProcess[str]:
        options = ["steps", "probe", "rl/nemo_rl/rlvr", "-c", str(config), "--prompts", "4", "--samples", "6", *more]
        command = [sys.executable, "-m", "nemotron_launch", *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)

    # A hardly trained model writes bytes as they come, and ends nothing by itself.
    cut = probe()
    assert cut.returncode == 1, cut.stderr + cut.stdout
    assert "stop: 100% of the answers are cut off at policy.generation.max_new_tokens" in cut.stdout
    # Bytes above 127 end an answer here; one with a printable character in front of that is worth 1.
    rows = small.folder / "data" / "train.jsonl"
    rows.write_text(rows.read_text().replace('"regex": "[0-9]"', '"regex": "[ -~]"'))
    ends = f"policy.generation.stop_token_ids={list(range(128, 256))}"
    good = probe("--json", ends)
    assert good.returncode == 0, good.stderr + good.stdout
    told = json.loads(good.stdout)
    assert told["prompts"] == 4
    assert told["samples_per_prompt"] == 6
    assert sum(told["reward"]["histogram"]["counts"]) == 24
    assert str(warm.checkpoints) in told["policy"]
    assert (small.out / "probe" / "probe.html").is_file()
    assert not small.checkpoints.exists()

    rows.write_text(rows.read_text().replace('"regex": "[ -~]"', '"regex": "never this"'))
    useless = probe(ends)
    assert useless.returncode == 1, useless.stderr
    assert "stop: in every group all rewards are equal (0)" in useless.stdout
