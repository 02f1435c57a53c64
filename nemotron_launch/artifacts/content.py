"""What tells the content of a file, a model or a checkpoint from another, without reading all of it."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

from nemotron_launch.trainer.checkpoints import INFO, newest_complete

_WHOLE = 64 << 20  # bytes of a file that is hashed whole
# What tells one content of an artifact from another, in its folder or its newest step_N.
_TELLING = (INFO, "model.safetensors.index.json", "config.json", "manifest.json")
_WEIGHTS = ("*.safetensors", "policy/weights/*/*.distcp")
_SAMPLED = 4  # files of weights whose ends are read
_END = 1 << 18  # bytes of an end


def content_of(path: Path) -> str:
    """What tells the content of a file, a model or a checkpoint from another; empty where nothing does."""
    if path.is_file():
        return file_hash(path)
    telling = next((path / name for name in _TELLING if (path / name).is_file()), None)
    if telling is None:
        newest = newest_complete(path)
        return content_of(newest) if newest else ""
    weights = [file for pattern in _WEIGHTS for file in path.glob(pattern) if file.is_file()]
    if not weights:
        return file_hash(telling)
    digest = sha256(file_hash(telling).encode())
    for n, file in enumerate(sorted(weights)):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        if n < _SAMPLED:
            digest.update(file_hash(file, largest=0).encode())
    return digest.hexdigest()


def file_hash(path: Path, *, largest: int = _WHOLE) -> str:
    """sha256 of a file; of one with more than `largest` bytes, of its size and its ends."""
    digest = sha256()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size > max(largest, 2 * _END):
            digest.update(f"{size} bytes".encode() + file.read(_END))
            file.seek(size - _END)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
