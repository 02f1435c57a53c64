"""GRPO losses and gradients, parameter by parameter, against trl's GRPOTrainer on the same weights and rollouts.

trl gets the same rollouts from a `rollout_func` and does all else itself: log-probabilities of the old policy and of
the reference, weights for the generator's own probabilities, and the loss. Between rollouts and loss the policy's
weights move, so that ratios are not 1; only the advantages are given to both, because they are defined otherwise.

Legend: N sequences, R answer tokens.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB, batch_of, hf_model, megatron_section, policy_of
from torch import Tensor

from nemotron_launch.trainer import hf
from nemotron_launch.trainer.advantages import advantages, group_statistics
from nemotron_launch.trainer.batch import Batch, Group
from nemotron_launch.trainer.grpo_losses import METRICS, GRPOLossConfig, grpo_loss

pytestmark = pytest.mark.slow  # importing trl alone takes ten seconds
TOLERANCE = 1e-5  # relative, of the loss and of each parameter's gradient in norm; fp32's own noise is up to 4e-6
ROUNDING = 2.4e-7  # of a loss that all but cancels: two last digits of terms up to 2 in fp32
GROUPS, SAMPLES = 3, 4
# Not those of REWARDS; the last group's have one sign, as after clipping. None is 0 or the same as another.
ADVANTAGES = torch.tensor([1.5, -0.5, -0.6, -0.4, 0.9, 0.8, -0.7, -1.0, 0.3, 0.2, 0.1, 0.05])
REWARDS = [1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0]


@dataclass(frozen=True)
class Variant:
    """The same loss in both: trl's options and our config. moved: how far the policy is from where it sampled."""

    trl: Mapping[str, Any]
    ours: GRPOLossConfig
    moved: float = 0.02
    engine: bool = False  # the generator's log-probabilities are not the trainer's, and trl corrects for it


def ours(*, token: bool = True, beta: float = 0.0, **keys: Any) -> GRPOLossConfig:
    """NeMo-RL's names; no clamps, which trl does not have."""
    clamps = {"kl_input_clamp_value": None, "kl_output_clamp_value": None}
    return GRPOLossConfig(token_level_loss=token, reference_policy_kl_penalty=beta, **{**clamps, **keys})


TOKEN, SEQUENCE = {"loss_type": "dapo"}, {"loss_type": "grpo"}
GSPO = {**SEQUENCE, "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}
OUR_GSPO = {"token": False, "sequence_level_importance_ratios": True, "ratio_clip_min": 0.02, "ratio_clip_max": 0.03}
ENGINE = {"vllm_importance_sampling_correction": True}


def corrected(kind: str, low: float | None, high: float) -> dict[str, Any]:
    return {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": kind,
        "truncated_importance_sampling_ratio": high,
        "truncated_importance_sampling_ratio_min": low,
    }


def limits(mode: str, low: float | None, high: float) -> dict[str, Any]:
    return {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }


VARIANTS = {
    "token": Variant(TOKEN, ours()),
    "sequence": Variant(SEQUENCE, ours(token=False)),
    "clip-higher": Variant(
        {**TOKEN, "epsilon": 0.1, "epsilon_high": 0.28}, ours(ratio_clip_min=0.1, ratio_clip_max=0.28)
    ),
    "dual-clip": Variant(
        {**TOKEN, "delta": 1.3, "epsilon_high": 0.28}, ours(ratio_clip_c=1.3, ratio_clip_max=0.28), moved=0.04
    ),
    "gspo": Variant(GSPO, ours(**OUR_GSPO)),
    "cispo": Variant(
        {"loss_type": "cispo", "epsilon_high": 1.15}, ours(use_cispo=True, ratio_clip_min=1.0, ratio_clip_max=0.15)
    ),
    # One step for all rollouts: trl then has no old log-probabilities, and its ratio is 1 with a gradient.
    "on-policy": Variant(
        {**TOKEN, "num_iterations": 1}, ours(force_on_policy_ratio=True, ratio_clip_min=0.0, ratio_clip_max=0.0)
    ),
    # NeMo-RL's KL: its weight has a gradient, which trl calls bias correction. On policy the weight is 1.
    "kl-on-policy": Variant(
        {**TOKEN, "beta": 0.3, "use_bias_correction_kl": True, "num_iterations": 1},
        ours(beta=0.3, force_on_policy_ratio=True),
    ),
    "kl-on-policy-sequence": Variant(
        {**SEQUENCE, "beta": 0.3, "use_bias_correction_kl": True, "num_iterations": 1},
        ours(token=False, beta=0.3, force_on_policy_ratio=True),
    ),
    "kl-weighted": Variant(
        {**TOKEN, "beta": 0.3, "use_bias_correction_kl": True},
        ours(beta=0.3, use_on_policy_kl_approximation=True),
    ),
    "kl-weighted-sequence": Variant(
        {**SEQUENCE, "beta": 0.3, "use_bias_correction_kl": True},
        ours(token=False, beta=0.3, use_on_policy_kl_approximation=True),
    ),
    "tis": Variant(
        {**TOKEN, **ENGINE, **limits("token_truncate", None, 1.1)}, ours(**corrected("tis", None, 1.1)), engine=True
    ),
    "tis-both-ends": Variant(
        {**TOKEN, **ENGINE, **limits("token_truncate", 0.95, 1.1)}, ours(**corrected("tis", 0.95, 1.1)), engine=True
    ),
    "icepop": Variant(
        {**TOKEN, **ENGINE, **limits("token_mask", 0.9, 1.1)}, ours(**corrected("icepop", 0.9, 1.1)), engine=True
    ),
    "icepop-sequence-loss": Variant(
        {**SEQUENCE, **ENGINE, **limits("token_mask", 0.9, 1.1)},
        ours(token=False, **corrected("icepop", 0.9, 1.1)),
        engine=True,
    ),
    "tis-cispo": Variant(
        {"loss_type": "cispo", "epsilon_high": 1.15, **ENGINE, **limits("token_truncate", None, 1.1)},
        ours(use_cispo=True, ratio_clip_min=1.0, ratio_clip_max=0.15, **corrected("tis", None, 1.1)),
        engine=True,
    ),
    "gspo-tis": Variant(
        {**GSPO, **ENGINE, **limits("sequence_truncate", 0.9, 1.1)},
        ours(**OUR_GSPO, **corrected("tis", 0.9, 1.1)),
        engine=True,
    ),
    "gspo-icepop": Variant(
        {**GSPO, **ENGINE, **limits("sequence_mask", 0.85, 1.1)},
        ours(**OUR_GSPO, **corrected("icepop", 0.85, 1.1)),
        engine=True,
    ),
    "all-at-once": Variant(
        {
            **TOKEN,
            **ENGINE,
            **limits("token_truncate", None, 1.1),
            "epsilon": 0.1,
            "epsilon_high": 0.28,
            "delta": 1.5,
        },
        ours(ratio_clip_min=0.1, ratio_clip_max=0.28, ratio_clip_c=1.5, **corrected("tis", None, 1.1)),
        moved=0.03,
        engine=True,
    ),
}


@dataclass(frozen=True)
class Rollouts:
    """Prompts of 3 to 9 tokens, SAMPLES answers of 1 to 12 to each, and what an engine said of each answer token."""

    prompts: list[np.ndarray]
    answers: list[np.ndarray]
    engine_error: list[np.ndarray]

    @staticmethod
    def draw(seed: int = 0) -> Rollouts:
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(2, VOCAB, n) for n in (3, 9, 6)]
        answers = [rng.integers(2, VOCAB, int(rng.integers(1, 13))) for _ in range(GROUPS * SAMPLES)]
        return Rollouts(prompts, answers, [0.15 * rng.standard_normal(len(ids)) for ids in answers])

    def groups(self) -> list[Group]:
        def sequences(g: int) -> tuple[np.ndarray, ...]:
            answers = self.answers[g * SAMPLES : (g + 1) * SAMPLES]
            return tuple(np.concatenate([self.prompts[g], answer]) for answer in answers)

        return [Group(len(prompt), sequences(g)) for g, prompt in enumerate(self.prompts)]


@dataclass(frozen=True)
class Oracle:
    """What trl computed, and the weights with which: old sampled, model was trained, reference is the KL's."""

    old: Any
    model: Any
    reference: Any
    rollouts: Rollouts
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    advantages: Tensor


def moved(seed: int, by: float) -> Any:
    """The Llama of seed 1, each parameter moved by noise."""
    model, noise = hf_model("llama", seed=1), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=noise)
    return model


@pytest.fixture(scope="module")
def trl(byte_tokenizer, layout, tmp_path_factory) -> Iterator[Callable[..., Oracle]]:
    """Runs trl's GRPOTrainer on one batch of given rollouts, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_DISABLED"):
            patch.setenv(name, "1")
        import datasets
        import trl

        folder = tmp_path_factory.mktemp("trl-grpo")
        reference = moved(3, 0.03)
        reference.save_pretrained(folder / "reference")
        rollouts = Rollouts.draw()
        old = hf_model("llama", seed=1)
        engine_logps = _engine_logps(old, layout, rollouts)

        def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
            assert len(prompts) == len(rollouts.answers)
            return {
                "prompt_ids": [rollouts.prompts[i // SAMPLES].tolist() for i in range(len(prompts))],
                "completion_ids": [ids.tolist() for ids in rollouts.answers],
                "logprobs": [logps.tolist() for logps in engine_logps],
            }

        def compute(variant: Variant, **options: Any) -> Oracle:
            model = hf_model("llama", seed=1)
            model.config._name_or_path = str(folder / "reference")  # where trl takes its reference from
            settings = {"beta": 0.0, "num_iterations": 2, "vllm_importance_sampling_correction": False}
            trainer = trl.GRPOTrainer(
                model=model,
                reward_funcs=lambda completions, **_: REWARDS,
                rollout_func=rollout,
                args=trl.GRPOConfig(
                    output_dir=str(folder),
                    per_device_train_batch_size=GROUPS * SAMPLES,
                    num_generations=SAMPLES,
                    report_to=[],
                    use_cpu=True,
                    bf16=False,
                    gradient_checkpointing=False,
                    dataloader_pin_memory=False,
                    disable_tqdm=True,
                    **{**settings, **variant.trl, **options},
                ),
                train_dataset=datasets.Dataset.from_list([{"prompt": "p"}] * GROUPS),
                processing_class=byte_tokenizer.hf,
            )
            trainer.current_gradient_accumulation_steps = 1
            trainer.use_vllm = variant.engine  # its own start would want a server; the rollouts are there already
            trainer._last_loaded_step = trainer.state.global_step
            trainer.vllm_generation = types.SimpleNamespace()
            trainer.model.train()
            inputs = trainer._generate_and_score_completions([{"prompt": "p"}] * len(rollouts.answers))
            found = inputs["advantages"]
            if variant.trl.get("num_iterations") == 1:
                assert "old_per_token_logps" not in inputs
            target = moved(2, variant.moved)
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), target.parameters(), strict=True):
                    parameter.copy_(value)
            loss = trainer.compute_loss(trainer.model, {**inputs, "advantages": ADVANTAGES})
            loss.backward()
            logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            return Oracle(old, target, reference, rollouts, loss.item(), logged, gradients, found)

        yield compute


def _engine_logps(old: Any, layout: Any, rollouts: Rollouts) -> list[np.ndarray]:
    """The old policy's log-probabilities of the answers, each off by a little, as another engine's would be."""
    batch = batch_of(rollouts.groups())
    (logps,) = policy_of(old, layout).logps([batch])
    own = [row[mask > 0].numpy() for row, mask in zip(logps, batch.mask_NR, strict=True)]
    return [a + b for a, b in zip(own, rollouts.engine_error, strict=True)]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, trl) -> tuple[Variant, Oracle]:
    variant = VARIANTS[request.param]
    return variant, trl(variant)


def computed(
    variant: Variant, oracle: Oracle, layout: Any, *, micro: int, **options: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics, and gradients under their Hugging Face names, of one training step without update or clipping."""
    every = oracle.rollouts.groups()
    starts = range(0, len(every), micro)
    batches = [batch_of(every[i : i + micro], **options) for i in starts]
    previous = policy_of(oracle.old, layout).logps(batches)
    references = policy_of(oracle.reference, layout).logps(batches)
    error = np.concatenate(oracle.rollouts.engine_error)
    tokens = torch.tensor(float(len(error)))
    generated, taken = [], 0
    for batch, logps in zip(batches, previous, strict=True):
        counted = batch.mask_NR > 0
        off = torch.zeros_like(logps)
        if variant.engine:
            off[counted] = torch.from_numpy(error[taken : taken + int(counted.sum())]).float()
        taken += int(counted.sum())
        generated.append(logps + off)
    policy = policy_of(oracle.model, layout)
    policy.make_trainable(megatron_section(lr=0.0, clip=0.0, weight_decay=0.0), total_steps=1)

    def loss(logps: Tensor, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch: Batch = batches[i]
        first = starts[i] * SAMPLES
        count = len(logps)
        return grpo_loss(
            logps,
            previous[i],
            generated[i],
            references[i],
            ADVANTAGES[first : first + count],
            batch.mask_NR,
            torch.ones(count),
            config=variant.ours,
            valid_tokens=tokens,
            valid_sequences=torch.tensor(float(GROUPS * SAMPLES)),
        )

    metrics = policy.train_step(batches, loss, METRICS)
    gradients = {
        hf_name: value
        for name, parameter in policy.gpt.named_parameters()
        for hf_name, value in hf.to_hf(name, parameter.main_grad, policy.architecture)
    }
    return metrics, gradients


def assert_same(metrics: dict[str, float], gradients: dict[str, Tensor], oracle: Oracle) -> None:
    assert metrics["loss"] == pytest.approx(oracle.loss, rel=TOLERANCE, abs=ROUNDING)
    assert gradients.keys() == oracle.gradients.keys()
    off = {
        name: float((gradients[name] - expected).norm() / expected.norm())
        for name, expected in oracle.gradients.items()
    }
    worst = max(off, key=off.__getitem__)
    assert off[worst] < TOLERANCE, f"{worst} is off by {off[worst]:.1e}"


def test_the_variants_put_clipping_and_limits_to_the_test(case, layout):
    """Each variant has tokens on both sides of what it is about, else equality would prove little."""
    variant, oracle = case
    metrics, _ = computed(variant, oracle, layout, micro=GROUPS)
    if not variant.ours.force_on_policy_ratio:
        assert 0.01 < metrics["clip_high_share"] < 0.6
        assert variant.ours.use_cispo or 0.01 < metrics["clip_low_share"] < 0.6
    if variant.ours.ratio_clip_c is not None:
        assert metrics["probs_ratio_max"] > variant.ours.ratio_clip_c
    if variant.engine:
        assert 0.1 < metrics["is_oob_ratio"] < 0.9
    if variant.ours.reference_policy_kl_penalty:
        assert metrics["kl_penalty"] > 0.01


@pytest.mark.parametrize("micro", [GROUPS, 1], ids=["one-batch", "a-micro-batch-each"])
def test_loss_and_every_gradient_are_trls(case, layout, micro):
    variant, oracle = case
    assert_same(*computed(variant, oracle, layout, micro=micro), oracle)


def test_prompts_that_are_not_shared_make_no_difference(trl, layout):
    variant = VARIANTS["all-at-once"]
    oracle = trl(variant)
    assert_same(*computed(variant, oracle, layout, micro=1, share_prompt=False), oracle)


def test_metrics_are_trls(case, layout):
    variant, oracle = case
    metrics, _ = computed(variant, oracle, layout, micro=2)
    expected = oracle.metrics
    if variant.trl["loss_type"] != "cispo" and not variant.ours.sequence_level_importance_ratios:
        assert metrics["clip_low_share"] == pytest.approx(expected["clip_ratio/low_mean"], abs=1e-6)
        assert metrics["clip_high_share"] == pytest.approx(expected["clip_ratio/high_mean"], abs=1e-6)
    if variant.ours.reference_policy_kl_penalty and variant.ours.token_level_loss:
        assert metrics["kl_penalty"] == pytest.approx(expected["kl"], rel=1e-4)
    if variant.engine:
        ratio = expected["sampling/importance_sampling_ratio/mean"]
        assert metrics["sampling_importance_ratio"] == pytest.approx(ratio, rel=1e-5)
        # trl logs the mean of |old - engine|, we the mean of its exponential: between e^mean and e^max.
        low = np.exp(expected["sampling/sampling_logp_difference/mean"])
        high = np.exp(expected["sampling/sampling_logp_difference/max"])
        assert low < metrics["token_mult_prob_error"] < high


def test_the_kls_gradient_is_nemo_rl_mains_and_not_that_of_version_06(trl, layout):
    """Without the weight's gradient (trl's use_bias_correction_kl=False) the loss is the same and learns otherwise."""
    variant = VARIANTS["kl-on-policy"]
    oracle = trl(variant, use_bias_correction_kl=False)
    metrics, gradients = computed(variant, oracle, layout, micro=GROUPS)
    assert metrics["loss"] == pytest.approx(oracle.loss, rel=TOLERANCE, abs=ROUNDING)
    off = [float((gradients[name] - value).norm() / value.norm()) for name, value in oracle.gradients.items()]
    assert min(off) > 0.01


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_trls(trl, scale):
    """From the group's mean; trl divides by the standard deviation + 1e-4, we by + 1e-6, equal groups not at all."""
    found = trl(VARIANTS["token"], scale_rewards=scale).advantages
    rewards, groups = torch.tensor(REWARDS), torch.arange(GROUPS).repeat_interleave(SAMPLES)
    baselines, stds = group_statistics(rewards, groups, leave_one_out=False)
    expected = advantages(rewards, baselines, stds, normalize=scale == "group").double()
    if scale == "group":
        expected = expected * (stds + 1e-6) / (stds + 1e-4)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_metrics_do_not_depend_on_micro_batches(trl, layout):
    """Sums add up and extremes are extremes, to fp32's last digits."""
    variant = VARIANTS["all-at-once"]
    oracle = trl(variant)
    whole, _ = computed(variant, oracle, layout, micro=GROUPS)
    parts, _ = computed(variant, oracle, layout, micro=1)
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert whole["probs_ratio_min"] < 0.9 < 1.1 < whole["probs_ratio_max"]
