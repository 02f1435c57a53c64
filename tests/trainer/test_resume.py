"""A run that is killed and started again ends as one that never was: same losses, same weights."""

from __future__ import annotations

import signal

import pytest
from runs import Run, assert_same_tensors

pytestmark = pytest.mark.slow
KILLED = 128 + signal.SIGKILL

# Each attempt: where it is killed, and the newest checkpoint that counts afterwards. Steps 2, 4 and 6 are saved.
KILLS = [
    ("before the first save", "at_call(policy.Policy, 'train_step', 2, kill)", []),
    ("in the middle of step 4", "at_call(metrics.MetricsLog, 'log', 4 + LINES_BEFORE, kill)", [2]),
    (
        "while tensors are written",
        """
        from torch.distributed.checkpoint import filesystem
        at_call(filesystem, "_write_item", 5, kill)
        """,
        [2],
    ),
    (
        "before the rename",
        "at_call(Path, 'rename', 1, kill, where=lambda path, to: path.name == 'tmp_step_4')",
        [2],
    ),
    ("between rename and pruning", "at_call(checkpoints.CheckpointStore, 'prune', 2, kill)", [2, 4]),
    (
        "in the middle of pruning",
        """
        def half(path, **_):
            os.unlink(path / "training_info.json")
            kill()
        checkpoints.shutil.rmtree = half
        """,
        [4, 6],
    ),
]


@pytest.fixture(scope="module", params=["sft", "dpo"])
def never_killed(request, dpo, tmp_path_factory) -> Run:
    options = {"checkpointing__keep_top_k": 2, "checkpointing__metric_name": None}
    run = dpo(**options) if request.param == "dpo" else Run("sft", tmp_path_factory.mktemp("sft")).with_(**options)
    finished = run.go()
    assert finished.code == 0, finished.said
    return run


def test_killed_at_six_moments_a_run_ends_like_one_never_killed(never_killed, tmp_path):
    run = Run(never_killed.step, tmp_path, never_killed.options)
    # DPO also logs a validation before the first step.
    before_first = 1 if run.step == "dpo" else 0
    for where, patch, saved in KILLS:
        attempt = run.go(patch=patch.replace("LINES_BEFORE", str(before_first)))
        assert attempt.code == KILLED, f"{where}: {attempt.said}"
        assert run.saved() == saved, where
    last = run.go()
    assert last.code == 0, last.said
    assert run.numbers() == never_killed.numbers()
    assert [line["step"] for line in run.metrics()] == list(range(1 - before_first, 8))
    assert_same_tensors(run.tensors(7), never_killed.tensors(7))
    assert {path.name for path in run.checkpoints.iterdir()} == {"step_4", "step_6", "step_7"}
