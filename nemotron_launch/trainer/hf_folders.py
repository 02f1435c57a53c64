"""Hugging Face folders written: tensors as they come, config and tokenizer beside them, there when they are whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nemotron_launch.trainer.architecture import Architecture, hf_config
from nemotron_launch.trainer.checkpoints import fsync, fsync_tree
from nemotron_launch.trainer.hf import INDEX, STORED_DTYPES, WHOLE, hf_names, hf_shape

MAX_FILE_BYTES = 5 << 30
#: What belongs to a tokenizer and to generating with it, as published folders have them.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
_KINDS = {dtype: kind for kind, dtype in STORED_DTYPES.items()}


class FolderWriter:
    """A folder `tmp_NAME` that becomes `folder` when it is published; the tensors may come in any order.

    dtypes: of every tensor of the architecture, by its Hugging Face name. What goes wrong in `add` is kept for
    `finish`: other ranks may be about to send the rest.
    """

    def __init__(
        self, folder: Path, a: Architecture, dtypes: Mapping[str, torch.dtype], *, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        self.folder, self.architecture = folder, a
        self.temporary = folder.with_name(f"tmp_{folder.name}")
        self.files = _cut(a, dtypes, max_file_bytes)
        self.dtypes = dtypes
        self.missing = set(dtypes)
        self.failure: OSError | None = None
        self._open: dict[str, BinaryIO] = {}
        self._places: dict[str, tuple[str, int]] = {}
        shutil.rmtree(self.temporary, ignore_errors=True)  # of a writer that was killed
        self.temporary.mkdir(parents=True)

    def add(self, name: str, value: Tensor) -> None:
        """Write a tensor to its place, in its type of `dtypes`."""
        assert value.shape == hf_shape(name, self.architecture), f"{name}: {tuple(value.shape)}"
        self.missing.remove(name)
        if self.failure is not None:
            return
        data = value.detach().to(device="cpu", dtype=self.dtypes[name]).contiguous()
        try:
            file, start = self._at(name)
            file.seek(start)
            file.write(data.view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            self.failure = error

    def finish(self, config: Mapping[str, Any]) -> None:
        """Close the files; write index and config.json. Raises what went wrong."""
        for file in self._open.values():
            try:
                file.close()
            except OSError as error:
                self.failure = self.failure or error
        if self.failure is not None:
            self.remove()
            raise self.failure
        assert not self.missing, f"nothing came for {sorted(self.missing)}"
        if len(self.files) > 1:
            places = {name: file for file, names in self.files.items() for name in names}
            total = sum(_bytes(name, self.architecture, dtype) for name, dtype in self.dtypes.items())
            write_json(self.temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        write_json(self.temporary / "config.json", config)

    def publish(self, *, sync: bool = True) -> None:
        """Let the folder appear under its name, which must be free. sync: on disk also after a power cut."""
        if sync:
            fsync_tree(self.temporary)
            fsync(self.temporary)
        os.replace(self.temporary, self.folder)
        if sync:
            fsync(self.folder.parent)

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _at(self, name: str) -> tuple[BinaryIO, int]:
        """The open file of a tensor and the byte where it begins; the file's header is written first."""
        if name not in self._places:
            file_name = next(file for file, names in self.files.items() if name in names)
            header, starts = _header(self.files[file_name], self.architecture, self.dtypes)
            file = (self.temporary / file_name).open("wb")
            self._open[file_name] = file
            file.write(header)
            self._places |= {other: (file_name, len(header) + start) for other, start in starts.items()}
        file_name, start = self._places[name]
        return self._open[file_name], start


def config_of(
    a: Architecture, dtypes: Iterable[torch.dtype], tokens: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of an architecture: the type of its weights, and the special tokens of its generation config."""
    kinds = set(dtypes)
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    values = hf_config(a) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    return values | {name: tokens[name] for name in special if tokens and tokens.get(name) is not None}


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a tokenizer's files as they are, chat templates and generation config too; their names."""
    found = sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()})
    for path in found:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return [str(path.relative_to(source)) for path in found]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, not just a generation config."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
    return any((folder / name).is_file() for name in names)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes(name: str, a: Architecture, dtype: torch.dtype) -> int:
    return torch.Size(hf_shape(name, a)).numel() * dtype.itemsize


def _cut(a: Architecture, dtypes: Mapping[str, torch.dtype], most: int) -> dict[str, list[str]]:
    """File name → the tensors in it, in the order of the computation; no file above `most` if a tensor allows."""
    files: list[list[str]] = []
    used = 0
    for name in hf_names(a):
        size = _bytes(name, a, dtypes[name])
        if not files or used + size > most:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    if len(files) == 1:
        return {WHOLE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, 1)}


def _header(names: Iterable[str], a: Architecture, dtypes: Mapping[str, torch.dtype]) -> tuple[bytes, dict[str, int]]:
    """A safetensors file up to its first tensor, and where each tensor starts behind it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(names, key=lambda name: -dtypes[name].itemsize):  # every tensor aligned to its type
        starts[name], end = end, end + _bytes(name, a, dtypes[name])
        kind = _KINDS[dtypes[name]]
        entries[name] = {"dtype": kind, "shape": list(hf_shape(name, a)), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts
