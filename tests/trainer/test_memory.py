"""The memory that a step's metrics report."""

from __future__ import annotations

import resource

import torch

from nemotron_launch.trainer.memory import peak_memory


def test_peak_of_the_process_is_in_gib_and_counts_what_was_freed() -> None:
    before = peak_memory(torch.device("cpu"))
    assert before.keys() == {"memory/process_peak_gib"}
    # 256 MiB more than is resident now; the peak may have been higher already.
    held = bytearray(256 << 20)
    held[::4096] = b"x" * len(held[::4096])
    del held
    after = peak_memory(torch.device("cpu"))["memory/process_peak_gib"]
    assert after >= max(before["memory/process_peak_gib"], 0.25)
    assert after * 2**20 <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, as Linux counts; it only grows
