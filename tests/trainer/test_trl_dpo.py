"""The DPO loss and its gradient, parameter by parameter, against trl's DPOTrainer on the same weights and tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import batch_of, hf_model, megatron_section, policy_of
from torch import Tensor

from nemotron_launch.trainer import hf
from nemotron_launch.trainer.batch import Batch, Group
from nemotron_launch.trainer.losses import DPOWeights, dpo_loss, sequence_logps

pytestmark = pytest.mark.slow  # importing trl alone takes ten seconds
BETA = 0.1
TOLERANCE = 1e-5  # relative, of the loss and of each parameter's gradient in norm; fp32's own noise is up to 3e-6
METRICS = ("loss", "rewards_chosen_mean", "rewards_rejected_mean", "accuracy")
# Prompts of 9 to 17 bytes; answers of 2 to 15, which of a pair is longer alternates.
ROWS = [
    ("What is 7+5? ", "12", "It may well be 13"),
    ("Capital of Peru?\n", "Lima, of course", "Quito"),
    ("Sort 312: ", "123", "321"),
    ("Say no. ", "no", "yes, gladly"),
    ("Opposite of up? ", "down", "left"),
    ("One word: ", "so be it then", "word"),
]
SAME_LENGTH = [(prompt, chosen[:2], rejected) for prompt, chosen, rejected in ROWS]


@dataclass(frozen=True)
class Variant:
    """The same loss in both: trl's options and rows, and our weights."""

    trl: Mapping[str, Any]
    ours: DPOWeights
    rows: list[tuple[str, str, str]]


VARIANTS = {
    "dpo": Variant({}, DPOWeights(BETA), ROWS),
    "beta": Variant({"beta": 0.5}, DPOWeights(0.5), ROWS),
    "weighted": Variant({"loss_weights": [0.3]}, DPOWeights(BETA, preference_loss_weight=0.3), ROWS),
    "averaged": Variant(
        {"loss_type": ["sigmoid_norm"], "beta": 2.0}, DPOWeights(2.0, preference_average_log_probs=True), ROWS
    ),
    # trl averages over the chosen tokens of the whole batch, NeMo-RL over each answer's and then over the pairs: with
    # chosen answers of one length (2 bytes and EOS) these are the same, and NeMo-RL's sum is three times that.
    "sft-averaged": Variant(
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.4]},
        DPOWeights(BETA, preference_loss_weight=0.7, sft_loss_weight=0.4, sft_average_log_probs=True),
        SAME_LENGTH,
    ),
    "sft-summed": Variant(
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.6]},
        DPOWeights(BETA, sft_loss_weight=0.2),
        SAME_LENGTH,
    ),
}


@dataclass(frozen=True)
class Oracle:
    """What trl computed: the batch that it collated, its loss and metrics, and each parameter's gradient."""

    model: Any
    reference: Any
    batch: dict[str, Tensor]
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


@pytest.fixture(scope="session")
def trl(byte_tokenizer, tmp_path_factory) -> Callable[..., Oracle]:
    """Runs trl's DPOTrainer on one batch, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_DISABLED"):
            patch.setenv(name, "1")
        import datasets
        import trl

    def compute(variant: Variant, family: str, tied: bool) -> Oracle:
        model = hf_model(family, tied=tied, seed=1)
        reference = hf_model(family, tied=tied, seed=1)
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
        options = {"beta": BETA, **variant.trl}
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=reference,
            args=trl.DPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                per_device_train_batch_size=len(variant.rows),
                max_length=None,
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                **options,
            ),
            train_dataset=datasets.Dataset.from_list(
                [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in variant.rows]
            ),
            processing_class=byte_tokenizer.hf,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        return Oracle(model, reference, batch, loss.item(), logged, gradients)

    return compute


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, trl) -> Iterator[tuple[Variant, Oracle]]:
    variant = VARIANTS[request.param]
    yield variant, trl(variant, "llama", tied=False)


def groups(batch: dict[str, Tensor]) -> list[Group]:
    """trl's rows, all chosen before all rejected, as our pairs: the very same ids."""
    ids = [row[mask.bool()].numpy() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    starts = batch["completion_mask"].argmax(1).tolist()
    half = len(ids) // 2
    assert starts[:half] == starts[half:]
    return [Group(starts[i], (ids[i], ids[half + i])) for i in range(half)]


def ours(
    variant: Variant, oracle: Oracle, layout, *, micro: int, **options: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients, under their Hugging Face names, of one training step without update or clipping."""
    every = groups(oracle.batch)
    batches = [batch_of(every[i : i + micro], **options) for i in range(0, len(every), micro)]
    reference = policy_of(oracle.reference, layout)
    sums = [
        sequence_logps(logps, batch.mask_NR)
        for logps, batch in zip(reference.logps(batches), batches, strict=True)
    ]  # fmt: skip
    policy = policy_of(oracle.model, layout)
    policy.make_trainable(megatron_section(lr=0.0, clip=0.0, weight_decay=0.0), total_steps=1)
    pairs = torch.tensor(float(len(every)))

    def loss(logps: Tensor, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch: Batch = batches[i]
        return dpo_loss(logps, sums[i], batch.mask_NR, batch.valid_G, variant.ours, valid_pairs=pairs)

    metrics = policy.train_step(batches, loss, METRICS)
    gradients = {
        hf_name: value
        for name, parameter in policy.gpt.named_parameters()
        for hf_name, value in hf.to_hf(name, parameter.main_grad, policy.architecture)
    }
    return metrics, gradients


def assert_same(metrics: dict[str, float], gradients: dict[str, Tensor], oracle: Oracle) -> None:
    assert metrics["loss"] == pytest.approx(oracle.loss, rel=TOLERANCE)
    assert gradients.keys() == oracle.gradients.keys()
    off = {
        name: float((gradients[name] - expected).norm() / expected.norm())
        for name, expected in oracle.gradients.items()
    }
    worst = max(off, key=off.__getitem__)
    assert off[worst] < TOLERANCE, f"{worst} is off by {off[worst]:.1e}"


def test_the_batch_puts_padding_and_masks_to_the_test(trl):
    batch = trl(VARIANTS["dpo"], "llama", tied=False).batch
    prompts = batch["completion_mask"].argmax(1)
    answers = batch["completion_mask"].sum(1)
    assert len(set(prompts.tolist())) > 3
    assert len(set(answers.tolist())) > 5


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared-prompt", "separate"])
@pytest.mark.parametrize("micro", [6, 2], ids=["one-batch", "three-micro-batches"])
def test_loss_and_every_gradient_are_trls(case, layout, share_prompt, micro):
    variant, oracle = case
    assert_same(*ours(variant, oracle, layout, micro=micro, share_prompt=share_prompt), oracle)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_other_shapes_have_trls_gradients_too(trl, layout, family, tied):
    variant = VARIANTS["dpo"]
    oracle = trl(variant, family, tied)
    assert_same(*ours(variant, oracle, layout, micro=3), oracle)


def test_rewards_are_trls_without_beta(trl, layout):
    """trl logs β·r, NeMo-RL r. Both are small differences of sums of some 50 nats, hence the absolute bound."""
    variant = VARIANTS["dpo"]
    oracle = trl(variant, "llama", tied=False)
    metrics, _ = ours(variant, oracle, layout, micro=6)
    for side in ("chosen", "rejected"):
        expected = oracle.metrics[f"rewards/{side}"] / BETA
        assert metrics[f"rewards_{side}_mean"] == pytest.approx(expected, abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(oracle.metrics["rewards/accuracies"])
