"""What a run on this machine leaves in its folder, and what that says of it. For its supervisor and for those who ask.

claim         who runs it: the supervisor's identity
status.json   where it is, replaced whole at every change
cancel        it was asked to end for good; "now": without saving
exit_code     when it is over
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_launch.backends.live import Seen
from nemotron_launch.frozen import replace
from nemotron_launch.jobs.process import alive, identity
from nemotron_launch.trainer.exit_codes import RESUME_ME

CLAIM, STATUS, CANCEL, EXIT_CODE, LOGS = "claim", "status.json", "cancel", "exit_code", "logs"


def claim(folder: Path) -> bool:
    """Make the run this process's own; False where another one has it."""
    try:
        with (folder / CLAIM).open("x") as file:
            file.write(identity() + "\n")
    except FileExistsError:
        return False
    return True


def holder(folder: Path) -> str:
    """The identity of the process that has the run; empty when nobody has."""
    with suppress(OSError):
        return (folder / CLAIM).read_text().strip()
    return ""


def clear(folder: Path) -> None:
    """Let a run that is over be claimed again. Its logs stay."""
    for name in (STATUS, EXIT_CODE, CANCEL, CLAIM):
        (folder / name).unlink(missing_ok=True)


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    passing = path.with_name(f".{path.name}.{os.getpid()}")
    passing.write_text(text)
    passing.replace(path)


def note(folder: Path, seen: Seen) -> None:
    """Write down where the run is; its exit code too when it is over."""
    if seen.exit_code is not None and seen.ended is not None:
        put(folder / EXIT_CODE, f"{seen.exit_code}\n")
    put(folder / STATUS, json.dumps(vars(seen)))


def verdict(folder: Path, code: int, saved: str) -> dict[str, Any]:
    """State and reason of a run that ended with this exit code. saved: the reason of one that saved and stopped."""
    if code and wish(folder):
        return {"state": "cancelled", "reason": ""}
    if code == RESUME_ME:
        return {"state": "stopped", "reason": saved}
    return {"state": "failed" if code else "finished", "reason": ""}


def wish(folder: Path) -> str:
    """Whether the run is to end: empty, "save" or "now"."""
    try:
        return (folder / CANCEL).read_text().strip() or "save"
    except OSError:
        return ""


def look(folder: Path) -> Seen | None:
    """How the run of a folder is; None where nobody has claimed it, nor the sweep that it is a point of."""
    who = holder(folder) or (holder(folder.parent) if folder.name.startswith("point-") else "")
    if not who:
        return None
    lives = alive(who)  # before its last words are read
    words: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        words = json.loads((folder / STATUS).read_text())
    pid = who.rsplit(":", 2)[1]
    seen = Seen(**{"state": "pending", **words, "nodes": tuple(words.get("nodes", ())), "job_id": pid})
    if seen.ended is None and lives is False:
        reason = "the process that ran it is gone: killed, or the machine was restarted"
        with suppress(OSError):
            return replace(seen, state="lost", reason=reason, ended=(folder / STATUS).stat().st_mtime)
        return replace(seen, state="lost", reason=reason, ended=time.time())
    return seen
