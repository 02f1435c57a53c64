"""The code that travels with a job: a reproducible archive of the package, the step and folders of the user's own.

It unpacks to `nemotron_launch/`, `steps/<id>/`, `steps/schemas/`, `steps/artifacts.yaml` and one folder for each of
`run.code`. The same content gives the same hash, on every machine and at every time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from nemotron_launch import cache
from nemotron_launch.catalog import Step
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.job import Bundle
from nemotron_launch.resources import display, steps_dir

IGNORE_FILE = ".nemotronignore"
LARGEST_CODE = 32 << 20  # bytes of all run.code folders together, unpacked
_KEPT = 24  # archives that stay in the cache
_FORMAT = 2  # a new number forgets what older versions have cached
PLACEHOLDER = Bundle("code.tar.gz", "0" * 64, 0)  # in renderings that are kept to be compared
_unstored: dict[str, bytes] = {}  # archives that the cache could not take
_PACKAGE = Path(__file__).resolve().parent
_made: dict[str, bytes] = {}  # by this process; the cache may be one that cannot be written
_SKIPPED_FOLDERS = frozenset(("__pycache__", "_bundled", "node_modules", "venv", "wandb", "mlruns"))
_OF_THE_CLIENT = ("/reports", "/ui")  # pages of runs and their libraries, which no job shows
_SKIPPED_ENDS = (".pyc", ".pyo", ".egg-info", "~", ".swp", ".tmp")


@frozen
class Entry:
    """A file of the bundle: its name there, where it lies here, and what tells whether it has changed."""

    name: str
    path: str
    executable: bool
    stamp: tuple[int, int, int]

    @property
    def size(self) -> int:
        return self.stamp[0]


def bundle(step: Step, code: Sequence[str] = ()) -> Bundle:
    """What the bundle of a step and of `code` folders is. Costs a stat of each file unless one has changed.

    UserError: a code folder that is not there, too large, or named like one of ours.
    """
    entries = collect(step, code)
    checkout = _checkout(step)
    kept = cache.folder("bundles")
    known = kept / f"{_signature(entries, checkout)}.json" if kept else None
    if known:
        with suppress(OSError, ValueError, TypeError):
            found = Bundle(**json.loads(known.read_text(encoding="utf-8")))
            if known.with_name(found.file).stat().st_size == found.size:
                return found
    return _build(entries, checkout, known)


def read(made: Bundle) -> bytes:
    """The bytes of a bundle that was described on this machine. UserError where they are gone."""
    if made == PLACEHOLDER:
        return b""
    if made.file in _unstored:
        return _unstored[made.file]
    kept = cache.folder("bundles")
    path = kept / made.file if kept else Path(made.file)
    with suppress(OSError):
        packed = path.read_bytes()
        if sha256(packed).hexdigest() == made.sha256:
            return packed
    raise UserError("the bundle is gone or was changed", where=display(path), hint="compile again", exit_code=1)


def collect(step: Step, code: Sequence[str] = ()) -> list[Entry]:
    """The files of a bundle in the order of their names."""
    entries = list(_walk(_PACKAGE, "nemotron_launch", _OF_THE_CLIENT))
    entries += _walk(step.folder, f"steps/{step.id}")
    root = steps_dir()
    entries += _walk(root / "schemas", "steps/schemas")
    artifacts = root / "artifacts.yaml"
    if artifacts.is_file():
        entries.append(_entry("steps/artifacts.yaml", str(artifacts), artifacts.stat()))
    taken = {"nemotron_launch": "the launcher's own", "steps": "the steps' own"}
    total = 0
    for given in code:
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "there is no such folder"
            raise UserError(f"{given}: {what}", where="run.code", hint="name folders of Python code")
        name = folder.name
        if name in taken:
            raise UserError(f"{given}: the name {name} is {taken[name]}", where="run.code", hint="rename the folder")
        taken[name] = f"{given}'s already"
        own = list(_walk(folder, name, _ignored(folder)))
        total += sum(entry.size for entry in own)
        if total > LARGEST_CODE:
            raise _too_large(given, folder, own, total)
        entries += own
    return sorted(entries, key=lambda entry: entry.name)


def _walk(folder: Path, name: str, ignored: Sequence[str] = (), seen: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """The files below a folder, links followed, without caches, hidden files and what the ignore file names."""
    try:
        found = sorted(os.scandir(folder), key=lambda item: item.name)
    except OSError:
        return
    for item in found:
        below = f"{name}/{item.name}"
        if item.name.startswith(".") or item.name.endswith(_SKIPPED_ENDS):
            continue
        if ignored and _matches(below.partition("/")[2], ignored):
            continue
        if item.is_dir():
            real = os.path.realpath(item.path) if item.is_symlink() else ""
            if item.name not in _SKIPPED_FOLDERS and real not in seen:
                yield from _walk(Path(item.path), below, ignored, seen | {real} if real else seen)
        elif item.is_file():
            yield _entry(below, item.path, item.stat())


def _entry(name: str, path: str, stat: os.stat_result) -> Entry:
    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return Entry(name, path, bool(stat.st_mode & 0o100), stamp)


def _ignored(folder: Path) -> list[str]:
    """The patterns of the folder's ignore file, one a line, as the shell matches them; # starts a comment."""
    try:
        lines = (folder / IGNORE_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.strip().rstrip("/") for line in lines if line.strip() and not line.startswith("#")]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    from fnmatch import fnmatchcase

    name = path.rpartition("/")[2]
    return any(fnmatchcase(path if "/" in p else name, p.lstrip("/")) for p in patterns)


def _too_large(given: str, folder: Path, entries: list[Entry], total: int) -> UserError:
    largest = sorted(entries, key=lambda entry: -entry.size)[:3]
    names = ", ".join(f"{entry.name} ({_mib(entry.size)})" for entry in largest)
    return UserError(
        f"{given}: {_mib(total)} of code, more than {_mib(LARGEST_CODE)} can travel",
        where="run.code",
        hint=f"the largest: {names}\nname what is not code in {display(folder / IGNORE_FILE)}; mount data instead",
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


# Archive and cache -------------------------------------------------------------------------------------------------


def _build(entries: Sequence[Entry], checkout: Path | None, known: Path | None) -> Bundle:
    """Pack, describe, and keep both."""
    import gzip
    import io

    content = _tar(entries)
    # The name is the content's: the packed bytes depend on the machine's zlib.
    name = f"code-{sha256(content).hexdigest()[:12]}.tar.gz"
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=packed, mtime=0) as stream:
        stream.write(content)
    data = packed.getvalue()
    made = Bundle(name, sha256(data).hexdigest(), len(data), *_revision(checkout, entries))
    if known and cache.write(known.with_name(name), data) and cache.write(known, json.dumps(asdict(made)).encode()):
        _prune(known.parent)
    else:
        _unstored[name] = data
    return made


def _tar(entries: Sequence[Entry]) -> bytes:
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for entry in entries:
            try:
                data = Path(entry.path).read_bytes()
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise UserError(f"cannot be read: {reason}", where=display(Path(entry.path))) from None
            info = tarfile.TarInfo(entry.name)  # owner, group and time are 0
            info.size = len(data)
            info.mode = 0o755 if entry.executable else 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _signature(entries: Sequence[Entry], checkout: Path | None) -> str:
    stamps = [(entry.name, entry.path, entry.executable, entry.stamp) for entry in entries]
    return sha256(repr((_FORMAT, stamps, _git_stamp(checkout))).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _prune(folder: Path) -> None:
    with suppress(OSError):
        found = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for old in found[2 * _KEPT :]:
            old.unlink(missing_ok=True)


# Git ---------------------------------------------------------------------------------------------------------------


def _checkout(step: Step) -> Path | None:
    """The git checkout that holds the package, else the one that holds the step."""
    for start in (_PACKAGE, step.folder):
        if "site-packages" in start.parts:
            continue
        for folder in (start, *start.parents):
            if (folder / ".git").exists():
                return folder
    return None


def _git_stamp(checkout: Path | None) -> tuple[object, ...]:
    """Changes with every commit, checkout and `git add`."""
    if checkout is None:
        return ()
    git = checkout / ".git"
    if git.is_file():  # a worktree or a submodule
        git = checkout / git.read_text(encoding="utf-8").partition(":")[2].strip()
    stamps: list[object] = [str(checkout)]
    for name in ("HEAD", "index", "logs/HEAD"):
        try:
            stat = (git / name).stat()
            stamps.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def _revision(checkout: Path | None, entries: Sequence[Entry]) -> tuple[str, bool]:
    """The commit, and whether a file of the bundle differs from it. Nothing where git is not there to ask."""
    if checkout is None:
        return "", False
    import subprocess

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    inside = f"{checkout}{os.sep}"
    try:
        revision = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain", "-z", "--untracked-files=all").split("\0")
    except (OSError, subprocess.SubprocessError):
        return "", False
    ours = {entry.path.removeprefix(inside) for entry in entries if entry.path.startswith(inside)}
    return revision, any(line[3:] in ours for line in changed) or _removed(changed, ours)


def _removed(changed: Sequence[str], ours: set[str]) -> bool:
    """Whether a file that git knows is gone from one of the bundle's folders."""
    folders = {path.rpartition("/")[0] for path in ours}
    return any("D" in line[:2] and line[3:].rpartition("/")[0] in folders for line in changed)
