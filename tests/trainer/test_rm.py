"""A reward model: its loss, where it starts, what it leaves, and that layouts, kills and batches change nothing."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Run

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.preference import load_preferences
from nemotron_launch.trainer.environments import Rollout
from nemotron_launch.trainer.environments.reward_model import RewardModelEnvironment
from nemotron_launch.trainer.losses import bradley_terry_loss
from nemotron_launch.trainer.reward_models import RewardModel, find


def test_the_loss_is_bradley_and_terrys():
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0], requires_grad=True)
    loss, metrics = bradley_terry_loss(scores, torch.tensor([True, True]), valid_pairs=torch.tensor(2.0))
    # Worked by hand: -log sigmoid(1) = ln(1 + 1/e) and -log sigmoid(-3) = ln(1 + e^3), their mean.
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2, rel=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(0.5)
    assert metrics["rewards_chosen_mean"].item() == pytest.approx(1.0)
    assert metrics["rewards_rejected_mean"].item() == pytest.approx(2.0)
    loss.backward()
    # d/dr_chosen = -(1 - sigmoid(r_chosen - r_rejected)) / 2, and its opposite.
    assert scores.grad.tolist() == pytest.approx([-0.134471, 0.134471, -0.476287, 0.476287], abs=1e-5)


def test_a_pair_that_does_not_count_has_neither_loss_nor_gradient():
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0], requires_grad=True)
    loss, metrics = bradley_terry_loss(scores, torch.tensor([True, False]), valid_pairs=torch.tensor(1.0))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
    assert scores.grad[2:].tolist() == [0, 0]
    assert metrics["num_valid_samples"].item() == 1


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of sft/megatron, small, which the reward models grow out of."""
    run = Run("sft", tmp_path_factory.mktemp("sft"))
    finished = run.go()
    assert finished.code == 0, finished.said
    return run


@pytest.fixture(scope="module")
def rm(start: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a small run of rm/hf, not yet started."""

    def rm(*, procs: int = 1, **options: Any) -> Run:
        run = Run("rm", tmp_path_factory.mktemp("rm"), procs=procs)
        kept = {"checkpointing__metric_name": None, "checkpointing__keep_top_k": None}
        return run.with_(checkpointing__pretrained_checkpoint__path=str(start.checkpoints), **kept).with_(**options)

    return rm


@pytest.fixture(scope="module")
def whole(rm: Any) -> Run:
    run = rm()
    finished = run.go()
    assert finished.code == 0, finished.said
    return run


def weights(run: Run, step: int = 7) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.checkpoints / f"step_{step}" / "hf" / "model.safetensors")


def section(run: Run, **changes: Any) -> dict[str, Any]:
    given = {"model_name": str(run.checkpoints), "tokenizer": {"name": None}, "precision": "float32"}
    return {**given, "max_model_len": 64, "batch_size": 3, "device": "cpu", **changes}


@pytest.mark.slow
def test_what_it_leaves_is_what_transformers_loads_and_what_it_trained(whole: Run):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = find(str(whole.checkpoints), step_dir=None, where="x")
    assert folder == whole.checkpoints / "step_7" / "hf"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = json.loads((whole.folder / "data" / "validation.jsonl").read_text().splitlines()[0])
    ids = tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")
    theirs = model(**ids).logits.item()
    environment = RewardModelEnvironment(section(whole), step_dir=None)
    messages = [{"role": "user", "content": row["prompt"]}]
    [[score]] = environment.score([[Rollout(messages, row["chosen"], {})]])
    assert score.reward == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
def test_validation_reads_as_the_scores_do(whole: Run):
    """The last validation's mean scores, computed again from what was saved."""
    model = RewardModel.load(section(whole), step_dir=None, where="x", device="cpu")
    file = whole.folder / "data" / "validation.jsonl"
    pairs, _ = load_preferences({"data_path": str(file)}, tokenizer=model.tokenizer, max_length=64)
    chosen = model.score([pair.chosen_ids for pair in pairs], batch_size=5)
    line = [line for line in whole.metrics() if "validation-default/rewards_chosen_mean" in line][-1]
    assert line["step"] == 7
    assert line["validation-default/rewards_chosen_mean"] == pytest.approx(float(np.mean(chosen)), abs=1e-5)
    assert line["validation-default/num_valid_samples"] == len(pairs)
    # Scored text is tokenised as the pairs were.
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    for pair, row in zip(pairs, rows, strict=True):
        ids = model.ids([{"role": "user", "content": row["prompt"]}], row["chosen"])
        assert ids.tolist() == pair.chosen_ids.tolist()


@pytest.mark.slow
def test_batches_change_no_score(whole: Run):
    model = RewardModel.load(section(whole), step_dir=None, where="x", device="cpu")
    texts = ["1", "12345 and on and on", "", "123"]
    sequences = [model.ids([{"role": "user", "content": "sort 31524: "}], text) for text in texts]
    alone = [model.score([ids], batch_size=1)[0] for ids in sequences]
    assert model.score(sequences, batch_size=4) == pytest.approx(alone, abs=1e-6)
    assert model.score(sequences, batch_size=3) == pytest.approx(alone, abs=1e-6)


@pytest.mark.slow
def test_two_processes_and_other_micro_batches_learn_the_same(whole: Run, rm: Any):
    for other in (rm(procs=2, policy__train_micro_batch_size=2), rm(policy__train_micro_batch_size=8)):
        finished = other.go()
        assert finished.code == 0, finished.said
        for step, numbers in whole.numbers().items():
            for key, value in numbers.items():
                assert other.numbers()[step][key] == pytest.approx(value, abs=1e-5), (step, key)
        for name, value in weights(whole).items():
            assert torch.allclose(weights(other)[name], value, atol=1e-5), name


@pytest.mark.slow
def test_killed_and_started_again_it_ends_like_one_never_killed(whole: Run, rm: Any):
    run = rm()
    for patch in (
        "at_call(metrics.MetricsLog, 'log', 3, kill)",
        "at_call(Path, 'rename', 1, kill, where=lambda path, to: path.name == 'tmp_step_4')",
    ):
        assert run.go(patch=patch).code == 128 + signal.SIGKILL
    assert run.saved()[-1] == 2
    finished = run.go()
    assert finished.code == 0, finished.said
    assert run.numbers() == whole.numbers()
    assert all(torch.equal(weights(run)[name], value) for name, value in weights(whole).items())


@pytest.mark.slow
def test_a_policys_checkpoint_is_refused_as_a_reward_model(start: Run, tmp_path: Path):
    with pytest.raises(UserError, match="is no reward model"):
        find(str(start.checkpoints), step_dir=None, where="env.reward_model.model_name")
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    LlamaForCausalLM(tiny).save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        RewardModelEnvironment(section(start, model_name=str(tmp_path / "policy")), step_dir=None)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(UserError, match="there is no folder ./nowhere") as caught:
        find("./nowhere", step_dir=None, where="env.reward_model.model_name")
    assert caught.value.where == "env.reward_model.model_name"


@pytest.mark.slow
def test_a_head_grows_on_the_policys_own_weights(rm: Any, start: Run, layout: Any):
    """Before the first step the backbone is the policy's, converted."""
    from nemotron_launch.trainer import hf
    from nemotron_launch.trainer.architecture import read_architecture
    from nemotron_launch.trainer.checkpoints import weights_dir
    from nemotron_launch.trainer.megatron import checkpoint
    from nemotron_launch.trainer.megatron.model import Numerics
    from nemotron_launch.trainer.policy import Policy

    run = rm(
        rm__max_num_steps=1,
        policy__megatron_cfg__optimizer__lr=1e-30,
        policy__megatron_cfg__scheduler__lr_warmup_init=0,
    )
    finished = run.go()
    assert finished.code == 0, finished.said
    folder = start.checkpoints / "step_7"
    architecture = read_architecture(folder / "policy")
    assert architecture is not None
    policy = Policy(architecture, layout, Numerics())
    checkpoint.load_weights(weights_dir(folder), policy.gpt)
    own = weights(run, step=1)
    assert own["score.weight"].shape == (1, architecture.hidden_size)
    for name, value in hf.export_weights(policy.gpt, architecture):
        if name != "lm_head.weight":
            assert torch.equal(own[name], value), name
