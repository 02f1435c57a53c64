"""How much memory a process has needed so far, for the metrics of a step."""

from __future__ import annotations

import resource
import sys

import torch

_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss's unit


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most that this process has held so far, in GiB: as a process, and of its GPU where it has one."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    line = {"memory/process_peak_gib": resident / 2**30}
    if device.type == "cuda":
        line["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return line
