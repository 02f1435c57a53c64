"""doctor: says what is there, what is missing and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.doctor import Finding, Report, _megatron_version, check, main

pytest.importorskip("megatron.core")
import torch


def finding(report: Report, name: str) -> Finding:
    return next(finding for finding in report.findings if finding.name == name)


def hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # Python then finds no such module


def test_what_the_tests_run_with_can_train_on_cpu():
    report = check()
    report.require("train")
    report.require("cpu")
    assert finding(report, "torch").value.startswith(torch.__version__)
    assert finding(report, "megatron-core").ok
    assert int(finding(report, "CPU cores").value) >= 1


def test_the_missing_is_named_with_what_to_do(monkeypatch):
    hide(monkeypatch, "psutil")
    with pytest.raises(UserError) as error:
        check().require("cpu")
    assert "this Python cannot train on CPU" in str(error.value)
    assert "psutil: not installed; without it a checkpoint save of megatron-core hangs for ever: pip" in str(
        error.value
    )
    assert error.value.exit_code == 1


def test_all_that_is_missing_is_said_at_once(monkeypatch):
    for module in ("torch", "psutil", "transformers"):
        hide(monkeypatch, module)
    assert [missing.name for missing in check().missing("train")] == ["torch", "psutil", "transformers"]


def test_what_is_optional_stands_in_nobody_s_way(monkeypatch):
    hide(monkeypatch, "transformer_engine")
    hide(monkeypatch, "apex")
    report = check()
    assert not finding(report, "Apex").ok
    assert report.missing("cpu") == ()


def test_a_package_that_is_there_but_broken_says_why(monkeypatch, tmp_path):
    folder = tmp_path / "transformer_engine"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "pytorch.py").write_text("raise OSError('libcudnn.so.9: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    value = finding(check(), "Transformer Engine").value
    assert value == "does not import: libcudnn.so.9: cannot open shared object file"


def test_a_checkout_of_megatron_without_metadata_has_its_version(monkeypatch, tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 20\nPATCH = 1\nPRE_RELEASE = 'rc0'\n")
    script = """
        import importlib.metadata, sys
        def none(name): raise importlib.metadata.PackageNotFoundError(name)
        importlib.metadata.version = none
        from nemotron_launch.trainer.doctor import _megatron_version
        print(_megatron_version())
    """.replace("\n        ", "\n")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0.20.1\n"
    assert _megatron_version() != "0.20.1"


def test_the_exit_code_says_whether_training_is_possible(monkeypatch):
    assert main([]) == 0
    hide(monkeypatch, "psutil")
    assert main([]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_requirement_fails_and_says_why(capsys):
    assert main(["--require", "gpu"]) == 1
    shown = capsys.readouterr().out
    assert "train on CPU: yes" in shown
    assert "train on GPU: no, see CUDA" in shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_listed_with_its_memory():
    report = check()
    report.require("gpu")
    assert "GiB, compute capability" in finding(report, "GPU 0").value


def test_programs_get_json(tmp_path):
    command = [sys.executable, "-m", "nemotron_launch.trainer.doctor", "--json", "--require", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    said = json.loads(done.stdout)
    assert said["can"]["train"] is said["can"]["cpu"] is True
    assert {"name", "value", "ok", "needed_for", "advice"} == set(said["findings"][0])
