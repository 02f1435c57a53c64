"""Shapes of policies: what config.json and policy.architecture say, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from models import SHAPE, hf_model

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.architecture import (
    differences,
    hf_architecture,
    hf_config,
    inline_architecture,
    read_architecture,
)

INLINE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": None,
    "head_dim": None,
}
LLAMA = {"model_type": "llama", **SHAPE}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_transformers_writes_is_read_and_written_back(family, tied):
    config = hf_model(family, tied=tied, rope_theta=50000.0).config.to_dict()
    architecture = hf_architecture(config, where="config.json")
    assert architecture.family == family
    assert architecture.tie_word_embeddings is tied
    assert architecture.rope_theta == 50000.0
    assert hf_architecture(hf_config(architecture), where="") == architecture
    for key, value in hf_config(architecture).items():
        if key in config and key != "architectures":
            assert config[key] == value, key


def test_rotary_settings_of_transformers_4_and_5_are_the_same():
    """Llama 3.2's config.json, as both versions write it."""
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = hf_architecture({**LLAMA, "rope_theta": 500000.0, "rope_scaling": scaling}, where="")
    new = hf_architecture({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 500000.0}}, where="")
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (500000.0, scaling)
    before_4_43 = {"type": "linear", "factor": 2.0}
    renamed = hf_architecture({**LLAMA, "rope_scaling": before_4_43}, where="").rope_scaling
    assert renamed == {"rope_type": "linear", "factor": 2.0}


def test_sizes_that_are_left_out_are_those_of_transformers():
    bare = {key: LLAMA[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")}
    bare |= {"vocab_size": 259}
    llama = hf_architecture({**bare, "model_type": "llama"}, where="")
    assert (llama.num_key_value_heads, llama.head_dim, llama.rope_theta) == (4, 16, 10000.0)
    assert hf_architecture({**bare, "model_type": "qwen3"}, where="").head_dim == 128


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mixtral"}, "model type 'mixtral' is not one"),
        ({"model_type": None}, "model type None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"hidden_size": None}, "has no hidden_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_variant_that_computes_something_else_is_refused_by_name(change, said):
    with pytest.raises(UserError) as raised:
        hf_architecture({**LLAMA, **change}, where="model/config.json")
    assert str(raised.value).startswith(f"error: model/config.json: {said}")


def test_an_inline_architecture_takes_the_tokenizers_vocabulary_and_the_usual_head_size():
    architecture = inline_architecture(INLINE, tokenizer_vocab_size=259)
    assert (architecture.vocab_size, architecture.head_dim) == (259, 16)
    assert inline_architecture({**INLINE, "vocab_size": 512}, tokenizer_vocab_size=259).vocab_size == 512
    with pytest.raises(UserError, match="128 is smaller than the tokenizer's vocabulary of 259"):
        inline_architecture({**INLINE, "vocab_size": 128}, tokenizer_vocab_size=259)


def test_a_stored_architecture_is_read_back(tmp_path):
    architecture = inline_architecture(
        {**INLINE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, tokenizer_vocab_size=259
    )
    assert read_architecture(tmp_path) is None
    architecture.write(tmp_path)
    assert read_architecture(tmp_path) == architecture
    (tmp_path / "architecture.json").write_text(json.dumps({"layers": 2}))
    with pytest.raises(UserError, match="is not an architecture file"):
        read_architecture(tmp_path)


def test_differences_name_what_changes_shapes_or_maths_and_nothing_else():
    one = inline_architecture(INLINE, tokenizer_vocab_size=259)
    other = dataclasses.replace(one, num_layers=4, rope_theta=5e5, max_position_embeddings=64)
    assert differences(one, one) == []
    assert differences(one, other) == [
        "num_layers: 2 in the checkpoint, 4 in the config",
        "rope_theta: 10000.0 in the checkpoint, 500000.0 in the config",
    ]
