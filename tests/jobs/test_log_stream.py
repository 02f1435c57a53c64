"""Streaming: every byte of every log once and in order, however it is cut, and never more than a little in memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.backends.live import LogSource
from nemotron_launch.backends.local_client import LocalClient
from nemotron_launch.hosts import Unreachable
from nemotron_launch.jobs.log_stream import LONGEST_LINE, LogStream, tail_starts
from nemotron_launch.jobs.run import Run
from tests.jobs.rows import row


class Logs(LocalClient):
    """Logs in memory that grow, over a connection that is cut now and then."""

    def __init__(self, texts: dict[LogSource, bytes], seed: int = 0, cut: float = 0.0) -> None:
        super().__init__()
        self.texts, self.chance, self.cut = texts, random.Random(seed), cut
        self.there = dict.fromkeys(texts, 0)

    def grow(self) -> None:
        for source, text in self.texts.items():
            self.there[source] = min(len(text), self.there[source] + self.chance.randrange(40))

    @property
    def whole(self) -> bool:
        return all(self.there[source] == len(text) for source, text in self.texts.items())

    def log_sources(self, run: Run) -> list[LogSource]:
        return [source for source in self.texts if self.there[source]]

    def read_logs(self, wanted: Mapping[LogSource, int]) -> dict[LogSource, bytes]:
        if self.chance.random() < self.cut:
            raise Unreachable("cut")
        found = {}
        for source, offset in wanted.items():
            end = min(self.there[source], offset + self.chance.randrange(1, 60))
            if offset < end:
                found[source] = self.texts[source][offset:end]
        return found


LINES = st.lists(st.text("aé漢😀 \r", max_size=12), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 3)), LINES, max_size=4), st.integers())
def test_every_byte_comes_once_in_whole_lines_whatever_is_cut(
    logs: dict[tuple[int, int], list[str]], seed: int
) -> None:
    texts = {
        LogSource(attempt, f"node-{node}", f"{attempt}/{node}"): "\n".join(lines).encode()
        for (attempt, node), lines in logs.items()
    }
    backend = Logs(texts, seed, cut=0.3)
    stream, got = LogStream(row()), dict.fromkeys(texts, b"")
    rounds = 0
    while rounds < 30:
        backend.grow()
        rounds += backend.whole
        try:
            stream.look(backend)
            for piece in stream.read(backend):
                assert piece.data.endswith(b"\n")
                piece.data.decode()  # no character is cut
                got[piece.source] += piece.data
        except Unreachable:
            continue
    for piece in stream.last_words():
        got[piece.source] += piece.data
    # A last line that was never ended gets its line break.
    assert got == {source: text + b"\n" * bool(text and not text.endswith(b"\n")) for source, text in texts.items()}


def test_a_line_without_end_is_cut_between_characters(tmp_path: Path) -> None:
    log = tmp_path / "a-run/logs/attempt-0/node-0.log"
    log.parent.mkdir(parents=True)
    text = ("é" * 3 * LONGEST_LINE).encode()
    log.write_bytes(b"a" + text)
    stream, client, got = LogStream(row(folder=tmp_path)), LocalClient(), b""
    stream.look(client)
    while pieces := list(stream.read(client)):
        for piece in pieces:
            assert max(map(len, piece.data.split(b"\n"))) <= LONGEST_LINE
            piece.data.decode()
            got += piece.data
    got += b"".join(piece.data for piece in stream.last_words())
    assert got.replace(b"\n", b"") == b"a" + text


def test_a_long_log_costs_little_memory(tmp_path: Path) -> None:
    log = tmp_path / "a-run/logs/attempt-0/node-0.log"
    log.parent.mkdir(parents=True)
    with log.open("wb") as file:
        for _ in range(60):
            file.write(b"a line of some length\n" * 50_000)  # 63 MiB in all
    stream, client, size = LogStream(row(folder=tmp_path)), LocalClient(), 0
    tracemalloc.start()
    try:
        stream.look(client)
        while pieces := list(stream.read(client)):
            size += sum(len(piece.data) for piece in pieces)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # a read is 1 MiB, held a few times over
    finally:
        tracemalloc.stop()
    assert size == log.stat().st_size


def test_the_bytes_that_an_earlier_attempt_writes_late_are_not_lost(tmp_path: Path) -> None:
    first, second = (tmp_path / f"a-run/logs/attempt-{n}/node-0.log" for n in (0, 1))
    for log in (first, second):
        log.parent.mkdir(parents=True)
    first.write_text("one\n")
    stream, client, got = LogStream(row(folder=tmp_path)), LocalClient(), []

    def turn() -> None:
        stream.look(client)
        got.extend(piece.data for piece in stream.read(client))

    for _ in range(10):
        turn()
    second.write_text("three\n")
    turn()
    first.write_text("one\ntwo\n")
    turn()
    assert got == [b"one\n", b"three\n", b"two\n"]


@pytest.mark.parametrize(
    ("text", "lines", "tail"),
    [
        ("", 3, ""), ("a\nb\nc\n", 2, "b\nc\n"), ("a\nb\nc", 2, "b\nc"), ("a\nb\n", 5, "a\nb\n"), ("a\nb\n", 0, ""),
        ("\n\n\n", 1, "\n"),
    ],
)  # fmt: skip
def test_a_tail_begins_at_a_line(tmp_path: Path, text: str, lines: int, tail: str) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    source = LogSource(0, "node-0", str(log))
    start = tail_starts(LocalClient(), [source], lines)[source]
    assert text[start:] == tail
