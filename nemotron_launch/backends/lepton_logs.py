"""Logs of a Lepton job's replicas: streamed live, each by a thread, reconnected, gaps filled from the log store.

A replica's log is one text; a place in it is a number of bytes from its beginning. The live log begins at the beginning
each time it is asked for, so a reconnection skips what was had, and compares its end. Where the live log is gone, or is
another than before, the log store goes on: its lines behind the last text that was had.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from nemotron_launch.backends.lepton_api import Answer, Api, Line
from nemotron_launch.errors import UserError

_AHEAD = 256 << 10  # bytes of a replica that wait to be read; its connection waits then
_ANCHOR = 4096  # bytes by which a place is found again
_SETTLED = 0.5  # seconds without a byte after which a log counts as read, while its job lives
_SETTLED_OVER = 5.0  # the same, once its job is over and the service should end the stream
_AWAY = 5.0  # seconds that a connection that was cut may take to come back, while others are not kept waiting
_LONGEST_READ = 10.0  # seconds that one read waits at most
_FURTHEST = 20  # pages back in which the last text that was had is looked for
_PAGE = 1000  # lines that the log store is asked for at once
_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before the next connection
_LAST_LINE = b"nemotron-exit "
_FINAL_LOOKS = 4  # looks for the last line in the store, which may lag, of a job that is over

Key = tuple[str, str]  # job id, replica id


class Logs:
    """The logs that were asked for so far. since: when each job was made, in seconds; over: jobs that have ended."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._readers: dict[Key, _Reader] = {}
        self.since: dict[str, float] = {}
        self.over: set[str] = set()

    def read(self, wanted: Mapping[Key, int]) -> dict[Key, bytes]:
        """What lies behind these offsets. Waits, shortly, until each log has news or seems to have none."""
        readers = {key: self._reader(key, offset) for key, offset in wanted.items()}
        end = time.monotonic() + _LONGEST_READ
        while not all(reader.ready(key[0] in self.over) for key, reader in readers.items()):
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        for reader in readers.values():
            if reader.error:
                raise reader.error
        return {key: data for key, reader in readers.items() if (data := reader.take())}

    def tail(self, key: Key) -> bytes:
        """The last bytes that came of a log, as far as it was read."""
        return self._readers[key].anchor if key in self._readers else b""

    def _reader(self, key: Key, offset: int) -> _Reader:
        reader = self._readers.get(key)
        if reader is None or reader.next != offset:
            if reader:
                reader.close()
            reader = _Reader(self, self._api, key, offset)
            self._readers[key] = reader
        return reader

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


class _Reader:
    """One log. next: offset of the first byte that was not taken. anchor: the last bytes that came."""

    def __init__(self, logs: Logs, api: Api, key: Key, start: int) -> None:
        self._logs, self._api, self._key = logs, api, key
        self.next = start
        self.anchor = b""
        self.error: UserError | None = None
        self._start = start  # bytes before it are dropped
        self._received = 0
        self._waiting = bytearray()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._idle_since: float | None = None  # when the last byte came, or the connection stood
        self._cut_since: float | None = None  # since when no connection stands
        self._resting = False  # all that there is for now has come
        self._final = False  # nothing will come any more
        threading.Thread(target=self._run, name=f"log {key[1]}", daemon=True).start()

    # For who reads.

    def ready(self, over: bool) -> bool:
        """Whether there is something to take, or nothing to be expected soon."""
        with self._changed:
            if self._waiting or self.error or self._final or (self._resting and not over):
                return True
            if self._cut_since is not None:
                return time.monotonic() - self._cut_since > _AWAY
            since = self._idle_since
            return since is not None and time.monotonic() - since > (_SETTLED_OVER if over else _SETTLED)

    def take(self) -> bytes:
        with self._changed:
            data = bytes(self._waiting)
            self._waiting.clear()
            self.next += len(data)
            self._changed.notify_all()
        return data

    def close(self) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    # In the thread.

    def _run(self) -> None:
        job, tries, live, looks = self._key[0], 0, True, 0
        while not self._stop.is_set():
            before = self._received
            ended = False  # all that there is has come
            try:
                if live:
                    live = self._live()
                    ended = True
            except Answer as error:
                if error.status in (401, 403):
                    self.error = error
                    return
                ended = error.status < 429  # not there, or no longer
            except UserError:
                pass  # cut, or away: the next one goes on
            self._cut_since = None if ended or not live else self._cut_since or time.monotonic()
            if self._stop.is_set():
                return
            if ended or not live:
                with suppress(UserError):
                    self._from_store()
                if job in self._logs.over:
                    looks += 1
                    if _LAST_LINE in self.anchor or looks >= _FINAL_LOOKS:
                        self._final = True
                        return
            tries = 0 if self._received > before else min(tries + 1, len(_PAUSES) - 1)
            self._rest(_PAUSES[tries], ended or not live)

    def _rest(self, seconds: float, ended: bool) -> None:
        """Pause; ended: whoever reads may know that nothing will come meanwhile. Short when the job is over."""
        self._resting = ended
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._stop.wait(min(left, 0.2)):
            if self._key[0] in self._logs.over and left < seconds - 0.4:
                break
        self._resting = False

    def _live(self) -> bool:
        """Stream the live log to its end; False where it is another than before."""
        skip, anchor = self._received, self.anchor
        seen, held = 0, b""
        with self._api.live_log(*self._key) as chunks:
            self._touch()
            for chunk in chunks:
                if self._stop.is_set():
                    return True
                if seen < skip:
                    had = chunk[: skip - seen]
                    seen += len(had)
                    held = (held + had)[-_ANCHOR:]
                    chunk = chunk[len(had) :]
                    if seen == skip and not held.endswith(anchor):
                        return False
                if chunk:
                    self._put(chunk)
        return seen == skip or seen == 0  # ended before what was had: nothing is kept there, the store goes on

    def _from_store(self) -> None:
        """Put what the log store has behind what was had."""
        if not self._received:
            for page in self._pages(forward=True):
                self._put(_text(page))
            return
        after = b""
        for page in itertools.islice(self._pages(forward=False), _FURTHEST):
            after = _text(page) + after
            if (at := after.rfind(self.anchor)) >= 0:
                self._put(after[at + len(self.anchor) :])
                return

    def _pages(self, *, forward: bool) -> Iterator[list[Line]]:
        """The store's lines, each once, a page at a time, from the first on or from the last back."""
        job, replica = self._key
        start = int((self._logs.since.get(job, time.time() - 86400) - 3600) * 1e9)
        end = int((time.time() + 60) * 1e9)
        limit, cursor, given = _PAGE, None, 0  # given: lines at the cursor that were given already
        while not self._stop.is_set():
            lines = self._api.stored_log(job, replica, start=start, end=end, limit=limit, forward=forward)
            at_cursor = sum(line.when == cursor for line in lines)
            drop = min(given, at_cursor)
            new = lines[drop:] if forward else lines[: len(lines) - drop]
            if not new:
                if len(lines) < limit:
                    return
                limit *= 2  # more lines than a page at one moment
                continue
            yield new
            if len(lines) < limit:
                return
            edge = new[-1].when if forward else new[0].when
            at_edge = sum(line.when == edge for line in new)
            given = given + at_edge if edge == cursor else at_edge
            cursor, limit = edge, _PAGE if edge != cursor else limit
            start, end = (edge, end) if forward else (start, edge + 1)

    def _put(self, data: bytes) -> None:
        """Hand over bytes that follow what came before; waits while nobody takes them."""
        with self._changed:
            wanted = data[max(0, self._start - self._received) :]
            self._received += len(data)
            self.anchor = (self.anchor + data)[-_ANCHOR:]
            while len(self._waiting) > _AHEAD and not self._stop.is_set():
                self._changed.wait(1.0)
            self._waiting += wanted
            self._idle_since, self._cut_since = time.monotonic(), None

    def _touch(self) -> None:
        with self._changed:
            self._idle_since = time.monotonic()


def _text(lines: Iterable[Line]) -> bytes:
    return b"".join(line.text.removesuffix("\n").encode() + b"\n" for line in lines)
