"""Where a policy's first weights come from, and proof on resume that the same ones are still there.

Also the reference's weights: both start from here, never from a checkpoint of the run itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import hf
from nemotron_launch.trainer.architecture import (
    Architecture,
    differences,
    inline_architecture,
    read_architecture,
)
from nemotron_launch.trainer.checkpoints import read_info, resolve_checkpoint, weights_dir
from nemotron_launch.trainer.megatron import checkpoint
from nemotron_launch.trainer.paths import hub_is_offline, is_hub_id, resolve_path
from nemotron_launch.trainer.policy import Policy

SAMPLE = 1 << 20
PRETRAINED = "checkpointing.pretrained_checkpoint.path"


@dataclass(frozen=True)
class WarmStart:
    """The weights before the first step.

    kind: "megatron" (folder of torch_dist weights), "hf" (a Hugging Face folder) or "random" (drawn from the seed).
    named: what the config calls it. path: where that was found.
    """

    kind: str
    named: str | None
    path: Path | None
    fingerprint: str

    def recorded(self) -> dict[str, str | None]:
        """What a checkpoint keeps of it."""
        path = str(self.path) if self.path else None
        return {"kind": self.kind, "named": self.named, "path": path, "fingerprint": self.fingerprint}


def model_folder(name: str, *, step_dir: Path | None, where: str = "policy.model_name") -> Path:
    """The local folder of a Hugging Face model: given as one, or fetched from the hub into its cache.

    Raises UserError where it is neither, or where the hub cannot be reached and the cache lacks it.
    """
    path = resolve_path(name, step_dir, where)
    if path.is_dir():
        return path
    if not is_hub_id(name):
        raise UserError(f"there is no folder {name}", where=where)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=hub_is_offline()))
    except Exception as error:  # the hub's client raises a dozen kinds; its first line says which
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is neither a folder nor to be had from the hub: {first_line}",
            where=where,
            hint="give a local folder, set HF_TOKEN for a gated model, or fetch it on a machine with a network first",
        ) from error


def resolve_architecture(policy: Mapping[str, Any], *, vocab_size: int, step_dir: Path | None) -> Architecture:
    """The architecture that the config's `policy` section asks for. vocab_size: the tokenizer's."""
    if policy["model_name"]:
        architecture = hf.read_config(model_folder(policy["model_name"], step_dir=step_dir))
        if vocab_size > architecture.vocab_size:
            raise UserError(
                f"the tokenizer has {vocab_size} ids, the model's embedding {architecture.vocab_size} rows",
                where="policy.tokenizer.name",
                hint="take the tokenizer that belongs to policy.model_name",
            )
        return architecture
    return inline_architecture(policy["architecture"], tokenizer_vocab_size=vocab_size)


def find(
    config: Mapping[str, Any],
    architecture: Architecture,
    *,
    tokenizer: str,
    drawn: str,
    step_dir: Path | None,
    recorded: Mapping[str, Any] | None = None,
) -> WarmStart:
    """What the run starts from: as `recorded` says where it goes on, else as the config says.

    tokenizer: the run's, by its fingerprint. drawn: what random weights depend on. recorded: what the checkpoint that
    the run resumes from keeps of its start; it may have moved to where the config points now, but not changed.
    Raises UserError where a checkpoint is missing, is not one, has another shape or tokenizer, or is another one now.
    """
    if recorded and recorded["named"] == _named(config) and (kept := _kept(recorded)):
        return kept  # also where a folder of checkpoints has a newer one by now
    start = _configured(config, architecture, tokenizer=tokenizer, drawn=drawn, step_dir=step_dir)
    if recorded and recorded["fingerprint"] != start.fingerprint:
        raise UserError(
            "these are not the weights from which this run began",
            where=str(start.path or "policy.architecture"),
            hint=f"it began from {recorded['path'] or recorded['fingerprint']}, "
            f"{'which is not there or has changed' if recorded['path'] else 'not from a checkpoint'}\n"
            "restore them, or point checkpointing.pretrained_checkpoint.path (or policy.model_name) to where they are\n"
            "to begin from these instead, give another output_dir",
        )
    return start


def _kept(recorded: Mapping[str, Any]) -> WarmStart | None:
    """The recorded start, if it still lies where it lay."""
    if recorded["path"] is None:
        return None
    path = Path(recorded["path"])
    try:
        unchanged = _fingerprint_of(recorded["kind"], path) == recorded["fingerprint"]
    except OSError:
        return None
    return WarmStart(recorded["kind"], recorded["named"], path, recorded["fingerprint"]) if unchanged else None


def _named(config: Mapping[str, Any]) -> str | None:
    pretrained = config["checkpointing"]["pretrained_checkpoint"] or {}
    named: str | None = pretrained.get("path") or config["policy"]["model_name"]
    return named


def _configured(
    config: Mapping[str, Any], architecture: Architecture, *, tokenizer: str, drawn: str, step_dir: Path | None
) -> WarmStart:
    named = _named(config)
    if named is None:
        return WarmStart("random", None, None, f"random weights ({drawn})")
    if (config["checkpointing"]["pretrained_checkpoint"] or {}).get("path"):
        folder = resolve_checkpoint(resolve_path(named, step_dir, PRETRAINED), where=PRETRAINED)
        weights = weights_dir(folder)
        _check_shape(folder, read_architecture(weights.parent.parent), architecture)
        _check_tokenizer(folder, weights, tokenizer)
        return WarmStart("megatron", named, weights.absolute(), _fingerprint_of("megatron", weights))
    folder = model_folder(named, step_dir=step_dir)
    return WarmStart("hf", named, folder.absolute(), _fingerprint_of("hf", folder))


def _check_shape(folder: Path, stored: Architecture | None, wanted: Architecture) -> None:
    if stored is not None and (fields := differences(stored, wanted)):
        raise UserError(
            "the checkpoint has another shape than the policy:",
            where=PRETRAINED,
            hint="\n".join([*fields, f"checkpoint: {folder}", "change policy.model_name or policy.architecture"]),
        )


def _check_tokenizer(folder: Path, weights: Path, wanted: str) -> None:
    """A checkpoint that says which tokenizer it was trained with must be used with that one."""
    if folder == weights:
        return
    stored = (read_info(folder) or {}).get("tokenizer")
    if stored is not None and stored != wanted:
        raise UserError(
            "the checkpoint was trained with another tokenizer or chat template",
            where=PRETRAINED,
            hint=f"checkpoint: {folder}, tokenizer {stored[:12]}; this run's {wanted[:12]}\n"
            f"use its own: policy.tokenizer.name={folder / 'policy' / 'tokenizer'} "
            "policy.tokenizer.chat_template=default\n"
            f"or, to train its weights with another on purpose, name them alone: {PRETRAINED}={weights}",
        )


def load(policy: Policy, start: WarmStart) -> None:
    """Put the first weights into a policy; random ones are there already."""
    if start.kind == "megatron":
        assert start.path is not None
        checkpoint.load_weights(start.path, policy.gpt)
    elif start.kind == "hf":
        assert start.path is not None
        layout = policy.layout
        read = hf.open_weights(start.path, policy.architecture)
        hf.load_weights(policy.gpt, policy.architecture, read, size=layout.tensor, rank=layout.tensor_rank)


def _fingerprint_of(kind: str, path: Path) -> str:
    return fingerprint_folder(path, suffix=".safetensors" if kind == "hf" else "")


def fingerprint_folder(folder: Path, *, suffix: str = "") -> str:
    """sha256 over names, sizes and contents of a folder's files, of large ones the first, middle and last MiB."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not path.name.endswith(suffix):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            starts = [0] if size <= 3 * SAMPLE else [0, size // 2, size - SAMPLE]
            for start in starts:
                file.seek(start)
                digest.update(file.read(3 * SAMPLE if len(starts) == 1 else SAMPLE))
    return digest.hexdigest()
