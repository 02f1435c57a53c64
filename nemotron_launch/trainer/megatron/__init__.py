"""All that touches megatron-core, so that a newer version in a container needs changes in one folder only."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch


def _as_it_is(function: Callable[..., Any] | None = None, **options: object) -> Any:
    """What stands for torch.compile: as decorator, with options or without."""
    return function if function is not None else _as_it_is


def _import_megatron_core() -> None:
    """Import megatron-core; without CUDA such that nothing in it asks for torch's compiler.

    Its fused functions do so where they are defined. None of them is ours (model.py turns them off), and importing the
    compiler takes as long as importing torch.
    """
    gc.freeze()  # libraries stay: no collection needs to look through them, neither now nor in the end
    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import megatron.core  # noqa: F401
    finally:
        torch.compile = compiler
    gc.freeze()


_import_megatron_core()
