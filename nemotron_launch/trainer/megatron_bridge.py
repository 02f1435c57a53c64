"""Conversion by Megatron-Bridge, of architectures that are not converted here: Nemotron-H hybrids and all of its list.

NVIDIA's NeMo containers have it; it needs Transformer Engine and so a GPU. **Nothing here is run by this project's
tests**: it is written after Megatron-Bridge's documentation (AutoBridge.import_ckpt, AutoBridge.export_ckpt).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import exit_codes

log = logging.getLogger(__name__)


def require(what: str, where: str) -> Any:
    """AutoBridge; UserError that says what is needed where it is not there, or not to be used like this."""
    try:
        found = importlib.util.find_spec("megatron.bridge") is not None
    except ImportError:
        found = False
    if not found:
        raise UserError(
            f"{what} is not an architecture that is converted here, and Megatron-Bridge is not installed",
            where=where,
            hint="converted here: llama, qwen2, qwen3 (dense)\n"
            "others: run the step in a container that has Megatron-Bridge (nvcr.io/nvidia/nemo-rl), by a profile of it",
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{what} is converted by Megatron-Bridge, in one process",
            where="cluster.procs_per_node",
            hint="set cluster.num_nodes=1 and cluster.procs_per_node=1",
        )
    from megatron.bridge import AutoBridge

    log.info("%s is converted by Megatron-Bridge; logits are not compared", what)
    return AutoBridge


def to_megatron(bridge: Any, source: Path, target: Path, *, dtype: Any, trust_remote_code: bool) -> None:
    """A Hugging Face folder as a checkpoint in Megatron-Bridge's own format; target must not exist."""
    options = {"torch_dtype": dtype} if dtype is not None else {}
    _published(target, lambda path: bridge.import_ckpt(
        hf_model_id=str(source), megatron_path=str(path), trust_remote_code=trust_remote_code, **options
    ))  # fmt: skip


def to_hf(bridge: Any, checkpoint: Path, like: Path, target: Path, *, trust_remote_code: bool) -> None:
    """A checkpoint in Megatron-Bridge's format as a Hugging Face folder; like: a model of its architecture."""
    model = bridge.from_hf_pretrained(str(like), trust_remote_code=trust_remote_code)
    _published(target, lambda path: model.export_ckpt(
        megatron_path=str(checkpoint), hf_path=str(path), show_progress=False
    ))  # fmt: skip


def _published(target: Path, write: Callable[[Path], None]) -> None:
    """Let `target` appear when it is whole."""
    if target.exists():
        raise UserError("is there already", where=str(target), hint="name another folder, or remove it")
    temporary = target.with_name(f"tmp_{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        temporary.rename(target)
    except Exception as error:  # Megatron-Bridge has its own kinds; what it says is all that is known
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"Megatron-Bridge: {str(error).strip() or type(error).__name__}",
            where=str(target),
            exit_code=exit_codes.FAILED,
        ) from error
