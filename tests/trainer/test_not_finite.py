"""A loss, gradient or weight that is not finite ends the run with one message, and no checkpoint of it."""

from __future__ import annotations

import pytest
from runs import Finished, Run

pytestmark = pytest.mark.slow

# What goes wrong in step 4 of a rank, before or after its work; steps 2, 4 and 6 are saved.
IN_STEP_4 = """
    work, count = policy.Policy.train_step, [0]
    def train_step(self, *arguments):
        count[0] += 1
        weight = next(parameter for name, parameter in self.gpt.named_parameters() if "proj" in name)
        if count[0] == 4:
            {before}
        values = work(self, *arguments)
        if count[0] == 4:
            {after}
        return values
    policy.Policy.train_step = train_step
"""


def in_step_4(before: str = "pass", after: str = "pass") -> str:
    return IN_STEP_4.format(before=before, after=after)


def assert_stopped(run: Run, finished: Finished, what: str) -> None:
    import torch

    assert finished.code == 1, finished.said
    assert "Traceback" not in finished.said
    errors = [line for line in finished.said.splitlines() if "error:" in line]
    assert errors == [f"error: step 4: {what} not finite"], finished.said
    assert f"{run.folder}/data/train.jsonl:" in finished.said
    assert f"last good checkpoint: {run.checkpoints}/step_2" in finished.said
    assert (run.out / "exit_code").read_text() == "1\n"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_2"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.tensors(2).values())
    assert f"error: step 4: {what} not finite" in (run.out / "train.log").read_text()


def test_a_loss_that_is_not_a_number_names_step_rows_and_checkpoint(dpo):
    run = dpo()
    finished = run.go(patch=in_step_4(before="weight.data.fill_(float('nan'))"))
    assert_stopped(run, finished, "loss and grad_norm")
    # The batch of step 4 is 8 rows of the file, all named.
    (named,) = [line for line in finished.said.splitlines() if "rows of the batch" in line]
    assert named.count("train.jsonl:") == 8


def test_of_two_ranks_one_says_it_and_none_hangs(dpo):
    run = dpo(procs=2)
    patch = in_step_4(before="RANK == 1 and weight.data.fill_(float('nan'))")
    finished = run.go(patch=patch)
    assert_stopped(run, finished, "loss and grad_norm")


def test_an_infinite_gradient_of_a_finite_loss_stops_too(dpo):
    run = dpo()
    finished = run.go(patch=in_step_4(before="weight.register_hook(lambda gradient: gradient * float('inf'))"))
    assert_stopped(run, finished, "grad_norm")


def test_weights_that_a_step_made_infinite_are_not_saved(dpo):
    run = dpo()
    finished = run.go(patch=in_step_4(after="weight.data.fill_(float('inf'))"))
    assert_stopped(run, finished, "weights")


def test_a_validation_that_is_not_a_number_is_no_checkpoint(dpo):
    run = dpo(dpo__val_period=4)
    patch = """
        import nemotron_launch.trainer.dpo as dpo
        mean = dpo.weighted_mean
        def not_a_number():
            dpo.weighted_mean = lambda *arguments: {**mean(*arguments), "loss": float("nan")}
        at_call(policy.Policy, "train_step", 4, not_a_number)
    """
    finished = run.go(patch=patch)
    assert_stopped(run, finished, "validation-default/loss")


def test_a_learning_rate_that_wrecks_the_policy_leaves_only_finite_checkpoints(dpo):
    import torch

    run = dpo(policy__megatron_cfg__optimizer__lr=1e30, checkpointing__save_period=1)
    finished = run.go()
    assert finished.code == 1, finished.said
    assert "not finite" in finished.said
    for step in run.saved():
        assert all(bool(torch.isfinite(tensor).all()) for tensor in run.tensors(step).values())
