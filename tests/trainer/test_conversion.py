"""Weights from and to Hugging Face: the same function on both sides."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, batch_of, hf_model, pairs, policy_of

from nemotron_launch.trainer.batch import Group
from nemotron_launch.trainer.hand_over import write_weights

SHAPES = [(family, tied) for family in ("llama", "qwen2", "qwen3") for tied in (False, True)]


def policy_logps(policy, ids):
    """Log-probability of each token of one sequence but the first."""
    batch = batch_of([Group(0, (ids.numpy(),))])
    return policy.logps([batch])[0][0, 1:]


def hf_logps(model, ids):
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]


def policy_logits(policy, ids):
    """Logits over the whole vocabulary behind every token of one sequence but the last."""
    seen = []
    hook = policy.gpt.output_layer.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    try:
        policy_logps(policy, ids)
    finally:
        hook.remove()
    return seen[0][:, 0]


@pytest.mark.parametrize(("family", "tied"), SHAPES)
def test_converted_policy_has_the_logits_of_transformers(layout, family, tied, tmp_path):
    """Within 1e-5 of logits of up to 2.7; both ways, so also transformers' of what we export."""
    import transformers

    model = hf_model(family, tied=tied)
    policy = policy_of(model, layout)
    write_weights(policy, tmp_path / "model")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(7))
    got = policy_logits(policy, ids)
    for theirs in (model, exported):
        with torch.no_grad():
            expected = theirs(ids[None]).logits[0, :-1]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "tied"), SHAPES)
def test_converted_policy_computes_what_transformers_computes(layout, family, tied):
    model = hf_model(family, tied=tied)
    policy = policy_of(model, layout)
    ids = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(policy_logps(policy, ids).double(), hf_logps(model, ids), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("family", "tied"), SHAPES)
def test_exported_folder_loads_in_transformers_bit_for_bit(layout, family, tied, tmp_path):
    import transformers

    model = hf_model(family, tied=tied)
    policy = policy_of(model, layout)
    write_weights(policy, tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert type(loaded) is type(model)
    for (name, there), here in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(there, here), name
    ids = torch.arange(2, 40)
    torch.testing.assert_close(hf_logps(loaded, ids), policy_logps(policy, ids).double(), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_rotary_positions_match_transformers(layout, scaling):
    model = hf_model("llama", rope_scaling=scaling, rope_theta=50000.0)
    ids = torch.randint(0, VOCAB, (200,), generator=torch.Generator().manual_seed(3))
    got = policy_logps(policy_of(model, layout), ids).double()
    torch.testing.assert_close(got, hf_logps(model, ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_shared_prompt_changes_no_log_probability(layout, share_prompt):
    model = hf_model("qwen3", tied=True)
    policy = policy_of(model, layout)
    groups = pairs(5)
    batch = batch_of(groups, share_prompt=share_prompt)
    got = policy.logps([batch])[0].sum(-1)
    expected = [
        hf_logps(model, torch.as_tensor(ids))[group.prompt_len - 1 :].sum() for group in groups for ids in group.ids
    ]
    torch.testing.assert_close(got.double(), torch.stack(expected), atol=2e-5, rtol=1e-6)
