"""One shell on another machine that answers script after script over one channel, and the Host that it makes."""

from __future__ import annotations

import os
import secrets
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.hosts import Entry, Result, Unreachable, Upload, files
from nemotron_launch.hosts.shell import loop, remote_command, terminal_command

QUIET = 60.0  # seconds without a byte in either direction after which a connection counts as dead
ANEW = "the next command connects anew"
AT_ONCE = 1 << 15  # bytes that fit in any buffer on the way, so that sending them cannot block


class Link(Protocol):
    """A command's pipes on another machine."""

    def send(self, data: bytes) -> None:
        """All of it, however long that takes. OSError when the link is gone."""

    def receive(self, seconds: float) -> tuple[bytes, bytes]:
        """What came on standard output and standard error, two empty ones after so long; EOFError at the end."""

    def ended(self) -> UserError | None:
        """Why it has ended, where that is known."""

    def close(self) -> None: ...


class Way(Protocol):
    """How another machine is reached: one connection, which may carry several commands."""

    @property
    def name(self) -> str: ...

    @property
    def login(self) -> bool:
        """Whether commands run in a login shell."""

    def start(self, command: str) -> Link:
        """Run a command, over a new connection where there is none."""

    def terminal(self, command: str) -> int:
        """Run a command with this terminal as its own; its exit code."""

    def close(self) -> None: ...


@frozen
class _Answer:
    code: int
    stderr: bytes


class _Ended(Unreachable):
    """The connection is over, and nothing is known of why."""


class _Unsent(Unreachable):
    """It was over before the script had left: that did not run."""


class _Session:
    """The loop of shell.py at the other end of a link."""

    def __init__(self, way: Way) -> None:
        self._name = way.name
        self._mark = secrets.token_hex(16)
        program = loop(self._mark, login=way.login)
        self._link = way.start(remote_command(program))
        self._open = True
        self._owes = False  # an answer, which nobody may have waited for
        said = bytearray()
        try:
            for chunk in self._answer(self._send(program.encode()), quiet=QUIET, said=said):
                said += chunk[:1000]
        except _Ended as error:
            heard = said.decode(errors="replace").strip()
            if not heard:
                raise
            raise Unreachable(
                f"{self._name} gave no shell; it said: {heard[-1000:]}",
                hint="a shell, sh, head, tar and env are needed there; a profile script may end the session",
                exit_code=1,
            ) from error

    def ask(self, script: str, stdin: bytes, *, quiet: float, total: float | None) -> Generator[bytes, None, _Answer]:
        """Standard output in pieces as they come, and how the script ended. _Unsent where it certainly did not run."""
        text = os.fsencode(script)
        if b"\0" in text:
            raise UserError("a script holds a zero byte")
        text += f"\n#{self._mark}".encode()
        request = f"{len(text)} {len(stdin)}\n".encode() + text
        return self._answer(self._send(request + stdin), quiet=quiet, total=total)

    def alive(self) -> bool:
        """Whether it can be asked: the link has not ended, as far as this machine knows, and owes no answer."""
        if self._open and not self._owes:
            with suppress(EOFError, OSError):
                self._link.receive(0)
                return True
        self.close()
        return False

    def close(self) -> None:
        self._open = False
        self._link.close()

    def _send(self, request: bytes) -> _Sender:
        self._owes = True
        try:
            return _Sender(self._link, request)
        except OSError:
            self.close()
            text = f"{self._name} ended the connection"
            raise _Unsent(text, hint=ANEW, exit_code=1) from None

    def _answer(
        self, sender: _Sender, *, quiet: float, total: float | None = None, said: bytearray | None = None
    ) -> Generator[bytes, None, _Answer]:
        out, err = _Marked(self._mark.encode() * 2), _Marked(self._mark.encode() * 2)
        heard = asked = time.monotonic()
        try:
            while not (out.whole and err.found):
                now = time.monotonic()
                left = asked + total - now if total is not None else max(heard, sender.progress) + quiet - now
                if left <= 0:
                    seconds = total if total is not None else quiet
                    text = f"{self._name} did not answer within {seconds:g} seconds"
                    raise Unreachable(text, hint=ANEW, exit_code=1)
                new_out, new_err = self._link.receive(min(left, 5.0))
                if new_out or new_err:
                    heard = time.monotonic()
                if piece := out.add(new_out):
                    yield piece
                err.keep(new_err)
                if said is not None:
                    said += new_err[:1000]
            self._owes = False
            return _Answer(int(out.behind), err.text)
        except (EOFError, OSError):
            text = f"{self._name} ended the connection"
            if said is not None:
                said += out.held
            raise self._link.ended() or _Ended(text, hint=ANEW, exit_code=1) from None
        finally:
            if self._owes:
                self.close()


class _Sender:
    """Sends a request; from a thread when it is long, so that an answer can come meanwhile."""

    def __init__(self, link: Link, data: bytes) -> None:
        self.progress = time.monotonic()
        if len(data) <= AT_ONCE:
            if data:
                link.send(data)
            return
        threading.Thread(target=self._send, args=(link, data), daemon=True).start()

    def _send(self, link: Link, data: bytes) -> None:
        view = memoryview(data)
        with suppress(Exception):  # the receiving side sees the end of the link, and says so
            for start in range(0, len(view), AT_ONCE):
                link.send(bytes(view[start : start + AT_ONCE]))
                self.progress = time.monotonic()


class _Marked:
    """A stream up to its mark and the line behind it."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self.held = b""
        self._text: list[bytes] = []
        self.found = False
        self.behind = b""

    @property
    def whole(self) -> bool:
        return self.found and self.behind.endswith(b"\n")

    @property
    def text(self) -> bytes:
        return b"".join(self._text)

    def keep(self, data: bytes) -> None:
        """Take in data and hold what is before the mark."""
        self._text.append(self.add(data))

    def add(self, data: bytes) -> bytes:
        """Take in data; what of it is certainly before the mark."""
        if self.found:
            self.behind += data
            return b""
        self.held += data
        place = self.held.find(self._mark)
        if place >= 0:
            self.found = True
            before, self.behind = self.held[:place], self.held[place + len(self._mark) :]
            self.held = b""
            return before
        sure = max(0, len(self.held) - len(self._mark) + 1)
        before, self.held = self.held[:sure], self.held[sure:]
        return before


class Remote:
    """A host that is reached over a connection; one session, opened by the first call and again after a cut."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._session: _Session | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._way.name

    def run(self, script: str, *, stdin: bytes = b"", timeout: float = 60.0) -> Result:
        parts: list[bytes] = []
        answer = self._ask(script, parts.append, stdin=stdin, total=timeout)
        return Result(answer.code, b"".join(parts).decode(errors="replace"), answer.stderr.decode(errors="replace"))

    def put(self, folder: str, uploads: Sequence[Upload]) -> None:
        answer = self._ask(files.placing(folder, uploads), stdin=files.pack(uploads))
        self._check(answer, "cannot write to", folder)

    def read(self, wanted: Mapping[str, int], *, limit: int = 1 << 20) -> dict[str, bytes]:
        if not wanted:
            return {}
        parts: list[bytes] = []
        mark = secrets.token_hex(16)
        answer = self._ask(files.reading(wanted, limit, mark), parts.append)
        said = answer.stderr.decode(errors="replace").strip()
        path = said.partition(": ")[2] or next(iter(wanted))
        self._check(answer, "cannot read", path)
        return files.news(b"".join(parts), wanted, mark)

    def entries(self, folder: str) -> list[Entry] | None:
        parts: list[bytes] = []
        answer = self._ask(files.listing(folder), parts.append)
        if answer.code == files.NONE_THERE and _absent(answer):
            return None
        self._check(answer, "cannot list", folder)
        return files.entries(b"".join(parts))

    def fetch(self, path: str, to: Path) -> None:
        with self._lock:
            pieces = self._begun(files.sending(path), b"", None)
            pipe = files.Pipe(pieces)
            try:
                kind = pipe.read(1)
                if kind:
                    to.parent.mkdir(parents=True, exist_ok=True)
                if kind == b"d":
                    files.make_folder(to)
                    files.unpack(pipe, to)
                    for _ in pipe:
                        pass  # the zeros at the archive's end
                elif kind == b"f":
                    files.write_whole(to, iter(pipe))
                else:
                    list(pipe)
            except tarfile.TarError:
                list(pipe)  # an archive that ended early; the command says why
                if pieces.answer and not pieces.answer.code:
                    raise UserError(f"{self.name}: {path} came in pieces", exit_code=1) from None
            except OSError as error:
                raise files.refusal("cannot write to", str(to), error.strerror or str(error), "") from None
            finally:
                pieces.close()
        assert pieces.answer is not None
        self._check(pieces.answer, "cannot copy", path)

    def interactive(self, script: str) -> int:
        return self._way.terminal(terminal_command(script, login=self._way.login))

    def close(self) -> None:
        with self._lock:
            if self._session:
                self._session.close()
                self._session = None
            self._way.close()

    def _ask(
        self,
        script: str,
        each: Callable[[bytes], object] = lambda _: None,
        *,
        stdin: bytes = b"",
        total: float | None = None,
    ) -> _Answer:
        with self._lock:
            self._opened()  # which a Ctrl-C may end: it may ask for a password
            with _uninterrupted():
                pieces = self._begun(script, stdin, total)
                for piece in pieces:
                    each(piece)
        assert pieces.answer is not None
        return pieces.answer

    def _begun(self, script: str, stdin: bytes, total: float | None) -> _Pieces:
        try:
            return _Pieces(self._opened().ask(script, stdin, quiet=QUIET, total=total))
        except _Unsent:  # it was cut while it lay idle
            return _Pieces(self._opened().ask(script, stdin, quiet=QUIET, total=total))

    def _opened(self) -> _Session:
        if self._session is None or not self._session.alive():
            self._session = None
            self._session = _Session(self._way)
        return self._session

    def _check(self, answer: _Answer, what: str, path: str) -> None:
        if answer.code:
            raise files.refusal(what, path, answer.stderr.decode(errors="replace"), self.name)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep the first Ctrl-C until a command has answered, so that its answer and the connection are not lost.

    The second one ends it at once. A program that handles Ctrl-C itself keeps its own way.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


class _Pieces:
    """A session's answer as an iterator that keeps what the answer ended with."""

    def __init__(self, answer: Generator[bytes, None, _Answer]) -> None:
        self._generator = answer
        self.answer: _Answer | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._generator)
        except StopIteration as end:
            self.answer = self.answer or end.value
            raise StopIteration from None

    def close(self) -> None:
        self._generator.close()


def _absent(answer: _Answer) -> bool:
    return any(words in answer.stderr for words in (b"No such file or directory", b"Not a directory"))
