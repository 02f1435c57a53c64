"""This machine as a host."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Entry, Result, Unreachable, Upload, files
from nemotron_launch.hosts.shell import clean

LONGEST_ARGUMENT = 100_000  # bytes; Linux takes 131,071


class Here:
    """Commands are child processes, files are files."""

    name = ""

    def run(self, script: str, *, stdin: bytes = b"", timeout: float = 60.0) -> Result:
        text = os.fsencode(script)
        if b"\0" in text:
            raise UserError("a script holds a zero byte")
        if len(text) <= LONGEST_ARGUMENT:
            return _run(["/bin/sh", "-c", script], (), script, stdin, timeout)
        with tempfile.TemporaryFile() as file:
            file.write(text)
            file.flush()
            return _run(["/bin/sh", f"/dev/fd/{file.fileno()}"], (file.fileno(),), script, stdin, timeout)

    def put(self, folder: str, uploads: Sequence[Upload]) -> None:
        root = Path(files.checked(folder))
        paths = [files.relative(upload) for upload in uploads]
        try:
            _make_private(root)
            new = root / f".put-{secrets.token_hex(8)}"
            new.mkdir(0o700)
            try:
                for path, upload in zip(paths, uploads, strict=True):
                    _make_private((new / path).parent)
                    with os.fdopen(
                        os.open(new / path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, upload.mode), "wb"
                    ) as file:
                        os.fchmod(file.fileno(), upload.mode)
                        file.write(upload.data)
                for path in paths:
                    _make_private((root / path).parent)
                    (new / path).replace(root / path)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        except OSError as error:
            raise _refusal("cannot write to", folder, error) from None

    def read(self, wanted: Mapping[str, int], *, limit: int = 1 << 20) -> dict[str, bytes]:
        found = {}
        for path, offset in wanted.items():
            try:
                with open(files.checked(path), "rb") as file:
                    file.seek(offset)
                    found[path] = file.read(limit)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise _refusal("cannot read", path, error) from None
        return found

    def entries(self, folder: str) -> list[Entry] | None:
        found = []
        try:
            with os.scandir(files.checked(folder)) as names:
                for name in names:
                    with suppress(FileNotFoundError):
                        try:
                            stat = name.stat()
                        except OSError:  # a link that leads nowhere
                            stat = name.stat(follow_symlinks=False)
                        found.append(Entry(name.name, stat.st_size, stat.st_mtime, name.is_dir()))
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            if not Path(files.checked(folder)).exists():
                return None
            raise _refusal("cannot list", folder, error) from None
        except OSError as error:
            raise _refusal("cannot list", folder, error) from None
        return sorted(found, key=lambda entry: entry.name)

    def fetch(self, path: str, to: Path) -> None:
        try:
            _copy(Path(files.checked(path)), to)
        except OSError as error:
            raise _refusal("cannot copy", path, error) from None

    def interactive(self, script: str) -> int:
        # Ctrl-C is theirs: they have the same terminal. A handler, since what is ignored stays so in a child.
        before = signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            code = subprocess.call(["/bin/sh", "-c", script], env=clean(os.environ, terminal=True))
        finally:
            signal.signal(signal.SIGINT, before)
        return 128 - code if code < 0 else code

    def close(self) -> None:
        pass


def _run(command: Sequence[str], kept: Sequence[int], script: str, stdin: bytes, timeout: float) -> Result:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean(os.environ),
        start_new_session=True, pass_fds=kept,
    )  # fmt: skip
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unreachable(f"no answer within {timeout:g} s from: {_head(script)}") from None
        raise
    code = process.returncode
    return Result(128 - code if code < 0 else code, out.decode(errors="replace"), err.decode(errors="replace"))


def _head(script: str) -> str:
    first = script.strip().partition("\n")[0]
    return first if len(first) <= 80 else first[:79] + "…"


def _refusal(what: str, path: str, error: OSError) -> UserError:
    return files.refusal(what, path, error.strerror or str(error), "")


def _make_private(folder: Path) -> None:
    """With its parents, like mkdir -p under a umask that lets nobody else in."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_private(folder.parent)
    folder.mkdir(0o700, exist_ok=True)


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        _copy_file(source, to)
        return
    files.make_folder(to)
    with os.scandir(source) as names:
        for name in names:
            if name.is_symlink():
                files.write_link(to / name.name, os.readlink(name))
            elif name.is_dir():
                _copy(Path(name.path), to / name.name)
            elif name.is_file():
                _copy_file(Path(name.path), to / name.name)


def _copy_file(source: Path, to: Path) -> None:
    with source.open("rb") as file:
        stat = os.fstat(file.fileno())
        files.write_whole(to, files.chunks(file), mode=stat.st_mode, mtime=stat.st_mtime)
