"""A run that is killed and started again ends as one that never was: same losses, same weights."""

from __future__ import annotations

import math
import shutil
import signal

import pytest
from models import hf_model, policy_of
from runs import Run, assert_same_tensors

from nemotron_launch.trainer.hand_over import write_weights

pytestmark = pytest.mark.slow
KILLED = 128 + signal.SIGKILL
KEPT = {"checkpointing__keep_top_k": 2, "checkpointing__metric_name": None}

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


@pytest.fixture(scope="module")
def whole(dpo, tmp_path_factory):
    """Finished runs by their step, none of them ever killed; each is made once."""
    made: dict[str, Run] = {}

    def whole(step: str) -> Run:
        if step not in made:
            run = (dpo() if step == "dpo" else Run("sft", tmp_path_factory.mktemp("sft"))).with_(**KEPT)
            finished = run.go()
            assert finished.code == 0, finished.said
            made[step] = run
        return made[step]

    return whole


@pytest.fixture(scope="module")
def killed(whole, tmp_path_factory) -> Run:
    """A DPO run like `whole`, killed in step 4; its newest checkpoint is of step 2."""
    run = Run("dpo", tmp_path_factory.mktemp("killed"), whole("dpo").options)
    assert run.go(patch="at_call(policy.Policy, 'train_step', 4, kill)").code == KILLED
    assert run.saved() == [2]
    return run


@pytest.fixture
def copy(killed, tmp_path) -> Run:
    """That run once more, to go on with."""
    shutil.copytree(killed.folder, tmp_path / "run")
    return Run("dpo", tmp_path / "run", killed.options)


def finish(run: Run) -> str:
    finished = run.go()
    assert finished.code == 0, finished.said
    return finished.said


def assert_close(run: Run, whole: Run, tolerance: float, *, but: tuple[str, ...] = ()) -> None:
    """Every number of every step, but for names that end as in `but`."""
    got, expected = run.numbers(), whole.numbers()
    assert got.keys() == expected.keys()
    for step in expected:
        for name, value in expected[step].items():
            if not name.endswith(but or ("?",)):
                assert got[step][name] == pytest.approx(value, rel=tolerance, abs=tolerance), f"{name} at step {step}"


@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_killed_at_six_moments_a_run_ends_like_one_never_killed(whole, step, tmp_path):
    never_killed = whole(step)
    run = Run(step, tmp_path, never_killed.options)
    before_first = 1 if step == "dpo" else 0  # DPO also logs a validation before the first step
    for where, patch, saved in KILLS:
        attempt = run.go(patch=patch.replace("LINES_BEFORE", str(before_first)))
        assert attempt.code == KILLED, f"{where}: {attempt.said}"
        assert run.saved() == saved, where
    # The last attempt begins where an epoch ends: 48 rows are 6 steps of 8.
    assert (run.info(6)["epoch"], run.info(6)["step_in_epoch"]) == (1, 0)
    finish(run)
    assert [line["epoch"] for line in run.metrics()][-2:] == [0, 1]
    assert run.numbers() == never_killed.numbers()
    assert [line["step"] for line in run.metrics()] == list(range(1 - before_first, 8))
    assert_same_tensors(run.tensors(7), never_killed.tensors(7))
    assert {path.name for path in run.checkpoints.iterdir()} == {"step_4", "step_6", "step_7"}


@pytest.mark.parametrize("damage", ["deleted", "torn"])
def test_lost_reference_numbers_are_computed_again(copy, whole, damage):
    path = copy.out / "reference.npz"
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = finish(copy)
    assert "computing the reference's log-probabilities of 60 pairs" in said
    assert ("reference.npz cannot be read" in said) == (damage == "torn")
    assert copy.numbers() == whole("dpo").numbers()


@pytest.mark.parametrize("kind", ["resident", "offloaded"])
def test_every_kind_of_reference_gives_the_same_losses(whole, kind, tmp_path):
    run = Run("dpo", tmp_path, whole("dpo").options).with_(dpo__reference=kind)
    finish(run)
    assert_close(run, whole("dpo"), 1e-6)


def test_the_reference_is_the_warm_start_wherever_it_has_moved(copy, whole, warm_start, tmp_path):
    before, after = warm_start.checkpoints, tmp_path / "moved"
    before.rename(after)
    try:
        finish(copy.with_(checkpointing__pretrained_checkpoint__path=str(after)))
    finally:
        after.rename(before)
    assert copy.numbers() == whole("dpo").numbers()


def test_the_reference_stays_the_recorded_one_when_its_folder_has_a_newer_checkpoint(copy, whole, warm_start):
    newer = warm_start.checkpoints / "step_99"
    shutil.copytree(warm_start.checkpoints / "step_6", newer)
    try:
        assert "computing" not in finish(copy)  # its numbers are kept, too
    finally:
        shutil.rmtree(newer)
    assert copy.info(7)["warm_start"]["path"].endswith("step_7/policy/weights/iter_0000000")
    assert copy.numbers() == whole("dpo").numbers()


def test_a_hugging_face_folder_is_warm_start_and_reference_and_may_move(layout, tmp_path):
    folder = tmp_path / "model"
    policy = policy_of(hf_model("llama", num_hidden_layers=1), layout)
    write_weights(policy, folder)
    run = Run("dpo", tmp_path / "run").with_(policy__architecture=None, checkpointing__pretrained_checkpoint=None)
    there = run.with_(policy__model_name=str(folder))
    assert there.go(patch="at_call(policy.Policy, 'train_step', 4, kill)").code == KILLED
    first = run.numbers()
    assert first[1]["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    folder.rename(tmp_path / "moved")
    (run.out / "reference.npz").unlink()
    said = finish(run.with_(policy__model_name=str(tmp_path / "moved")))
    assert "computing the reference's log-probabilities of 60 pairs" in said
    assert run.numbers()[3] == first[3]


def test_two_data_parallel_ranks_resume_as_two_tensor_parallel_ones(whole, tmp_path):
    run = Run("dpo", tmp_path, whole("dpo").options, procs=2)
    killed = run.go("--grace-seconds", 1, patch="if RANK == 1: at_call(policy.Policy, 'train_step', 4, kill)")
    assert (killed.code, run.saved()) == (KILLED, [2])
    finish(run.with_(policy__megatron_cfg__tensor_model_parallel_size=2))
    # Greedy and sampled answers may differ where two tokens are as good; the losses may not.
    assert_close(run, whole("dpo"), 1e-5, but=("exact_match", "response_length_mean", "kl_to_reference"))


def test_without_optimizer_state_a_run_resumes_with_a_fresh_one(tmp_path):
    run = Run("sft", tmp_path).with_(checkpointing__save_optimizer=False)
    assert run.go(patch="at_call(policy.Policy, 'train_step', 4, kill)").code == KILLED
    assert not [key for key in run.tensors(2) if key.startswith("optimizer")]
    assert "holds no optimizer state: Adam starts afresh" in finish(run)
    assert [line["step"] for line in run.metrics()] == list(range(1, 8))
    # The schedule goes on where it was: a cosine from 1e-3 to 0 over 7 steps, then 5/7 through.
    rates = [line["train/lr"] for line in run.metrics()]
    assert rates == sorted(rates, reverse=True)


def test_a_finished_run_says_so_and_how_to_train_on(whole, tmp_path):
    shutil.copytree(whole("dpo").folder, tmp_path / "run")
    run = Run("dpo", tmp_path / "run", whole("dpo").options)
    before = run.metrics()
    said = finish(run)
    assert "finished already" in said
    assert "step_7 holds step 7 of 7. To train on, raise dpo.max_num_steps; to start afresh" in said
    assert run.metrics() == before
    finish(run.with_(dpo__max_num_steps=8))
    assert [line["step"] for line in run.metrics()] == list(range(9))
