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
from nemotron_launch.trainer.checkpoints import resolve_checkpoint, weights_dir
from nemotron_launch.trainer.megatron import checkpoint
from nemotron_launch.trainer.paths import hub_is_offline, is_hub_id, resolve_path
from nemotron_launch.trainer.policy import Policy

SAMPLE = 1 << 20


@dataclass(frozen=True)
class WarmStart:
    """The weights before the first step.

    kind: "megatron" (folder of torch_dist weights), "hf" (a Hugging Face folder) or "random" (drawn from the seed).
    """

    kind: str
    path: Path | None
    fingerprint: str

    def recorded(self) -> dict[str, str | None]:
        """What a checkpoint keeps of it."""
        return {"kind": self.kind, "path": str(self.path) if self.path else None, "fingerprint": self.fingerprint}


def model_folder(name: str, *, step_dir: Path | None) -> Path:
    """The local folder of a Hugging Face model: given as one, or fetched from the hub into its cache.

    Raises UserError where it is neither, or where the hub cannot be reached and the cache lacks it.
    """
    path = resolve_path(name, step_dir, "policy.model_name")
    if path.is_dir():
        return path
    if not is_hub_id(name):
        raise UserError(f"there is no folder {name}", where="policy.model_name")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=hub_is_offline()))
    except Exception as error:  # the hub's client raises a dozen kinds; its first line says which
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is neither a folder nor to be had from the hub: {first_line}",
            where="policy.model_name",
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


def find(config: Mapping[str, Any], architecture: Architecture, *, step_dir: Path | None) -> WarmStart:
    """What the config says the run starts from.

    Raises UserError where a checkpoint is missing, is not one, or has another shape (naming the fields).
    """
    pretrained = config["checkpointing"]["pretrained_checkpoint"]
    key = "checkpointing.pretrained_checkpoint.path"
    if pretrained and pretrained["path"]:
        folder = resolve_checkpoint(resolve_path(pretrained["path"], step_dir, key), where=key)
        weights = weights_dir(folder)
        stored = read_architecture(weights.parent.parent)
        if stored is not None and (fields := differences(stored, architecture)):
            raise UserError(
                "the checkpoint has another shape than the policy:",
                where=key,
                hint="\n".join([*fields, f"checkpoint: {folder}", "change policy.model_name or policy.architecture"]),
            )
        return WarmStart("megatron", weights, fingerprint_folder(weights))
    name = config["policy"]["model_name"]
    if name:
        folder = model_folder(name, step_dir=step_dir)
        return WarmStart("hf", folder, fingerprint_folder(folder, suffix=".safetensors"))
    return WarmStart("random", None, "random")


def load(policy: Policy, start: WarmStart) -> None:
    """Put the first weights into a policy; random ones are there already."""
    if start.kind == "megatron":
        assert start.path is not None
        checkpoint.load_weights(start.path, policy.gpt)
    elif start.kind == "hf":
        assert start.path is not None
        layout = policy.layout
        read = hf.open_weights(start.path)
        hf.load_weights(policy.gpt, policy.architecture, read, size=layout.tensor, rank=layout.tensor_rank)


def check_unchanged(start: WarmStart, recorded: Mapping[str, Any], checkpoint_folder: Path) -> None:
    """Refuse to resume against another reference than the run began with."""
    if recorded["fingerprint"] != start.fingerprint:
        raise UserError(
            f"the weights there are not those from which {checkpoint_folder} was trained",
            where=str(start.path or "policy.architecture"),
            hint=f"the run began from {recorded['path'] or 'random weights'}; restore it, or start in another output_dir",
        )


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
