"""Which code a run was made with, as far as its files say."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from nemotron_launch import __version__


def code_of(config_path: Path) -> dict[str, Any]:
    """The package's version, the revision of the checkout that it lies in, and the bundle that travelled."""
    folders = (config_path.absolute().parent, config_path.absolute().parent.parent)
    bundle = next((file.name for folder in folders for file in sorted(folder.glob("code-*.tar.gz"))), "")
    return {"version": __version__, "git_revision": "" if bundle else _revision(), "bundle": bundle}


def _revision() -> str:
    """The commit that is checked out around the package; empty in a wheel and where git keeps it otherwise."""
    git = Path(__file__).resolve().parents[2] / ".git"
    with contextlib.suppress(OSError, ValueError):
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        for line in (git / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {name}"):
                return line.partition(" ")[0]
    return ""
