"""Files to and from a machine that only runs scripts: the scripts, and what goes through their pipes."""

from __future__ import annotations

import io
import os
import secrets
import shlex
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Entry, Upload

CHUNK = 1 << 18
WHOLE = ".whole"  # last in an upload: without it the rest was cut
NONE_THERE = 44  # exit code of a script that found nothing at its path

_REASONS = (
    ("No space left on device", "no space left", "free some there, or choose a folder on another file system"),
    ("Wrote only", "no space left", "free some there, or choose a folder on another file system"),  # tar says so
    ("Disk quota exceeded", "the disk quota is used up", "free some there, or choose a folder on another file system"),
    ("Read-only file system", "the file system is read-only", "choose another folder"),
    ("Permission denied", "permission denied", "choose a folder that you may use, or ask who owns it"),
    ("Operation not permitted", "not permitted", "choose a folder that you may use, or ask who owns it"),
    ("Not a directory", "a file is in the way of a folder", "remove the file, or choose another folder"),
    ("File exists", "a file is in the way of a folder", "remove the file, or choose another folder"),
    ("Is a directory", "a folder is in the way of a file", "remove the folder, or choose another"),
    ("cannot overwrite directory", "a folder is in the way of a file", "remove the folder, or choose another"),
    ("No such file or directory", "nothing is there", None),
    ("File name too long", "a name is too long", None),
)


def refusal(what: str, path: str, text: str, host: str) -> UserError:
    """Why something could not be done at a path. text: what the commands, or the system, said of it."""
    at = f"{host}: {what} {path!r}" if not path.isprintable() else f"{host}: {what} {path}"
    for words, reason, hint in _REASONS:
        if words in text:
            return UserError(f"{at.removeprefix(': ')}: {reason}", hint=hint, exit_code=1)
    lines = [line for line in text.splitlines() if line.strip()]
    said = lines[-1].strip() if lines else "it ended without a word"
    return UserError(f"{at.removeprefix(': ')}: {said}", exit_code=1)


def checked(path: str) -> str:
    """A path that a command takes for nothing else."""
    if not path or "\0" in path:
        raise UserError(f"{path!r} is no path")
    return path if path.startswith("/") else f"./{path}"


def relative(upload: Upload) -> str:
    """An upload's path, which stays in its folder."""
    path = PurePosixPath(upload.path)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in upload.path:
        raise UserError(f"{upload.path!r} is no path below a folder")
    return str(path)


# Placing files.


def pack(files: Sequence[Upload]) -> bytes:
    """A tar archive of the files, and of the empty one that says that they are all there."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for upload in (*files, Upload(WHOLE, b"")):
            info = tarfile.TarInfo(relative(upload))
            info.size, info.mode = len(upload.data), upload.mode
            tar.addfile(info, io.BytesIO(upload.data))
    return archive.getvalue()


def placing(folder: str, files: Sequence[Upload]) -> str:
    """The script that unpacks the archive beside the files' places, all of it, and then renames them."""
    new = f".put-{secrets.token_hex(8)}"
    paths = [PurePosixPath(relative(upload)) for upload in files]
    top = [str(path) for path in paths if len(path.parts) == 1]
    folders = list(dict.fromkeys(path.parts[0] for path in paths if len(path.parts) > 1))
    groups: dict[str, list[str]] = {}
    for path in paths:
        if len(path.parts) > 1:
            groups.setdefault(str(path.parent), []).append(str(path))
    lines = [
        "umask 077; LC_ALL=C; export LC_ALL",
        f"mkdir -p -- {shlex.quote(checked(folder))} && cd -- {shlex.quote(checked(folder))} || exit 1",
        f"trap 'rm -rf {new}' EXIT; trap 'exit 1' HUP INT TERM",
        f"mkdir {new} && tar -xopmf - -C {new} || exit 1",
        f"rm {new}/{WHOLE} || exit 1",
    ]

    def moved(names: Sequence[str], to: str) -> str:
        return f"mv -f {' '.join(shlex.quote(f'{new}/{name}') for name in names)} {shlex.quote(f'./{to}')}"

    lines += [f"{moved(top, '')} || exit 1"] if top else []
    if folders:
        # Whole folders where there are none yet; else their files, folder by folder.
        lines += [
            f"for name in {' '.join(map(shlex.quote, folders))}; do",
            '    if [ -e "./$name" ] || [ -L "./$name" ]; then',
            *(
                f"        mkdir -p {shlex.quote(f'./{parent}')} && {moved(names, parent + '/')} || exit 1"
                for parent, names in groups.items()
            ),
            "        exit 0",
            "    fi",
            "done",
            moved(folders, ""),
        ]
    return "\n".join(lines)


# Reading.


def reading(wanted: Mapping[str, int], limit: int, mark: str) -> str:
    """The script that prints, for each file that is there, the mark, its place in `wanted` and its news."""
    lines = [
        "LC_ALL=C; export LC_ALL",
        "news() {",
        '    if [ ! -r "$2" ]; then stat "$2" >/dev/null 2>&1 || return 0; fi',
        '    [ ! -d "$2" ] || { echo "Is a directory: $2" >&2; exit 1; }',
        '    [ -r "$2" ] || { echo "Permission denied: $2" >&2; exit 1; }',
        f"    printf '%s %s\\n' {mark} \"$1\"",
        f'    dd if="$2" bs=65536 iflag=skip_bytes,count_bytes skip="$3" count={int(limit)} 2>/dev/null || :',
        "}",
    ]
    for place, (path, offset) in enumerate(wanted.items()):
        lines.append(f"news {place} {shlex.quote(checked(path))} {int(offset)}")
    return "\n".join([*lines, ":"])


def news(answer: bytes, wanted: Mapping[str, int], mark: str) -> dict[str, bytes]:
    """What `reading` printed, by path."""
    paths = list(wanted)
    found = {}
    for part in answer.split(mark.encode() + b" ")[1:]:
        place, _, data = part.partition(b"\n")
        found[paths[int(place)]] = data
    return found


def listing(folder: str) -> str:
    """The script that prints the names in a folder, with size, time and kind, each ended by a zero byte."""
    there = shlex.quote(checked(folder))
    return f"""\
LC_ALL=C; export LC_ALL
[ -d {there} ] || {{ stat -L {there} >/dev/null || exit {NONE_THERE}; echo 'Not a directory' >&2; exit 1; }}
[ -r {there} ] && [ -x {there} ] || {{ echo 'Permission denied' >&2; exit 1; }}
cd -- {there} && find -L . -mindepth 1 -maxdepth 1 -printf '%f\\0%s\\0%T@\\0%y\\0' 2>/dev/null
:"""


def entries(answer: bytes) -> list[Entry]:
    """What `listing` printed, in the order of the names."""
    parts = [os.fsdecode(part) for part in answer.split(b"\0")[:-1]]
    found = zip(parts[::4], parts[1::4], parts[2::4], parts[3::4], strict=True)
    made = [Entry(name, int(size), float(mtime), kind == "d") for name, size, mtime, kind in found]
    return sorted(made, key=lambda entry: entry.name)


# Fetching.


def sending(path: str) -> str:
    """The script that prints a file behind an `f`, or an archive of a folder behind a `d`."""
    there = shlex.quote(checked(path))
    return f"""\
LC_ALL=C; export LC_ALL
if [ -d {there} ]; then
    printf d
    cd -- {there} && tar --hard-dereference -cf - .
    [ $? -le 1 ] # 1: a file changed while it was read, as logs do
elif [ -e {there} ]; then
    exec 4<{there} || exit 1
    printf f
    cat <&4
else
    stat -L {there} >/dev/null || exit {NONE_THERE}
fi"""


class Pipe:
    """Chunks of bytes, read like a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Exactly so many bytes, fewer only at the end."""
        parts, missing = [], size
        while missing:
            self._rest = self._rest or next(self._chunks, b"")
            if not self._rest:
                break
            part, self._rest = self._rest[:missing], self._rest[missing:]
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def __iter__(self) -> Iterator[bytes]:
        if self._rest:
            yield self._rest
        yield from self._chunks


def write_whole(to: Path, chunks: Iterator[bytes], *, mode: int = 0o644, mtime: float | None = None) -> None:
    """A file that appears under its name when all of it is there; whatever was there before goes."""
    new = to.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            os.fchmod(file.fileno(), mode & 0o777)
        if mtime is not None:
            os.utime(new, (mtime, mtime))
        new.replace(to)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def unpack(pipe: Pipe, to: Path) -> None:
    """Files, folders and links of an archive below a folder, each file when it is whole; nothing lands outside it."""
    with tarfile.open(fileobj=_readable(pipe), mode="r|", bufsize=CHUNK, errors="surrogateescape") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if ".." in parts or member.name.startswith("/"):
                raise UserError(f"the archive holds {member.name!r}, which lies outside the folder", exit_code=1)
            place = to.joinpath(*parts)
            if member.isdir():
                make_folder(place)
            elif member.issym():
                write_link(place, member.linkname)
            elif member.isreg():
                file = tar.extractfile(member)
                assert file is not None
                write_whole(place, chunks(file), mode=member.mode, mtime=member.mtime)


def make_folder(place: Path) -> None:
    """A real folder: a link of an earlier fetch would lead outside."""
    if place.is_symlink():
        place.unlink()
    place.mkdir(parents=True, exist_ok=True)


def write_link(place: Path, target: str) -> None:
    """A symbolic link, in place of whatever link or file is there."""
    new = place.with_name(f".{secrets.token_hex(8)}.part")
    new.symlink_to(target)
    try:
        new.replace(place)
    except OSError:
        new.unlink()
        raise


def chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _readable(pipe: Pipe) -> IO[bytes]:
    readable: IO[bytes] = pipe  # type: ignore[assignment]
    return readable
