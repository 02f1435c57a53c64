"""What conversion refuses, and that it never leaves half a model where somebody could take it for one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conversions import STEPS, config_of, to_hf, to_megatron
from models import hf_model

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import convert, hf, hf_folders, logit_check, megatron_bridge


@pytest.fixture(scope="module")
def model(tmp_path_factory, layout, byte_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    hf_model("llama", tied=True).save_pretrained(folder)
    byte_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def step(model, tmp_path_factory) -> Path:
    return to_megatron(tmp_path_factory.mktemp("step"), model)


def with_config(model: Path, folder: Path, **changes: Any) -> Path:
    """The model with another config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def left_in(folder: Path) -> list[str]:
    """What a refused conversion left in its output folder, besides its config."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml")


def refused(convert_it: Any, *arguments: Any, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        convert_it(*arguments, **options)
    return caught.value


def test_what_is_no_model_is_told(model, step, tmp_path):
    (tmp_path / "empty").mkdir()
    fp8 = with_config(model, tmp_path / "fp8")
    save_as_int8(fp8)
    told = {
        tmp_path / "empty": "is not a Hugging Face model folder: it has no config.json",
        tmp_path / "gone": "there is no folder",
        step: f"convert/megatron_to_hf megatron_path={step}",
        step.parent: f"convert/megatron_to_hf megatron_path={step}",
        with_config(model, tmp_path / "deeper", num_hidden_layers=3): "has no tensor model.layers.2.",
        with_config(model, tmp_path / "wider", hidden_size=128): "config.json makes it",
        fp8: "is stored as I8, which is no plain floating-point type",
    }
    for number, (path, said) in enumerate(told.items()):
        error = refused(to_megatron, tmp_path / f"out{number}", path)
        assert said in str(error)
        assert error.exit_code == 2
        assert left_in(tmp_path / f"out{number}") == []


def save_as_int8(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = load_file(folder / "model.safetensors")
    values["model.layers.0.mlp.up_proj.weight"] = values["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_hub_id_without_a_network_is_told(tmp_path, monkeypatch):
    from nemotron_launch.trainer.paths import hub_is_offline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_is_offline.cache_clear()
    try:
        error = refused(to_megatron, tmp_path, Path("some/model"))
    finally:
        hub_is_offline.cache_clear()
    assert "some/model is neither a folder nor to be had from the hub" in str(error)
    assert "give a local folder" in str(error)


def test_what_is_no_checkpoint_is_told(model, step, tmp_path):
    torn = shutil.copytree(step, tmp_path / "step_3")
    (torn / "policy/weights/iter_0000000/.metadata").write_bytes(b"\x80")
    unfinished = shutil.copytree(step, tmp_path / "step_4")
    (unfinished / "training_info.json").unlink()
    wrong = shutil.copytree(step, tmp_path / "step_5")
    values = json.loads((wrong / "policy/architecture.json").read_text())
    (wrong / "policy/architecture.json").write_text(json.dumps(values | {"num_layers": 3}))
    told = {
        tmp_path / "gone": "there is no checkpoint",
        model: f"convert/hf_to_megatron hf_path={model}",
        torn: "is not a Megatron checkpoint (torch_dist)",
        unfinished: "training_info.json is missing or torn",
        wrong: "of layer 2",
    }
    for number, (path, said) in enumerate(told.items()):
        error = refused(to_hf, tmp_path / f"out{number}", path)
        assert said in str(error)
        assert error.exit_code == 2
        assert left_in(tmp_path / f"out{number}") == []


def test_weights_without_their_architecture_take_that_of_a_named_model(model, step, tmp_path):
    """As Megatron-LM leaves them: iter_0000000 alone."""
    alone = shutil.copytree(step / "policy/weights/iter_0000000", tmp_path / "checkpoints/iter_0000100")
    error = refused(to_hf, tmp_path / "out", alone.parent)
    assert "says nothing of its architecture" in str(error)
    assert "hf_model_id=…" in str(error)
    folder = to_hf(tmp_path / "named", alone.parent, hf_model_id=str(model))
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    (bare := shutil.copytree(model, tmp_path / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    folder = to_hf(tmp_path / "bare-out", alone, hf_model_id=str(bare))  # random ids are compared
    assert json.loads((folder / "conversion.json").read_text())["compared_tokens"] == 63


def test_an_architecture_of_megatron_bridge_needs_it(model, tmp_path):
    hybrid = with_config(model, tmp_path / "hybrid", model_type="nemotron_h")
    error = refused(to_megatron, tmp_path / "out", hybrid)
    assert f"{hybrid} (model type nemotron_h) is not an architecture that is converted here" in str(error)
    assert "Megatron-Bridge is not installed" in str(error)
    assert "nvcr.io/nvidia/nemo-rl" in str(error)


def test_megatron_bridge_is_called_as_it_is_documented(tmp_path, monkeypatch):
    """By a stand-in, for it needs a GPU's libraries; what it leaves appears when it is whole."""
    calls: list[Any] = []

    class AutoBridge:
        @classmethod
        def import_ckpt(cls, hf_model_id: str, megatron_path: str, **options: Any) -> None:
            calls.append(("import", hf_model_id, options))
            Path(megatron_path).mkdir()

        @classmethod
        def from_hf_pretrained(cls, path: str, **options: Any) -> Any:
            calls.append(("from", path, options))
            return SimpleNamespace(export_ckpt=cls.export_ckpt)

        @staticmethod
        def export_ckpt(megatron_path: str, hf_path: str, show_progress: bool = True) -> None:
            calls.append(("export", megatron_path, {"show_progress": show_progress}))
            Path(hf_path).mkdir()
            raise ValueError("no mapping for conv1d")

    module = ModuleType("megatron.bridge")
    module.__spec__ = ModuleSpec("megatron.bridge", None)
    module.AutoBridge = AutoBridge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    bridge = megatron_bridge.require("a hybrid", "hf_path")
    megatron_bridge.to_megatron(bridge, Path("/m"), tmp_path / "a", dtype=torch.bfloat16, trust_remote_code=True)
    error = refused(megatron_bridge.to_hf, bridge, Path("/c"), Path("/m"), tmp_path / "b", trust_remote_code=False)
    assert "Megatron-Bridge: no mapping for conv1d" in str(error)
    assert calls == [
        ("import", "/m", {"trust_remote_code": True, "torch_dtype": torch.bfloat16}),
        ("from", "/m", {"trust_remote_code": False}),
        ("export", "/c", {"show_progress": False}),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_there_already_is_left_alone(model, step, tmp_path, caplog):
    """Of the same weights: nothing to do. Of others: refused."""
    caplog.set_level("INFO")
    folder = to_hf(tmp_path, step)
    before = (folder / "conversion.json").stat().st_mtime_ns
    assert to_hf(tmp_path, step) == folder
    assert to_megatron(step.parents[1], model) == step
    assert [line for line in caplog.messages if "finished already" in line] == [
        f"finished already: {folder} was made of the same weights",
        f"finished already: {step} was made of the same weights",
    ]
    assert (folder / "conversion.json").stat().st_mtime_ns == before
    error = refused(to_hf, tmp_path, step, precision="bfloat16")
    assert f"hf_path: {folder} is there already, made of {step}" in str(error)
    other = tmp_path / "other"
    hf_model("llama", tied=True, seed=1).save_pretrained(other)
    error = refused(to_megatron, step.parents[1], other)
    assert f"megatron_path: {step} is there already, made of {model}" in str(error)
    (tmp_path / "notes").mkdir()
    assert "is there already" in str(refused(to_hf, tmp_path / "x", step, hf_path=str(tmp_path / "notes")))


def test_sides_that_differ_are_not_published(model, step, tmp_path):
    """One weight of one layer is another: caught, said, and nothing is left."""
    for convert_it, source in ((to_hf, step), (to_megatron, model)):
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch)
            error = refused(convert_it, tmp_path / convert_it.__name__, source)
        assert "largest difference" in str(error)
        assert "above 0.0001; nothing was written" in str(error)
        assert "computed in float64" in str(error)  # where rounding is no excuse
        assert error.exit_code == 1
        assert left_in(tmp_path / convert_it.__name__) == []


def spoil(patch: pytest.MonkeyPatch) -> None:
    load = logit_check.checkpoint.load_weights

    def other(folder: Path, gpt: Any) -> None:
        load(folder, gpt)
        with torch.no_grad():
            dict(gpt.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] += 1

    patch.setattr(logit_check.checkpoint, "load_weights", other)


def test_a_full_disk_leaves_nothing(model, step, tmp_path, monkeypatch):
    """Full after a few tensors, on either side; afterwards the same command succeeds."""
    with monkeypatch.context() as patch:
        fail_at_call(patch, hf_folders.FolderWriter, "_at", 5)
        error = refused(to_hf, tmp_path / "hf", step)
        assert "no space left on device" in str(error)
        assert left_in(tmp_path / "hf") == []
    with monkeypatch.context() as patch:
        fail_at_call(patch, hf, "from_hf", 30)  # the first calls ask for shapes
        error = refused(to_megatron, tmp_path / "megatron", model)
        assert "could not be written" in str(error)
        assert "no space left on device" in str(error)
        assert error.exit_code == 1
        assert left_in(tmp_path / "megatron") == []
    assert (to_hf(tmp_path / "hf", step) / "model.safetensors").exists()
    assert (to_megatron(tmp_path / "megatron", model) / "training_info.json").exists()


def fail_at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    original, count = getattr(owner, name), [0]

    def wrapped(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    patch.setattr(owner, name, wrapped)


def test_logits_are_compared_where_both_sides_fit(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logit_check, "_available", lambda: 1 << 20)
    for wanted, compared in (("auto", False), ("never", False), ("always", True)):
        step = to_megatron(tmp_path / wanted, model, compare_logits=wanted)
        found = json.loads((step / "training_info.json").read_text())["conversion"]["max_logit_difference"]
        assert (found is not None) == compared, wanted
    assert [line for line in caplog.messages if "not compared" in line] == [
        "logits are not compared: the model in float32 would not fit into memory (compare_logits=auto)"
    ]


@pytest.mark.slow
def test_a_process_ends_with_one_message_and_its_code(model, tmp_path):
    code, said = run("hf_to_megatron", 1, tmp_path, hf_path=str(model), probe_text="a")
    assert code == 2
    assert said.strip().splitlines()[-2:] == [
        "error: probe_text: is one token",
        "       take a text of a few words",
    ]
    assert left_in(tmp_path / "out") == [".lock", "exit_code", "train.log"]


@pytest.mark.slow
def test_processes_that_are_stopped_leave_nothing_and_ask_to_be_resumed(model, tmp_path):
    """One of two tensor-parallel ranks gets SIGTERM when everything is written and nothing published."""
    options = {"tensor_model_parallel_size": 2, "cluster__procs_per_node": 2}
    stop = "convert._compare = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)"
    code, said = run("hf_to_megatron", 2, tmp_path, patch=stop, hf_path=str(model), **options)
    assert code == 85, said
    assert not list(tmp_path.rglob("*.distcp"))
    assert not (tmp_path / "out" / "artifacts.json").exists()


PATCHED = """
import os, signal, sys, time
from pathlib import Path
from nemotron_launch.trainer import convert
{patch}
sys.exit(convert.{step}(Path({folder!r})))
"""


def run(step: str, procs: int, folder: Path, *, patch: str = "", **options: Any) -> tuple[int, str]:
    """The step's processes, as `spawn` starts them; patch: Python that runs before."""
    config = config_of(step, folder / "out", **options)
    (folder / "config.yaml").write_text(json.dumps(config))
    script = folder / "run.py"
    script.write_text(PATCHED.format(patch=patch, step=step, folder=str(STEPS / step)))
    command = [sys.executable, "-m", "nemotron_launch.trainer.spawn", "--procs", str(procs)]
    command += ["--output-dir", config["output_dir"], "--", str(script), "--config", str(folder / "config.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(STEPS.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_sizes_that_do_not_divide_the_model_are_told(model):
    a = hf.read_config(model)
    for tensor, pipeline, said in ((4, 1, "4 does not divide the model's 2 key/value heads"), (1, 3, "2 layers")):
        layout = SimpleNamespace(tensor=tensor, pipeline=pipeline)
        assert said in str(refused(convert._check_layout, a, layout))
