"""What starting a trainer's process costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA megatron-core is left as it is")
def test_on_cpu_the_trainer_starts_without_torchs_compiler() -> None:
    # Preparing megatron-core's fused functions for it would double the second and a half that a process takes.
    code = """
import sys, torch
before = torch.compile
import nemotron_launch.trainer.sft, nemotron_launch.trainer.grpo
print("torch._inductor.compile_fx" in sys.modules, torch.compile is before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
