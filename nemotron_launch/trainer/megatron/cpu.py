"""Lets megatron-core, which names the device "cuda" literally in many places, run on CPU with gloo.

Each of its modules holds the name `torch`. On a machine without CUDA that name is bound to a view of torch whose
factories take "cuda" for "cpu", and the functions of torch.cuda that it calls unasked are answered. Nothing else sees
the view, so the cost per operation is one attribute look-up.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from nemotron_launch.trainer.megatron.linear import onednn_is_faster, parallel_linear

CPU = torch.device("cpu")
# What megatron-core calls with device=… . Other names pass through untouched.
FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "zeros_like",
    "empty_like",
    "ones_like",
)


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


class _TorchOnCpu(types.ModuleType):
    """torch with its factories placed on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        setattr(self, name, value)  # the next look-up is a plain dictionary hit
        return value


_view: _TorchOnCpu | None = None

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare() -> None:
    """Bind the view in every megatron-core module imported so far; call again after importing more. No-op with CUDA."""
    global _view
    if torch.cuda.is_available():
        return
    if _view is None:
        _view = _TorchOnCpu()
        _answer_for_cuda()
        _keep_freed_memory()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _view  # type: ignore[attr-defined]
    rng = sys.modules.get("megatron.core.tensor_parallel.random")
    if rng is not None:
        rng._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)  # type: ignore[attr-defined]
        rng._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()  # type: ignore[attr-defined]
    layers = sys.modules.get("megatron.core.tensor_parallel.layers")
    if layers is not None and onednn_is_faster():
        layers.linear_with_frozen_weight = parallel_linear  # type: ignore[attr-defined]
        layers.linear_with_grad_accumulation_and_async_allreduce = parallel_linear  # type: ignore[attr-defined]
    for name in ("clip_grads", "optimizer"):
        clipper = sys.modules.get(f"megatron.core.optimizer.{name}")
        if clipper is not None:  # the original insists on gradients of type torch.cuda.FloatTensor
            clipper.clip_grad_by_total_norm_fp32 = _clip_gradients  # type: ignore[attr-defined]


def _answer_for_cuda() -> None:
    """Functions of torch.cuda that megatron-core calls unasked; without CUDA the real ones can only raise."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    stand_ins: dict[str, Callable[..., Any]] = {
        "current_device": lambda: CPU,
        "synchronize": lambda *a, **k: None,
        "set_device": lambda *a, **k: None,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, function in stand_ins.items():
        setattr(torch.cuda, name, function)


def _keep_freed_memory() -> None:
    """Let the C library reuse freed tensors: by default each large one is mapped, cleared and unmapped again.

    That costs a twentieth of a step. Other C libraries than glibc have no such function, and keep their ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 256 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _clip_gradients(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    factor = max_norm / (float(total_norm) + 1e-6)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if factor < 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
