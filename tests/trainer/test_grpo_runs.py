"""Whole runs of rl/nemo_rl/rlvr: killed and resumed, in every layout, refused before the first rollout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import Run, assert_same_tensors, refuse

pytestmark = pytest.mark.slow
KILLED = 137
# Two layers, which two stages can share; a schedule that does not look at how long the run is.
TWO_LAYERS: dict[str, Any] = {"policy.architecture.num_layers": 2}
OPTIONS = {
    **TWO_LAYERS,
    "policy.megatron_cfg.scheduler.lr_decay_style": "constant",
    "checkpointing.keep_top_k": 9,
    "checkpointing.metric_name": None,
}


@pytest.fixture(scope="module")
def rlvr(tmp_path_factory):
    """Makes a small run of rl/nemo_rl/rlvr, not yet started; all from the same weights."""
    start = Run("sft", tmp_path_factory.mktemp("start"), dict(TWO_LAYERS)).with_(sft__max_num_steps=2)
    assert start.go().code == 0

    def rlvr(folder: Path | None = None, *, procs: int = 1, **options: Any) -> Run:
        run = Run("grpo", folder or tmp_path_factory.mktemp("rlvr"), dict(OPTIONS), procs)
        return run.with_(checkpointing__pretrained_checkpoint__path=str(start.checkpoints)).with_(**options)

    return rlvr


@pytest.fixture(scope="module")
def whole(rlvr) -> Run:
    """A run that nothing disturbed."""
    run = rlvr()
    finished = run.go()
    assert finished.code == 0, finished.said
    return run


def samples(run: Run) -> list[dict[str, Any]]:
    """samples.jsonl, wherever the run's rows lie."""
    lines = [json.loads(line) for line in (run.out / "samples.jsonl").read_text().splitlines()]
    return [{**line, "source": Path(line["source"]).name} for line in lines]


def without_times(run: Run) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in line.items() if "slowest" not in name}
        for step, line in run.numbers().items()
    }


def test_a_run_learns_validates_and_saves(whole):
    assert whole.saved() == [2, 4, 6, 7]
    lines = whole.numbers()
    assert [step for step, line in lines.items() if "validation/accuracy" in line] == [0, 3, 6, 7]
    assert any(line["train/reward_std_within_groups"] > 0 for step, line in lines.items() if step)
    assert all("train/reference_kl" in line for step, line in lines.items() if step)
    info = whole.info(6)
    assert info["val:accuracy"] == lines[6]["validation/accuracy"]
    assert (info["epoch"], info["step_in_epoch"], info["consumed_samples"]) == (1, 0, 6 * 32)


def test_killed_twice_a_run_ends_like_one_never_killed(whole, rlvr):
    run = rlvr()
    for patch, saved in (
        ("at_call(policy.Policy, 'train_step', 6, kill)", [2]),  # between the two updates of step 3
        ("at_call(metrics.MetricsLog, 'log', 3, kill)", [2, 4]),  # step 5 is trained, but in no file
    ):
        attempt = run.go(patch=patch)
        assert attempt.code == KILLED, attempt.said
        assert run.saved() == saved
    finished = run.go()
    assert finished.code == 0, finished.said
    assert without_times(run) == without_times(whole)
    assert samples(run) == samples(whole)
    assert_same_tensors(run.tensors(7), whole.tensors(7))


LAYOUTS = {
    "tensor 2": {"procs": 2, "policy__megatron_cfg__tensor_model_parallel_size": 2},
    "pipeline 2": {"procs": 2, "policy__megatron_cfg__pipeline_model_parallel_size": 2},
    "data 2": {"procs": 2},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_writes_and_learns_the_same(whole, rlvr, options):
    run = rlvr(**options, grpo__max_num_steps=3)
    finished = run.go()
    assert finished.code == 0, finished.said
    assert samples(run) == [line for line in samples(whole) if line["step"] <= 3]
    got, expected = without_times(run), without_times(whole)
    assert list(got) == [0, 1, 2, 3]
    for step, line in got.items():
        assert line == pytest.approx(expected[step], rel=1e-5, abs=1e-5), step


# Bad input, by the manifest's name of the error: what is wrong in row 3 of four, what is wrong in the config, what is
# said. All before anything is generated.
ROW = {"prompt": "sort 1: ", "expected_answer": "1"}
REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, Any], tuple[str, ...]]] = {
    "missing_verifier_fields": (
        {"prompt": "sort 1: "},
        {"data.default.env_name": "exact"},
        ("train.jsonl:3: ", "1 of 4 rows cannot be scored: missing key expected_answer", "data.max_bad_rows"),
    ),
    "rollout_batch_not_divisible": (
        None,
        {"policy.train_global_batch_size": 12},
        ("policy.train_global_batch_size: 12 does not divide a step's 32 rollouts (8 prompts x 4)",),
    ),
    "mixed_nemo_gym_and_upstream_config": (
        None,
        {"env.should_use_nemo_gym": True, "data.default.env_name": "exact"},
        ("env.should_use_nemo_gym: true, but the rollouts are scored by exact",),
    ),
    "responses_api_schema_missing": (
        {"responses_create_params": {}, "agent_ref": {"name": "math"}},
        {
            "env.should_use_nemo_gym": True,
            "env.nemo_gym.server": "http://127.0.0.1:9",
            "data.default.env_name": "nemo_gym",
            "data.default_agent_ref": "math",
        },
        ("data.train: 1 of 4 rows are bad", "missing key responses_create_params.input: ", "train.jsonl:3"),
    ),
    "reward_function_not_validated": (
        None,
        {"data.default.env_name": "python:operator.getitem"},
        ("train.jsonl:1: ", "python:operator.getitem: the verifier fails on all 4 rows tried: "),
    ),
}


@pytest.fixture(scope="module")
def refused(rlvr):
    runs = {}
    for name, (row, changes, _) in REFUSED.items():
        run = runs[name] = rlvr(**{"grpo.num_prompts_per_step": 4, **changes} if row else changes)
        (run.folder / "data").mkdir(parents=True)
        for file, rows in (("train", [ROW, ROW, row or ROW, ROW]), ("validation", [ROW])):
            (run.folder / f"data/{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return refuse(runs)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_the_first_rollout(refused, name):
    done = refused[name]
    assert done.code == 2, done.said
    for words in REFUSED[name][2]:
        assert words in done.said
    assert "Traceback" not in done.said
