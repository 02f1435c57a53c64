"""Where commands run and files lie: this machine, or one over SSH, behind one small interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen


@frozen
class Result:
    """What a command left: its exit code (128 + n for signal n) and its text, undecodable bytes replaced."""

    code: int
    stdout: str
    stderr: str


@frozen
class Upload:
    """A file to place. path: relative to the folder that it goes into; mode: its permissions from its first byte on."""

    path: str
    data: bytes
    mode: int = 0o600


@frozen
class Entry:
    """A name in a folder. size in bytes; mtime in seconds since 1970, by that machine's clock."""

    name: str
    size: int
    mtime: float
    is_dir: bool


class Unreachable(UserError):
    """No connection, or it was cut: what was asked for may have happened or not. Worth another try."""


class Host(Protocol):
    """A machine. Every method raises Unreachable when it is out of reach, UserError for what cannot be done there."""

    @property
    def name(self) -> str:
        """As people know it: user@host; empty for this machine."""

    def run(self, script: str, *, stdin: bytes = b"", timeout: float = 60.0) -> Result:
        """Run lines of POSIX shell (the caller quotes) in a clean, allow-listed environment.

        What a login shell prints before the first line of the script is not part of the result.
        """

    def put(self, folder: str, files: Sequence[Upload]) -> None:
        """Make the folder (0700, with its parents) and place the files, each under another name until it is whole."""

    def read(self, wanted: Mapping[str, int], *, limit: int = 1 << 20) -> dict[str, bytes]:
        """What lies behind these offsets in these files, at most `limit` bytes each; a missing file is left out."""

    def entries(self, folder: str) -> list[Entry] | None:
        """What is in a folder; None where there is none."""

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file or a folder from there; a file appears when it is whole."""

    def interactive(self, script: str) -> int:
        """Run lines of shell with this terminal as theirs; the exit code."""

    def close(self) -> None:
        """End the connection. Later calls open a new one."""


def open_host(contact: Mapping[str, Any]) -> Host:
    """The host that a profile's `tunnel` names; an empty mapping, or type local, is this machine. Connects lazily."""
    if contact.get("type", "local") == "local":
        from nemotron_launch.hosts.here import Here

        return Here()
    from nemotron_launch.hosts.session import Remote

    if contact.get("client") == "openssh":
        from nemotron_launch.hosts.openssh import OpenSSH

        return Remote(OpenSSH(contact))
    with _without("invoke"):  # which paramiko loads for a part that is not used here: a third of its import
        from nemotron_launch.hosts.ssh import SSH

    return Remote(SSH(contact))


@contextmanager
def _without(module: str) -> Iterator[None]:
    """As if a module that nobody has loaded yet could not be loaded."""
    modules: dict[str, Any] = sys.modules
    absent = module not in modules
    if absent:
        modules[module] = None
    try:
        yield
    finally:
        if absent:
            modules.pop(module, None)
