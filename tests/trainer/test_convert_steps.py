"""convert/hf_to_megatron and convert/megatron_to_hf: every bit, every file, at any layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import SHAPES, VOCAB, to_hf, to_megatron
from models import hf_model, policy_of
from runs import tensors
from safetensors.torch import load_file, save_file
from small_tokenizers import CHATML

from nemotron_launch.trainer import hf, warm_start
from nemotron_launch.trainer.batch import Group, collate
from nemotron_launch.trainer.checkpoints import WEIGHTS
from nemotron_launch.trainer.megatron import checkpoint
from nemotron_launch.trainer.megatron.model import Numerics
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.tokenizer import Tokenizer, load_tokenizer

WORKER = Path(__file__).with_name("conversions.py")
SHARDED = "qwen2-untied"  # its weights come in several files, with an index


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder, as its files have it."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_weights(got: Path, expected: Path) -> None:
    ours, theirs = weights(got), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def save_model(family: str, tied: bool, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    model = hf_model(family, tied=tied, vocab_size=VOCAB).to(dtype)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, chat_folder) -> Path:
    """Hugging Face folders of every shape, as transformers writes them, with a tokenizer; the tied ones in bfloat16."""
    folder = tmp_path_factory.mktemp("conversions") / "models"
    for name, (family, tied) in SHAPES.items():
        options = {"max_shard_size": "100KB"} if name == SHARDED else {}
        save_model(family, tied, folder / name, torch.bfloat16 if tied else torch.float32, **options)
        for file in chat_folder.iterdir():
            shutil.copy(file, folder / name)
    assert (folder / SHARDED / hf.INDEX).exists()
    return folder


@pytest.fixture(scope="module")
def alone(models, layout) -> Path:
    """All of them converted there and back by this process."""
    folder = models.parent / "alone"
    for model in sorted(models.iterdir()):
        to_hf(folder / model.name, to_megatron(folder / model.name, model))
    return folder


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "conversion.json").read_text())


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_keeps_every_bit_and_every_file(models, alone, name):
    back = alone / name / "hf"
    assert_same_weights(back, models / name)
    kept = {path.name for path in (models / name).iterdir() if not path.name.startswith("model")}
    assert {path.name for path in back.iterdir() if not path.name.startswith("model")} == kept | {"conversion.json"}
    for file in kept - {"config.json"}:
        assert (back / file).read_bytes() == (models / name / file).read_bytes(), file
    assert json.loads((back / "config.json").read_text()) == json.loads((models / name / "config.json").read_text())


@pytest.mark.parametrize("name", SHAPES)
def test_both_sides_compute_the_same_and_say_so(models, alone, name, layout):
    """Within 1e-4 of logits of up to 3: transformers with the exported folder, megatron-core with the checkpoint."""
    import transformers

    step = alone / name / "checkpoints" / "step_0"
    policy = Policy(hf.read_config(models / name), layout, Numerics())
    checkpoint.load_weights(step / WEIGHTS, policy.gpt)
    ids = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(7))
    model = transformers.AutoModelForCausalLM.from_pretrained(alone / name / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids[None]).logits[0, :-1]
    got = policy.logits(collate([Group(0, (ids.numpy(),))], pad_id=0, device=layout.device))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    said = json.loads((step / "training_info.json").read_text())["conversion"]
    for one in (said, record(alone / name / "hf")):
        assert 0 < one["max_logit_difference"] < 1e-4
        assert one["compared_tokens"] > 50


LAYOUTS = {"tp2": (2, 1, list(SHAPES)), "pp2": (1, 2, ["llama-untied", "qwen3-tied"])}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout_of_two(request, models, alone) -> tuple[Path, list[str]]:
    """The same by two processes, and back what one process had written."""
    tensor, pipeline, names = LAYOUTS[request.param]
    command = [sys.executable, "-W", "ignore", "-m", "nemotron_launch.trainer.spawn", "--procs", "2", "--"]
    command += [str(WORKER), str(models.parent), str(tensor), str(pipeline), *names]
    env = {**os.environ, "PYTHONPATH": str(WORKER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return models.parent / f"tp{tensor}-pp{pipeline}", names


@pytest.mark.slow
def test_two_processes_convert_like_one(models, alone, layout_of_two):
    """Tensor- or pipeline-parallel: the same bits there and back; each reads what the other layout wrote."""
    made, names = layout_of_two
    for name in names:
        assert_same_weights(made / name / "hf", models / name)
        assert_same_weights(made / name / "other" / "hf", models / name)
        assert record(made / name / "other" / "hf")["max_logit_difference"] < 1e-4
        ours, theirs = (tensors(folder / name / "checkpoints/step_0") for folder in (made, alone))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            rows = VOCAB if key in hf.VOCABULARIES else None  # behind it, rows that fill up two ranks' shares
            assert torch.equal(ours[key][:rows], value[:rows]), key
            assert rows is None or not ours[key][rows:].any(), key


@pytest.mark.parametrize("name", ["llama-untied", "qwen3-tied"])
def test_what_a_policy_saved_comes_back_bit_for_bit(name, layout, tmp_path, byte_tokenizer):
    """Megatron → Hugging Face → Megatron, from a checkpoint as training writes it, vocabulary of 259."""
    family, tied = SHAPES[name]
    policy = policy_of(hf_model(family, tied=tied), layout)
    step = save_step(policy, byte_tokenizer, tmp_path / "run" / "checkpoints")
    folder = to_hf(tmp_path / "there", step)
    again = to_megatron(tmp_path / "back", folder)
    before, after = tensors(step), tensors(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], value) for key, value in after.items())
    read = hf.open_weights(folder, policy.architecture)
    assert all(torch.equal(read(key), value) for key, value in hf.export_weights(policy.gpt, policy.architecture))


def save_step(policy: Policy, tokenizer: Tokenizer | None, checkpoints: Path) -> Path:
    """step_7 as a training run leaves it, without its optimizer."""
    step = checkpoints / "step_7"
    (step / WEIGHTS).mkdir(parents=True)
    checkpoint.save(step / WEIGHTS, policy.gpt, None, None)
    policy.architecture.write(step / "policy")
    if tokenizer is not None:
        tokenizer.save(step / "policy" / "tokenizer")
    info = {"step": 7, "tokenizer": tokenizer.fingerprint if tokenizer else None}
    (step / "training_info.json").write_text(json.dumps(info))
    return step


def test_a_byte_level_policy_gets_a_tokenizer_that_transformers_loads(layout, tmp_path):
    """The same ids for every byte, its special tokens and its chat template."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer({"name": "bytes", "chat_template": CHATML}, None)
    step = save_step(policy_of(hf_model("llama"), layout), tokenizer, tmp_path / "run")
    folder = to_hf(tmp_path / "out", step)
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "".join(map(chr, range(1, 256))) + "東京 <eos><pad>"
    assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert tokenizer.encode("é<eos>") == [0xC3, 0xA9, 258]
    talk = [{"role": "user", "content": "5 1"}]
    rendered = loaded.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.render(talk, add_generation_prompt=True)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (258, 256)
    assert Tokenizer.from_folder(folder).fingerprint == tokenizer.fingerprint
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [258]


def test_a_training_step_starts_from_what_was_converted(models, alone, layout):
    """As checkpointing.pretrained_checkpoint.path: shape and tokenizer agree, and the weights are the model's."""
    name = "qwen3-tied"
    config = {
        "policy": {"model_name": str(models / name)},
        "checkpointing": {"pretrained_checkpoint": {"path": str(alone / name / "checkpoints")}},
    }
    architecture = hf.read_config(models / name)
    tokenizer = Tokenizer.from_folder(models / name).fingerprint
    start = warm_start.find(config, architecture, tokenizer=tokenizer, drawn="", step_dir=None)
    policy = Policy(architecture, layout, Numerics())
    warm_start.load(policy, start)
    for key, value in hf.export_weights(policy.gpt, architecture):
        assert torch.equal(value, weights(models / name)[key].float()), key


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed"])
def test_each_tensor_keeps_its_type(layout, tmp_path, dtype):
    """Mixed: norms and biases of each kind in float32, matrices in bfloat16."""
    first = torch.float16 if dtype == "float16" else torch.bfloat16
    model = save_model("qwen2", False, tmp_path / "model", first)
    if dtype == "mixed":
        values = weights(model)
        values = {name: value.float() if value.dim() == 1 else value for name, value in values.items()}
        save_file(values, model / "model.safetensors", metadata={"format": "pt"})
    back = to_hf(tmp_path / "back", to_megatron(tmp_path / "there", model))
    assert_same_weights(back, model)


def test_another_precision_is_rounded_once_and_compared_after_rounding(layout, tmp_path):
    model = save_model("llama", True, tmp_path / "model")
    step = to_megatron(tmp_path / "there", model, precision="bfloat16")
    back = to_hf(tmp_path / "back", step)
    for name, value in weights(model).items():
        assert torch.equal(weights(back)[name], value.bfloat16()), name
    rounded = to_hf(tmp_path / "rounded", to_megatron(tmp_path / "as-is", model), precision="bfloat16")
    assert_same_weights(rounded, back)
    assert record(rounded)["max_logit_difference"] < 1e-4
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_go_into_several_files(alone, tmp_path, models):
    import transformers

    name = "llama-untied"
    folder = to_hf(tmp_path, alone / name / "checkpoints", max_file_bytes=100_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_weights(folder, models / name)
    transformers.AutoModelForCausalLM.from_pretrained(folder)
