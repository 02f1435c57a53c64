"""Following: to the run's end and with its exit code, through lost connections, until somebody says otherwise."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from nemotron_launch.backends.live import LogSource, Refused, Seen, Submission
from nemotron_launch.backends.local_client import LocalClient
from nemotron_launch.hosts import Unreachable, Upload
from nemotron_launch.jobs.follow import Answer, Detached, follow
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.log_stream import Piece
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends, settle
from nemotron_launch.jobs.status import Known, exit_code, look
from nemotron_launch.jobs.submission import submit
from tests.jobs.rows import row


class Watcher:
    """Remembers what it is told."""

    def __init__(self, answer: Callable[[], Answer | None] = lambda: None) -> None:
        self.answer = answer
        self.text = b""
        self.states: list[str] = []
        self.notices: list[str] = []
        self.end = time.monotonic() + 60

    def lines(self, piece: Piece) -> None:
        self.text += piece.data if piece.source.name != "job" else b""

    def state(self, known: Known) -> None:
        self.states.append(known.run.state)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def interrupted(self) -> Answer | None:
        return self.answer()

    def sleep(self, seconds: float) -> None:
        assert time.monotonic() < self.end, f"still following: {self.states} {self.notices}"
        time.sleep(min(seconds, 0.1))


class Cut(LocalClient):
    """This machine over a connection that every third call finds cut, or that is away for good."""

    def __init__(self, away: bool = False) -> None:
        super().__init__()
        self.calls, self.away = 0, away

    def _call(self) -> None:
        self.calls += 1
        if self.away or self.calls % 3 == 0:
            raise Unreachable("cluster ended the connection", exit_code=1)

    def poll(self, runs: Sequence[Run]) -> dict[str, Seen]:
        self._call()
        return super().poll(runs)

    def log_sources(self, run: Run) -> list[LogSource]:
        self._call()
        return super().log_sources(run)

    def read_logs(self, wanted: Mapping[LogSource, int]) -> dict[LogSource, bytes]:
        self._call()
        return super().read_logs(wanted)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "state") as opened:
        yield opened


def started(ledger: Ledger, folder: Path, script: str, name: str = "a-run", **fields: object) -> Run:
    return submit(ledger, row(name, folder, **fields), [Upload("run.sh", script.encode())])[0]


def test_logs_come_whole_and_the_exit_code_is_the_run_s_own(ledger: Ledger, tmp_path: Path) -> None:
    run = started(ledger, tmp_path, "for i in 1 2 3; do echo line $i; sleep 0.3; done; printf end; exit 7")
    watcher = Watcher()
    ended = follow(ledger, LocalClient(), [run], watcher)
    assert (watcher.text, exit_code(ended), ended[0].state) == (b"line 1\nline 2\nline 3\nend\n", 7, "failed")
    assert watcher.states[-1] == "failed" and ledger.get("a-run") == ended[0]


def test_what_a_restart_writes_follows_what_the_attempt_before_it_wrote(ledger: Ledger, tmp_path: Path) -> None:
    script = 'n=${NEMOTRON_LOG_DIR##*-}; for i in $(seq 500); do echo "$n $i"; done; ((n == 2)) || exit 85'
    run = started(ledger, tmp_path, script, max_restarts=2)
    watcher = Watcher()
    ended = follow(ledger, LocalClient(), [run], watcher)
    assert exit_code(ended) == 0 and ended[0].attempt == 2
    assert watcher.text.decode() == "".join(f"{n} {i}\n" for n in range(3) for i in range(1, 501))


def test_a_connection_that_is_cut_costs_no_line(ledger: Ledger, tmp_path: Path) -> None:
    run = started(ledger, tmp_path, "for i in $(seq 20); do echo $i; sleep 0.1; done")
    watcher = Watcher()
    assert exit_code(follow(ledger, Cut(), [run], watcher)) == 0
    assert watcher.text.decode().split() == [str(i) for i in range(1, 21)]
    assert "cluster ended the connection; the runs go on, trying again" in watcher.notices
    assert "the connection is back" in watcher.notices


def test_a_connection_that_stays_away_ends_with_how_to_attach(ledger: Ledger, tmp_path: Path) -> None:
    run = started(ledger, tmp_path, "true")
    with pytest.raises(Detached) as error:
        follow(ledger, Cut(away=True), [run], Watcher(), patience=0.5)
    assert error.value.exit_code == 1 and "nemotron jobs attach a-run" in str(error.value)


def test_to_detach_leaves_the_run_alone_and_to_cancel_ends_it(ledger: Ledger, tmp_path: Path) -> None:
    run = started(ledger, tmp_path, "exec sleep 60")
    answers: list[Answer] = ["continue", "detach", "cancel"]
    with pytest.raises(Detached) as error:
        follow(ledger, LocalClient(), [run], Watcher(lambda: answers.pop(0)))
    assert error.value.exit_code == 130
    ended = follow(ledger, LocalClient(), [run], Watcher(lambda: answers.pop(0) if answers else None))
    assert (ended[0].state, exit_code(ended)) == ("cancelled", 130)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([("finished", 0)], 0), ([("failed", 9)], 9), ([("failed", None)], 1), ([("failed", 137)], 137),
        ([("stopped", 85)], 85), ([("stopped", None)], 85), ([("cancelled", 85)], 130), ([("lost", None)], 1),
        ([("refused", None)], 1), ([("finished", 0), ("failed", 3), ("failed", 4)], 3),
    ],
)  # fmt: skip
def test_how_a_run_ended_is_the_command_s_exit_code(ends: list[tuple[str, int | None]], code: int) -> None:
    assert exit_code([row(state=state, exit_code=own) for state, own in ends]) == code


# What must happen once, however many processes see that it is wanted.


class Preempted(LocalClient):
    """An executor whose site cancels what it preempts."""

    def __init__(self, log: Path, refuses: bool = False) -> None:
        super().__init__()
        self.log, self.refuses = log, refuses

    def poll(self, runs: Sequence[Run]) -> dict[str, Seen]:
        return {run.run_id: Seen("pending", "preempted", wants_successor=run.job_id == "1") for run in runs}

    def submit_successor(self, run: Run) -> Submission:
        if self.refuses:
            raise Refused("has had its 3 restarts")
        with self.log.open("a") as file:
            file.write("successor\n")
        time.sleep(0.1)
        return Submission("2")

    def find(self, run: Run) -> Submission | None:
        with self.log.open("a") as file:
            file.write("found\n")
        time.sleep(0.1)
        return Submission("1")


def _at_once(work: Callable[[], None]) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 6


def test_a_successor_is_submitted_once_by_many_processes(tmp_path: Path) -> None:
    run = row(state="running", job_id="1")
    with Ledger(tmp_path) as ledger:
        ledger.add([run])

    def poll() -> None:
        with Ledger(tmp_path) as ledger:
            look(ledger, Preempted(tmp_path / "log"), [run])

    _at_once(poll)
    assert (tmp_path / "log").read_text() == "successor\n"
    with Ledger(tmp_path) as ledger:
        [now] = ledger.runs()
        assert (now.job_id, now.state) == ("2", "pending")


def test_a_successor_that_is_refused_stops_the_run(tmp_path: Path) -> None:
    run = row(state="running", job_id="1")
    with Ledger(tmp_path) as ledger:
        ledger.add([run])
        [known] = look(ledger, Preempted(tmp_path / "log", refuses=True), [run])
        assert (known.run.state, known.run.reason) == ("stopped", "has had its 3 restarts")


def test_a_run_without_its_client_is_settled_once_by_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backends, "of", lambda self, run: Preempted(tmp_path / "log"))
    with Ledger(tmp_path) as ledger:
        ledger.add([row(submitter="")])

    def command() -> None:
        with Ledger(tmp_path) as ledger, Backends() as backends:
            settle(ledger, backends, print)

    _at_once(command)
    assert (tmp_path / "log").read_text() == "found\n"
