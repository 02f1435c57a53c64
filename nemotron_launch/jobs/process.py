"""Names a process so that another one, later, can tell whether it still lives: its number alone is used again."""

from __future__ import annotations

import os
from pathlib import Path


def identity(pid: int | None = None) -> str:
    """`host:pid:start` of a process of this machine, this one unless given; start is empty where it cannot be told."""
    number = os.getpid() if pid is None else pid
    return f"{os.uname().nodename}:{number}:{_start(number)}"


def alive(name: str) -> bool | None:
    """Whether the process of an identity lives; a zombie does not. None: it is another machine's."""
    host, number, start = [*name.rsplit(":", 2), "", ""][:3]
    if not number.isdigit():
        return False
    if host != os.uname().nodename:
        return None
    pid = int(number)
    if start or _start(os.getpid()):
        return bool(start) and _start(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start(pid: int) -> str:
    """When it started, in ticks since this boot, and which boot: empty when it is over, or where there is no /proc."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return ""
    return "" if words[0] in "ZX" else f"{words[19]}-{boot}"  # the 22nd field; the state is the third
