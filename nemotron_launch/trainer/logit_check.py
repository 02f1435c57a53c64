"""Whether a Megatron checkpoint and a Hugging Face folder compute the same: their logits on one text.

Legend: S tokens of the text, V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import exit_codes, hf
from nemotron_launch.trainer.agreement import on_rank_0
from nemotron_launch.trainer.architecture import Architecture
from nemotron_launch.trainer.batch import Group, collate
from nemotron_launch.trainer.megatron import checkpoint
from nemotron_launch.trainer.megatron.model import Numerics
from nemotron_launch.trainer.megatron.parallel import Layout
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.tokenizer import Tokenizer

log = logging.getLogger(__name__)
LONGEST = 512  # tokens
SPARE = 2 << 30  # bytes that the libraries and activations want
PEAK = 1.7  # what loading a checkpoint takes in all, in sizes of the model (benchmarks/conversion.py: 1.6)


@dataclass(frozen=True)
class Sides:
    """What is compared. weights: a torch_dist folder, loaded at this layout. folder: for transformers, on rank 0's CPU.

    rounded: the type to which one of them was converted; the other's weights are rounded to it first.
    """

    weights: Path
    folder: Path
    architecture: Architecture
    layout: Layout
    rounded: torch.dtype | None


@dataclass(frozen=True)
class Agreement:
    """How far both sides are apart on `tokens` positions: the largest difference of a logit, and the largest logit."""

    difference: float
    largest: float
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return (
            f"logits of both sides on {self.tokens} tokens: largest difference {self.difference:.2g} "
            f"(largest logit {self.largest:.3g}, computed in {self.dtype})"
        )


def probe_ids(text: str, tokenizer: Tokenizer | None, a: Architecture) -> np.ndarray:
    """Token ids of the text, BOS first where the tokenizer has one; random ones without a tokenizer."""
    if tokenizer is None:
        ids = np.random.default_rng(0).integers(0, a.vocab_size, 64)
    else:
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = np.array([*first, *tokenizer.encode(text)])
        if len(ids) < 2:
            raise UserError("is one token", where="probe_text", hint="take a text of a few words")
    return ids[: min(LONGEST, a.max_position_embeddings)]


def fits(a: Architecture, layout: Layout, dtype: torch.dtype = torch.float32) -> bool:
    """Whether this machine has the memory for both sides, one after the other, in a dtype; rank 0 decides."""
    model = dtype.itemsize * sum(torch.Size(hf.hf_shape(name, a)).numel() for name in hf.hf_names(a))
    copies = 1.0
    if layout.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        copies = max(1.0, local / (layout.tensor * layout.pipeline))
    return on_rank_0(lambda: int(model * copies * PEAK) + SPARE < _available())


def agree(sides: Sides, ids: np.ndarray, *, limit: float) -> Agreement:
    """Compare both sides in float32, and, where that says more than the limit, in float64, if there is the memory.

    Both types hold stored weights without loss. In float32 a deep model's sums alone may differ by more than 1e-4; in
    float64 next to nothing is left of that. All ranks call it. UserError: further apart than allowed, or not numbers.
    """
    found = _compare(sides, ids, torch.float32)
    if not found.difference <= limit and fits(sides.architecture, sides.layout, torch.float64):
        log.info("%s, which may be rounding: computing it in float64", found)
        found = _compare(sides, ids, torch.float64)
    if found.difference <= limit:
        log.info("%s", found)
        return found

    def refuse() -> None:
        raise UserError(
            f"{found}, above {limit:.2g}; nothing was written",
            where="max_logit_difference",
            hint="a difference of the order of rounding may be allowed with a larger max_logit_difference",
            exit_code=exit_codes.FAILED,
        )

    on_rank_0(refuse)
    return found


def _compare(sides: Sides, ids: np.ndarray, dtype: torch.dtype) -> Agreement:
    """Both sides' logits behind every token but the last; each side is in memory by itself."""
    ours = _megatron_logits(sides, ids, dtype)
    _give_back()

    def theirs() -> Agreement:
        there = _transformers_logits(sides, ids, dtype)
        difference = (ours.cpu() - there).abs().max()
        return Agreement(float(difference), float(there.abs().max()), len(there), str(dtype).removeprefix("torch."))

    found = on_rank_0(theirs)
    _give_back()
    return found


def _megatron_logits(sides: Sides, ids: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[S-1, V]."""
    policy = Policy(sides.architecture, sides.layout, Numerics(dtype=dtype))
    checkpoint.load_weights(sides.weights, policy.gpt)
    _round(policy.gpt, sides.rounded)
    return policy.logits(collate([Group(0, (ids,))], pad_id=0, device=sides.layout.device))


@torch.no_grad()
def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def _transformers_logits(sides: Sides, ids: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[S-1, V], on CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as says

    says.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(sides.folder, dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError("transformers cannot load it", where=str(sides.folder), hint=first) from error
    _round(model, sides.rounded)
    logits: Tensor = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
    return logits


def _give_back() -> None:
    """Return the memory of what is gone to the system: glibc keeps that of tensors below 32 MiB."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _available() -> int:
    """Bytes of memory that this process may still take: the machine's, or its cgroup's where that is less."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)
