"""What the operating system says about a file, as a message; imports no torch."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.exit_codes import BAD_INPUT, FAILED

FULL_MIB = 4  # a file system with less free space than this counts as full
# A path that cannot be used; another attempt with the same one ends the same way.
_OF_THE_PATH = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def file_error(error: OSError, path: Path | str | None = None) -> UserError:
    """One message with the file's name; path: where the error does not know it."""
    place = error.filename or path
    hint = None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "make room, and start again: a run goes on from its newest checkpoint"
    return UserError(
        (error.strerror or str(error)).lower(),
        where=str(place) if place else None,
        hint=hint,
        exit_code=BAD_INPUT if error.errno in _OF_THE_PATH else FAILED,
    )


def why_not_written(error: BaseException, folder: Path) -> str:
    """Why tensors could not be written below a folder, in a few words; torch's writer often knows no reason."""
    if shutil.disk_usage(folder).free / 2**20 < FULL_MIB:
        return "no space left on device"
    known = error.strerror if isinstance(error, OSError) and error.strerror else ""
    said = known or str(error).strip() or type(error).__name__
    return said.splitlines()[-1].lower()
