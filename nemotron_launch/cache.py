"""The user's own folder for what is costly to make again: bundles, compiled templates. All of it may be deleted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

_FORMAT = 1  # a new number forgets what older versions have kept
SETTLED = 2.0  # seconds after which a change can no longer hide behind an equal time stamp


def remembered(kind: str, path: Path) -> Any:
    """What `remember` kept of a file, if it and all that it was read with are the same still; else None."""
    kept = _place(kind, path)
    if kept:
        with suppress(OSError, ValueError, TypeError):
            stamps, data = json.loads(kept.read_bytes())
            if stamps[0][0] == _name(kind, path) and all(_stamp(name) == stamp for name, stamp in stamps[1:]):
                return data
    return None


def remember(kind: str, path: Path, files: Iterable[Path], data: Any) -> None:
    """Keep what was read from a file, `files` being all that it depends on. data: what JSON gives back as it is."""
    stamps = [(str(file.absolute()), _stamp(str(file.absolute()))) for file in files]
    newest = max((max(stamp[1:3]) for _, stamp in stamps if stamp), default=0)
    kept = _place(kind, path)
    if kept and all(stamp for _, stamp in stamps) and time.time() - newest / 1e9 > SETTLED:
        write(kept, json.dumps([[(_name(kind, path), None), *stamps], data]).encode())


def _name(kind: str, path: Path) -> str:
    return f"{_FORMAT} {kind} {path.absolute()}"


def _place(kind: str, path: Path) -> Path | None:
    """As many files as there are names of three digits, however many configs come and go."""
    kept = folder("files")
    name = sha256(_name(kind, path).encode("utf-8", "surrogateescape")).hexdigest()[:3]
    return kept / f"{name}.json" if kept else None


def _stamp(path: str) -> list[int]:
    """What changes with a file; empty where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def folder(name: str) -> Path | None:
    """`~/.cache/nemotron/<name>`, made where it is missing; None where nothing can or should be kept there.

    What lies there is trusted, so nobody else may be able to write there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base, "nemotron", name)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = path.stat()
    except OSError:
        return None
    return path if stat.st_uid == os.getuid() and not stat.st_mode & 0o022 else None


def write(path: Path, data: bytes) -> bool:
    """Write a file of the cache whole or not at all, since several commands may run at once; whether it is there."""
    passing = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        passing.write_bytes(data)
        passing.replace(path)
    except OSError:
        with suppress(OSError):
            passing.unlink(missing_ok=True)
        return False
    return True
