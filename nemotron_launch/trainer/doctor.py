"""What this Python can train with: versions, abilities, devices, and what to do about what is missing.

    python -m nemotron_launch.trainer.doctor [--json] [--require train|cpu|gpu]

Exit code 1 when the requirement (by default: to train at all) does not hold.
The trainer runs the same check first. Imports torch only inside functions.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nemotron_launch import __version__
from nemotron_launch.errors import UserError
from nemotron_launch.trainer.exit_codes import FAILED, FINISHED
from nemotron_launch.trainer.spawn import usable_cores

Requirement = Literal["train", "cpu", "gpu"]
EXTRA = "pip install 'nemotron-launch[train]'"
LEAST = {"torch": (2, 6), "megatron-core": (0, 16)}
SMALL_SHM = 512 * 2**20  # bytes; Docker gives 64 MiB by default


@dataclass(frozen=True)
class Finding:
    """One line of the report. needed_for: "train" is both; empty if nothing depends on it. advice: what to do."""

    name: str
    value: str
    ok: bool
    needed_for: tuple[Requirement, ...] = ()
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """Everything found, in the order in which it is printed."""

    findings: tuple[Finding, ...]

    def missing(self, requirement: Requirement) -> tuple[Finding, ...]:
        """What stands in the way; empty when the requirement holds."""
        return tuple(f for f in self.findings if not f.ok and ("train" in f.needed_for or requirement in f.needed_for))

    def require(self, requirement: Requirement) -> None:
        """UserError naming all that is missing and what to do."""
        if missing := self.missing(requirement):
            what = {"train": "train", "cpu": "train on CPU", "gpu": "train on GPU"}[requirement]
            lines = [f"{finding.name}: {finding.value}; {finding.advice}" for finding in missing]
            raise UserError(f"this Python cannot {what}", where=sys.executable, hint="\n".join(lines), exit_code=FAILED)

    def text(self) -> str:
        """A plain table, advice below what it is about, and what can be done in the end."""
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            mark = "ok" if finding.ok else "!!" if finding.needed_for else "--"
            lines.append(f"{mark}  {finding.name:<{width}}  {finding.value}")
            if finding.advice and not finding.ok:
                lines.append(f"    {'':<{width}}  {finding.advice}")
        lines.append("")
        for requirement in ("cpu", "gpu"):
            missing = ", ".join(finding.name for finding in self.missing(requirement))
            lines.append(f"train on {requirement.upper()}: {'no, see ' + missing if missing else 'yes'}")
        return "\n".join(lines)

    def json(self) -> str:
        """{"findings": […], "can": {"train": bool, "cpu": bool, "gpu": bool}}"""
        requirements: tuple[Requirement, ...] = ("train", "cpu", "gpu")
        can = {requirement: not self.missing(requirement) for requirement in requirements}
        return json.dumps({"findings": [asdict(finding) for finding in self.findings], "can": can}, indent=2)


def check(*, devices: bool = True) -> Report:
    """Look at this Python and this machine.

    devices: also describe each GPU. That opens a CUDA context on the first, so the many processes of a run leave it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Report((*_python(), *_torch(devices), *_packages(), *_machine()))


def require(requirement: Requirement = "train") -> None:
    """What the trainer does first: UserError (exit code 1) naming all that is missing and what to do."""
    check(devices=False).require(requirement)


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Finding("Python", f"{version}  {sys.executable}", fits, ("train",), "use Python 3.11, 3.12 or 3.13")
    yield Finding("nemotron-launch", __version__, True)


def _torch(devices: bool) -> Iterator[Finding]:
    try:
        import torch
        import torch.distributed as distributed
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        absent = importlib.util.find_spec("torch") is None
        advice = f"{EXTRA} (CPU only: add --extra-index-url https://download.pytorch.org/whl/cpu)"
        yield Finding("torch", "not installed" if absent else f"does not import: {error}", False, ("train",), advice)
        return
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    advice = f"torch 2.6 or newer is needed: {EXTRA}"
    yield Finding("torch", f"{torch.__version__}  {build}", _recent("torch", torch.__version__), ("train",), advice)
    gloo = distributed.is_available() and distributed.is_gloo_available()
    yield Finding("gloo", "yes" if gloo else "no", gloo, ("cpu",), "take a torch that is built with gloo")
    yield from _cuda(torch, devices)


def _cuda(torch: Any, devices: bool) -> Iterator[Finding]:
    if not torch.version.cuda:
        advice = "for GPUs: a CUDA build of torch, from https://pytorch.org, or a container that has one"
        yield Finding("CUDA", "no: torch is a CPU build", False, ("gpu",), advice)
        return
    if not torch.cuda.is_available():
        advice = (
            "nvidia-smi must list a GPU here; in a container, give it one (docker --gpus all, srun --gpus-per-node)"
        )
        yield Finding("CUDA", f"no: {_why_no_cuda(torch)}", False, ("gpu",), advice)
        return
    count = torch.cuda.device_count()
    yield Finding("CUDA", f"{torch.version.cuda}, {count} device{'s' if count > 1 else ''}", True, ("gpu",))
    nccl = torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "no"
    yield Finding("NCCL", version, nccl, ("gpu",), "take a torch that is built with NCCL")
    for index in range(count if devices else 0):
        device = torch.cuda.get_device_properties(index)
        bf16 = device.major >= 8
        value = (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        )
        yield Finding(f"GPU {index}", value, bf16, (), "no bfloat16 before 8.0: set policy.precision=float32")


def _why_no_cuda(torch: Any) -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "torch sees no device"


def _packages() -> Iterator[Finding]:
    version = _megatron_version()
    advice = f"megatron-core 0.16 or newer is needed: {EXTRA}"
    recent = version is not None and _recent("megatron-core", version)
    yield Finding("megatron-core", version or "not installed", recent, ("train",), advice)
    for name, why in (
        ("psutil", "without it a checkpoint save of megatron-core hangs for ever"),
        ("numpy", "megatron-core needs it"),
        ("transformers", "it reads Hugging Face models and chat templates"),
        ("tokenizers", "it tokenizes"),
        ("safetensors", "it reads Hugging Face weights"),
        ("datasets", "it reads parquet, arrow and hub data"),
    ):
        installed = importlib.util.find_spec(name) is not None
        yield Finding(name, _version(name) if installed else "not installed", installed, ("train",), f"{why}: {EXTRA}")
    yield _optional("Transformer Engine", "transformer_engine.pytorch", "transformer-engine")
    yield _optional("Apex", "apex.optimizers", "apex")  # PyPI's apex is another package


def _optional(title: str, module: str, package: str) -> Finding:
    why = "only with Transformer Engine or Apex is megatron's distributed optimizer safe, so it stays off"
    try:
        importlib.import_module(module)
    except Exception as error:  # built for another torch or CUDA: anything can come out
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?"):
            return Finding(title, "not installed (optional)", False, (), why)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Finding(title, f"does not import: {reason}", False, (), f"build it for this torch; {why}")
    return Finding(title, _version(package), True)


def _machine() -> Iterator[Finding]:
    yield Finding("CPU cores", str(usable_cores()), True)
    with contextlib.suppress(OSError, ValueError):
        yield Finding("memory", f"{_memory() / 2**30:.1f} GiB", True)
    with contextlib.suppress(OSError):
        shm = os.statvfs("/dev/shm")
        size = shm.f_blocks * shm.f_frsize
        advice = "NCCL and data workers may run out of it: docker --shm-size=8g"
        yield Finding("shared memory", f"{size / 2**30:.1f} GiB", size >= SMALL_SHM, (), advice)


def _memory() -> int:
    """Bytes that this machine has, or that the control group (version 2) grants."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    granted = limit.read_text().strip() if limit.exists() else "max"
    return total if granted == "max" else min(total, int(granted))


def _megatron_version() -> str | None:
    """None when it is not there. A checkout on PYTHONPATH has no metadata, only its package_info.py."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ImportError:
        return None
    if spec is None:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("megatron-core")
    info = Path(spec.origin or "").parent / "package_info.py"
    numbers = re.findall(r"^(?:MAJOR|MINOR|PATCH) *= *(\d+)", info.read_text() if info.exists() else "", re.MULTILINE)
    return ".".join(numbers) or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _recent(package: str, version: str) -> bool:
    """Whether a version is new enough; one that cannot be read is taken to be."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is None or (int(match[1]), int(match[2])) >= LEAST[package]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemotron_launch.trainer.doctor", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--require", choices=["train", "cpu", "gpu"], default="train", help="exit with 1 unless this is possible here"
    )
    given = parser.parse_args(argv)
    report = check()
    print(report.json() if given.json else report.text())
    return FAILED if report.missing(given.require) else FINISHED


if __name__ == "__main__":
    sys.exit(main())
