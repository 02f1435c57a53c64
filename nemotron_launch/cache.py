"""The user's own folder for what is costly to make again: bundles, compiled templates. All of it may be deleted."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


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
