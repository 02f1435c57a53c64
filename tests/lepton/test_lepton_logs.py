"""Logs of replicas: whole, in order, once, however they come; and little memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from nemotron_launch.frozen import replace
from nemotron_launch.jobs.log_stream import LogStream, tail_starts
from nemotron_launch.jobs.run import Run
from tests.lepton.lepton_runs import client, planned, spec_of
from tests.lepton.service import Fault, Job, Service

LINE = "replica {} line {} äöü→€ 0123456789\n"  # characters of two and three bytes, for chunks to cut


def text(replica: int, lines: int) -> bytes:
    return "".join(LINE.format(replica, n) for n in range(lines)).encode()


def been(workspace: Service, remote: Path, logs: list[bytes], state: str = "Completed") -> tuple[Run, Job]:
    run, files = planned(remote, nodes=len(logs))
    job = workspace.finished(spec_of(files), logs, state)
    return replace(run, job_id=job.id, state="running", submitted=job.made, started=job.made), job


def read_all(run: Run, seconds: float = 60) -> dict[str, bytes]:
    """Every log by its name, as following reads it: until two looks find nothing."""
    backend, stream, got, quiet = client(run), LogStream(run), dict[str, bytes](), 0
    end = time.monotonic() + seconds
    while quiet < 2:
        assert time.monotonic() < end, {name: len(data) for name, data in got.items()}
        stream.look(backend)
        quiet += 1
        for piece in stream.read(backend):
            got[piece.source.name] = got.get(piece.source.name, b"") + piece.data
            quiet = 0
    backend.close()
    return got


@pytest.mark.slow
def test_fifty_replicas_stream_completely_in_order_in_little_memory(workspace: Service, tmp_path: Path) -> None:
    logs = [text(n, 2000) for n in range(50)]  # 4.4 MB
    run, job = been(workspace, tmp_path, logs, "Running")
    workspace.chunks = 4093
    backend, stream = client(run), LogStream(run)
    stream.look(backend)
    sizes = dict.fromkeys((f"node-{n}" for n in range(50)), 0)
    end = time.monotonic() + 60
    tracemalloc.start()
    while sum(sizes.values()) < sum(map(len, logs)):
        assert time.monotonic() < end, sizes
        for piece in stream.read(backend):
            name, at = piece.source.name, sizes[piece.source.name]
            assert piece.data == logs[int(name[5:])][at : at + len(piece.data)]
            sizes[name] += len(piece.data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    backend.close()
    assert peak < 50 * (256 << 10) + (8 << 20)  # what may wait of each, and the server's own


@pytest.mark.parametrize("kept", [True, False], ids=["live log kept", "log store only"])
def test_the_log_of_a_job_that_is_over_is_whole(workspace: Service, tmp_path: Path, kept: bool) -> None:
    workspace.keeps_live_logs = kept
    logs = [text(0, 2500), b"", b"a\n\nb\n", text(3, 1)]
    run, _ = been(workspace, tmp_path, logs)
    assert read_all(run) == {f"node-{n}": log for n, log in enumerate(logs) if log}


def test_cut_connections_lose_nothing_and_repeat_nothing(workspace: Service, tmp_path: Path) -> None:
    workspace.keeps_live_logs = True
    logs = [text(0, 200)]
    run, _ = been(workspace, tmp_path, logs)
    workspace.faults = [Fault("GET log", "cut", 2), Fault("GET log", 503, 1), Fault("GET log", "reset", 1)]
    assert read_all(run) == {"node-0": logs[0]}


def test_what_the_live_log_no_longer_has_comes_from_the_store(workspace: Service, tmp_path: Path) -> None:
    run, job = been(workspace, tmp_path, [text(0, 100)], "Running")
    backend, stream = client(run), LogStream(run)
    stream.look(backend)
    got = b"".join(piece.data for piece in stream.read(backend))
    assert text(0, 100).startswith(got) and got
    job.replicas[0].output.write_bytes(text(0, 3000))  # written while nobody could stream
    job.state = "Completed"
    backend._logs_of().over.add(job.id)
    end = time.monotonic() + 30
    while len(got) < len(text(0, 3000)):
        assert time.monotonic() < end, len(got)
        got += b"".join(piece.data for piece in stream.read(backend))
    assert got == text(0, 3000)
    backend.close()


def test_lines_of_one_moment_keep_their_order(workspace: Service, tmp_path: Path) -> None:
    run, job = been(workspace, tmp_path, [b"a\nb\nc\n"])  # the stand-in gives three lines a moment
    api, key = client(run)._api, (job.id, job.replicas[0].id)
    for forward in (True, False):
        lines = api.stored_log(*key, start=1, end=10**19, limit=10, forward=forward)
        assert [line.text for line in lines] == ["a", "b", "c"] and len({line.when for line in lines}) == 1


def test_the_last_lines_can_be_asked_for(workspace: Service, tmp_path: Path) -> None:
    run, _ = been(workspace, tmp_path, [text(0, 1500), text(1, 2)])
    backend = client(run)
    sources = backend.log_sources(run)
    start = tail_starts(backend, sources, 3)
    stream = LogStream(run, start=start)
    stream.look(backend)
    got = {piece.source.name: piece.data.decode() for piece in stream.read(backend)}
    assert got == {"node-0": "".join(LINE.format(0, n) for n in (1497, 1498, 1499)), "node-1": text(1, 2).decode()}
    backend.close()


def test_a_token_that_is_taken_back_is_said(workspace: Service, tmp_path: Path) -> None:
    run, _ = been(workspace, tmp_path, [b"x\n"])
    backend = client(run)
    sources = backend.log_sources(run)
    workspace.faults = [Fault("GET log", 401, 100)]
    with pytest.raises(Exception, match="the Lepton workspace space does not take the token"):
        backend.read_logs(dict.fromkeys(sources, 0))
    backend.close()
