"""Hugging Face folders and shards: files, sizes, padding, and what a broken folder is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import hf_model, policy_of

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import hf, hf_folders
from nemotron_launch.trainer.hand_over import write_weights
from nemotron_launch.trainer.hf_folders import FolderWriter, config_of
from nemotron_launch.trainer.megatron.model import padded_vocab
from nemotron_launch.trainer.policy import Policy

FAMILIES = [("llama", False), ("qwen2", True), ("qwen3", True)]


@pytest.fixture
def policy(layout) -> Policy:
    return policy_of(hf_model("qwen3"), layout)


def whole(parts: list[torch.Tensor], name: str, parameter: torch.nn.Parameter, a) -> torch.Tensor:
    """The parameter of which `parts` are the shards of all tensor-parallel ranks, without the vocabulary's padding."""
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    if not getattr(parameter, "tensor_model_parallel", False):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    joined = torch.cat(parts, parameter.partition_dim)
    return joined[: a.vocab_size] if name in hf.VOCABULARIES else joined


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("size", [1, 2])
def test_shards_of_two_ranks_hold_the_whole_model_once(layout, family, tied, size):
    policy = policy_of(hf_model(family, tied=tied), layout)
    a = policy.architecture
    for name, parameter in policy.gpt.named_parameters():
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            rows = padded_vocab(a, size) if name in hf.VOCABULARIES else shape[parameter.partition_dim]
            shape[parameter.partition_dim] = rows // size
        place = torch.nn.Parameter(torch.empty(shape))
        place.__dict__.update(parameter.__dict__)  # megatron-core's marks: whether and where it is cut
        value = parameter.detach()
        parts = [hf.shard(value, place, name, size=size, rank=rank) for rank in range(size)]
        assert all(part.shape == place.shape for part in parts), name
        assert torch.equal(whole(parts, name, parameter, a), value), name


def test_a_vocabulary_is_padded_with_zero_rows_on_the_last_rank_only(policy):
    """259 rows on 2 ranks are 130 each, the last of them padding."""
    name = "embedding.word_embeddings.weight"
    value = dict(policy.gpt.named_parameters())[name].detach()
    place = torch.nn.Parameter(torch.empty(130, value.shape[1]))
    place.tensor_model_parallel, place.partition_dim = True, 0
    first, last = (hf.shard(value, place, name, size=2, rank=rank) for rank in (0, 1))
    assert torch.equal(torch.cat([first, last[:-1]]), value)
    assert not last[-1].any()


def test_query_key_and_value_are_interleaved_per_group_and_back(policy):
    """4 heads of 32 in 2 groups: rows are [q0 q1 k0 v0 q2 q3 k1 v1], 32 of each."""
    a = policy.architecture
    q, k, v = (torch.arange(n * 32).view(-1, 1) + start for n, start in ((4, 0), (2, 1000), (2, 2000)))
    fused = hf.fuse_qkv(q, k, v, a)
    heads = [int(rows[0]) // 32 if rows[0] < 1000 else int(rows[0]) for rows in fused.view(-1, 32)]
    assert heads == [0, 1, 1000, 2000, 2, 3, 1032, 2032]
    for got, expected in zip(hf.split_qkv(fused, a), (q, k, v), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_every_tensor_has_the_shape_that_its_config_makes_it(family, tied):
    model = hf_model(family, tied=tied)
    a = hf.hf_architecture(model.config.to_dict(), where="")
    for name, value in model.state_dict().items():
        assert hf.hf_shape(name, a) == tuple(value.shape), name


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_a_model_in_several_files_is_the_same_to_us_and_to_transformers(layout, family, tied, tmp_path):
    import transformers

    model = hf_model(family, tied=tied)
    policy = policy_of(model, layout)
    tmp_path = tmp_path / "model"
    write_weights(policy, tmp_path, max_file_bytes=100_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / name).stat().st_size < 104_000 for name in files)  # and a header
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    read = hf.open_weights(tmp_path, hf.read_config(tmp_path))
    index = json.loads((tmp_path / hf.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        if name in index["weight_map"]:
            assert torch.equal(read(name), value), name


def test_what_transformers_writes_in_several_files_is_read(layout, tmp_path):
    model = hf_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    read = hf.open_weights(tmp_path, hf.read_config(tmp_path))
    for name, value in model.state_dict().items():
        assert torch.equal(read(name), value), name


def test_the_writer_takes_tensors_in_any_order_and_rounds_once(policy, tmp_path):
    """Of several types in one file, too: norms in float32, the rest in bfloat16."""
    a = policy.architecture
    values = dict(hf.export_weights(policy.gpt, a))
    dtypes = {name: torch.float32 if "norm" in name else torch.bfloat16 for name in values}
    writer = FolderWriter(tmp_path / "model", a, dtypes, max_file_bytes=50_000)
    for name in reversed(values):
        writer.add(name, values[name])
    writer.finish(config_of(a, dtypes.values()))
    assert [path.name for path in tmp_path.iterdir()] == ["tmp_model"]  # nothing yet that somebody could take for whole
    writer.publish()
    read = hf.open_weights(tmp_path / "model", a)
    for name, value in values.items():
        assert torch.equal(read(name), value.to(dtypes[name])), name
        assert read(name).dtype == read.dtype(name) == dtypes[name]


def test_a_full_disk_leaves_nothing_and_the_export_can_be_repeated(policy, tmp_path, monkeypatch):
    """No space after the second tensor: what comes is taken, the error said in the end."""
    full = hf_folders.FolderWriter._at
    count = [0]

    def at(self, name):
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device")
        return full(self, name)

    monkeypatch.setattr(hf_folders.FolderWriter, "_at", at)
    with pytest.raises(UserError, match="no space left"):
        write_weights(policy, tmp_path / "model", max_file_bytes=100_000)
    assert list(tmp_path.iterdir()) == []
    write_weights(policy, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_what_a_killed_export_left_is_no_model_and_in_nobody_s_way(policy, tmp_path):
    (tmp_path / "tmp_model").mkdir()
    (tmp_path / "tmp_model" / "model-00009-of-00009.safetensors").write_bytes(b"torn")
    write_weights(policy, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model", "model.safetensors"]


def broken(folder: Path, how: str) -> None:
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config cut short":
        (folder / "config.json").write_text('{"model_type": "qwen3", "hidden_s')
    elif how == "config of another model":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 200}))
    elif how == "fewer tokens than rows":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 258}))
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "weights cut short":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "a layer too few":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif how == "a file of the index is gone":
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}))


@pytest.mark.parametrize(
    ("how", "where", "said"),
    [
        ("no config", "", "it has no config.json"),
        ("config cut short", "config.json", "is not JSON"),
        (
            "config of another model",
            "model.safetensors",
            r"model.layers.0.mlp.gate_proj.weight has shape \[176, 64\], config.json makes it \[200, 64\]",
        ),
        ("fewer tokens than rows", "model.safetensors", r"has shape \[259, 64\], config.json makes it \[258, 64\]"),
        ("no weights", "", "has no model.safetensors"),
        ("weights cut short", "model.safetensors", "cannot be read as safetensors"),
        ("a layer too few", "", "has no tensor model.layers.2."),
        ("a file of the index is gone", "gone.safetensors", "cannot be read as safetensors"),
    ],
)
def test_a_broken_folder_is_told_what_is_wrong_and_where(layout, policy, tmp_path, how, where, said):
    folder = tmp_path / "model"
    write_weights(policy, folder)
    broken(folder, how)
    with pytest.raises(UserError, match=said) as raised:
        architecture = hf.read_config(folder)
        read = hf.open_weights(folder, architecture)
        hf.load_weights(Policy(architecture, layout, policy.numerics).gpt, architecture, read, size=1, rank=0)
    assert raised.value.where == str(folder / where)
