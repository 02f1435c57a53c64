"""What a config's path or hub id stands for on this machine; imports nothing heavy."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from nemotron_launch.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_path(text: str, step_dir: Path | None, where: str) -> Path:
    """A config's path: `step://x` inside the step's folder, `~` expanded, anything else from the working directory."""
    if not text.startswith("step://"):
        return Path(text).expanduser()
    if step_dir is None:
        raise UserError(f"{text} has no meaning outside a step", where=where)
    return step_dir / text.removeprefix("step://")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no file here can be a hub id: `name` or `owner/name`, nothing that only a path has."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).expanduser().exists()


@cache
def hub_is_offline() -> bool:
    """Whether to look in the local cache only.

    True where HF_HUB_OFFLINE says so, or where the hub's host has no address: the client would otherwise
    retry every file for half a minute before it says the same. Behind a proxy the name need not resolve here.
    """
    import socket  # here, for the launcher has no use for them
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return True
    if getproxies():
        return False
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False
