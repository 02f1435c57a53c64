"""`data.manifest_path`: the manifest of data_prep/rl_prep, or one in NeMo-RL's shape, in place of data paths.

For the trainer, and for the launcher's checks: imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.paths import resolve_path

KEY = "data.manifest_path"

#: Which rows each step can train on, by the `target` that they were prepared for.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "sft/megatron": ("sft",),
    "rm/hf": ("dpo",),
    "rl/nemo_rl/dpo": ("dpo",),
    "rl/nemo_rl/rlvr": ("rlvr", "gym"),
    "rl/nemo_rl/rlhf": ("rlhf", "rlvr", "gym"),
}

_SPLITS = {"train": ("train",), "validation": ("validation", "val")}
_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One file of rows. size (bytes) and sha256 are None where the manifest does not say."""

    path: Path
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class DataManifest:
    """Which files hold the training and the validation rows, in order. target: what they were prepared for, if told."""

    path: Path
    target: str | None
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]


def read_manifest(path: Path, *, where: str = KEY) -> DataManifest:
    """Read {"train": …, "validation" (or "val"): …}, each a path, a list of paths, or of {path, bytes, sha256}.

    Paths are relative to the manifest. Raises UserError where it is missing, or is no such manifest.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        hint = "data_prep/rl_prep writes it last, when all rows are ready"
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}", where=where, hint=hint) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})", where=where) from None
    if not isinstance(data, dict) or "train" not in data:
        raise UserError(
            f"{path} is no manifest of training rows: it has no train",
            where=where,
            hint='data_prep/rl_prep writes one; by hand: {"train": "train.jsonl", "validation": "validation.jsonl"}',
        )
    shards = {}
    for split, names in _SPLITS.items():
        entries: Any = next((data[name] for name in names if data.get(name)), [])
        listed = entries if isinstance(entries, list) else [entries]
        shards[split] = tuple(_shard(entry, path, split, where) for entry in listed)
    target = data.get("target")
    return DataManifest(path, target if isinstance(target, str) else None, shards["train"], shards["validation"])


def _shard(entry: Any, manifest: Path, split: str, where: str) -> Shard:
    named = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(named, dict) or not isinstance(named.get("path"), str) or not named["path"]:
        raise UserError(f"{manifest}: {split} holds {json.dumps(entry)[:60]}, which names no file", where=where)
    size, digest = named.get("bytes"), named.get("sha256")
    return Shard(
        manifest.parent / named["path"],
        size if isinstance(size, int) else None,
        digest if isinstance(digest, str) else None,
    )


def check_target(manifest: DataManifest, step_id: str, *, where: str = KEY) -> None:
    """Raise UserError where the rows were prepared for another kind of step."""
    check_rows_for(manifest.target, step_id, what=f"{manifest.path} holds rows", where=where)


def check_rows_for(target: str | None, step_id: str, *, what: str, where: str | None) -> None:
    """As check_target, for rows that are only called `what`."""
    known = TARGETS.get(step_id)
    if known and target and target not in known:
        raise UserError(
            f"{what} for {target}; {step_id} trains on {' or '.join(known)}",
            where=where,
            hint=f"prepare them anew:  nemotron steps run data_prep/rl_prep target={known[0]}",
        )


def shards_of(manifest: DataManifest, split: str, *, allow_train: bool = False, where: str = KEY) -> list[Shard]:
    """The shards of `train` or `validation`, in order.

    allow_train: where there are no validation rows, the training rows stand in for them. Raises UserError where a split
    has no rows, or both are the same file and that is not allowed.
    """
    shards = list(getattr(manifest, split))
    if split == "validation" and not shards and allow_train:
        return list(manifest.train)
    if not shards:
        raise UserError(
            f"{manifest.path} has no {split} rows",
            where=where,
            hint="set validation_size for data_prep/rl_prep, or data.validation=null"
            if split == "validation"
            else None,
        )
    common = {shard.path for shard in manifest.train} & {shard.path for shard in shards}
    if split == "validation" and common and not allow_train:
        raise UserError(
            f"{manifest.path} names {min(common).name} for training and for validation: validation would show how "
            "well it is remembered",
            where=where,
            hint="name held-out rows, or set data.validation=null",
        )
    return shards


def verify(manifest: DataManifest, *, where: str = KEY) -> None:
    """Raise UserError at the first shard that is missing, or whose size or content is not what the manifest says."""
    for shard in dict.fromkeys((*manifest.train, *manifest.validation)):
        try:
            size = shard.path.stat().st_size
            told = size if shard.size is None else shard.size
            if size != told:
                problem = f"has {size} bytes, and {told} when {manifest.path} was written"
            elif shard.sha256 is not None and _sha256(shard.path) != shard.sha256:
                problem = f"has other rows than when {manifest.path} was written"
            else:
                continue
        except OSError as error:
            raise UserError(
                f"{shard.path}: {(error.strerror or str(error)).lower()}",
                where=where,
                hint=f"{manifest.path} names it; shards and manifest belong together, move them together",
            ) from None
        raise UserError(
            f"{shard.path} {problem}",
            where=where,
            hint="prepare the rows again, or name the files themselves in data.train.data_path",
        )


def check_data(data: Mapping[str, Any], step_id: str, step_dir: Path | None) -> None:
    """Read the manifest of a config's data section, if it names one, and raise UserError where it cannot be used."""
    if not data.get("manifest_path"):
        return
    manifest = read_manifest(resolve_path(data["manifest_path"], step_dir, KEY))
    check_target(manifest, step_id)
    verify(manifest)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
