"""The ledger: found again as written, by many processes at once, and said in one message when it cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.jobs import ledger as ledgers
from nemotron_launch.jobs.ledger import FILE, Ledger, RunExists
from nemotron_launch.jobs.process import alive, identity
from tests.jobs.rows import row


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "state") as opened:
        yield opened


def test_it_lies_where_the_environment_says_or_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for said, folder in (("~/there", "/home/me/there"), ("/a/../b", "/b"), ("", "/home/me/.local/share/nemotron")):
        monkeypatch.setenv("NEMOTRON_STATE_DIR", said)
        assert ledgers.state_folder() == Path(folder)
    monkeypatch.setenv("NEMOTRON_STATE_DIR", "~nobody-of-this-name/x")
    with pytest.raises(UserError, match="there is no home folder"):
        ledgers.state_folder()


def test_folder_and_file_are_the_user_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Ledger(tmp_path / "state").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / FILE).stat().st_mode) == 0o600


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / FILE).touch(mode=0o644)
    Ledger(tmp_path).close()
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("local", [True, False])
def test_the_journal_is_shared_memory_on_a_local_file_system_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    Ledger(tmp_path).close()  # as it was on a file system of the other kind
    monkeypatch.setattr(ledgers, "on_local_file_system", lambda folder: local)
    Ledger(tmp_path).close()
    (mode,) = sqlite3.connect(tmp_path / FILE).execute("PRAGMA journal_mode").fetchone()
    assert mode == ("wal" if local else "delete")


def test_proc_is_no_file_system_for_shared_memory() -> None:
    assert not ledgers.on_local_file_system(Path("/proc"))


@settings(max_examples=30, deadline=None)
@given(
    st.text(st.characters(exclude_categories=[])),
    st.lists(st.text()),
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text()),
)
def test_any_text_comes_back_as_it_was(text: str, many: list[str], mapping: dict[str, object]) -> None:
    import tempfile

    run = row(profile=text, reason=text, overrides=tuple(many), options=mapping, contact=mapping, output_dir=text)
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder)) as ledger:
        ledger.add([run])
        assert ledger.get("a-run") == run


def test_paths_that_are_not_utf_8_come_back_too(ledger: Ledger) -> None:
    run = row(output_dir=os.fsdecode(b"/caf\xe9"))
    ledger.add([run])
    assert ledger.get("a-run") == run


def test_an_id_is_taken_once_by_a_run_or_a_sweep(ledger: Ledger) -> None:
    ledger.add([row("one"), row("many.0", sweep="many", point=0)])
    for name in ("one", "many"):
        with pytest.raises(RunExists, match=f"there is a run {name} already"):
            ledger.add([row("new"), row(name)])
    with pytest.raises(RunExists):
        ledger.add([row("one.0", sweep="one", point=0)])
    assert ledger.get("new") is None


def test_what_fails_beside_a_row_leaves_no_row(ledger: Ledger) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space left"):
        ledger.add([row()], before=fail)
    assert ledger.get("a-run") is None


def test_a_row_changes_only_for_those_who_know_it_as_it_is(ledger: Ledger) -> None:
    run = row()
    ledger.add([run])
    pending = ledger.change(run, state="pending", job_id="7")
    assert pending == replace(run, state="pending", job_id="7")
    assert ledger.change(run, state="refused") is None
    assert ledger.get("a-run") == pending


def test_runs_are_found_by_id_unique_start_and_as_the_last(ledger: Ledger) -> None:
    ledger.add([row("alpha-1", created=1.0), row("alpha-2", created=2.0), row("beta", created=3.0)])
    ledger.add([row(f"sweep.{n}", sweep="sweep", point=n, created=4.0) for n in (1, 0, 10)])
    assert [run.run_id for run in ledger.find("alpha-1")] == ["alpha-1"]
    assert [run.run_id for run in ledger.find("b")] == ["beta"]
    points = ["sweep.0", "sweep.1", "sweep.10"]
    assert [run.run_id for run in ledger.find("sw")] == [run.run_id for run in ledger.find("last")] == points
    assert [run.run_id for run in ledger.find("sweep.1")] == ["sweep.1"]
    assert ledger.names("s")[0] == "sweep"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpha", "error: alpha is the start of 2 run ids\n       alpha-2\n       alpha-1"),
        ("alpha-3", "error: there is no run 'alpha-3'\n       did you mean alpha-2?"),
        ("zzz", "error: there is no run 'zzz'\n       nemotron jobs list shows the runs"),
        ("", "error: there is no run ''"),
        ("%", "error: there is no run '%'"),
        ("\udc80'; DROP TABLE runs; --", "error: there is no run "),
    ],
)
def test_a_name_that_is_none_or_several_is_one_message(ledger: Ledger, name: str, message: str) -> None:
    ledger.add([row("alpha-1", created=1.0), row("alpha-2", created=2.0)])
    with pytest.raises(UserError) as error:
        ledger.find(name)
    assert str(error.value).startswith(message)


def test_an_empty_ledger_says_how_to_fill_it(ledger: Ledger) -> None:
    with pytest.raises(UserError, match="there are no runs yet"):
        ledger.find("last")


def test_runs_are_filtered_newest_first(ledger: Ledger) -> None:
    ledger.add([row(f"r{n}", created=float(n), state="failed" if n % 2 else "running") for n in range(6)])
    assert [run.run_id for run in ledger.runs(states={"failed"}, limit=2)] == ["r5", "r3"]
    assert [run.run_id for run in ledger.runs(where=lambda run: run.created < 2)] == ["r1", "r0"]


def _use(folder: Path, process: int) -> None:
    for number in range(20):
        with Ledger(folder) as ledger:
            run = row(f"r-{process}-{number}")
            ledger.add([run])
            assert ledger.change(run, state="pending")


@pytest.mark.parametrize("local", [True, False])
def test_many_processes_make_and_use_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    monkeypatch.setattr(ledgers, "on_local_file_system", lambda folder: local)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_use, args=(tmp_path / "state", process)) for process in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=100)
    assert [worker.exitcode for worker in workers] == [0] * 6
    with Ledger(tmp_path / "state") as ledger:
        assert len(ledger.runs(states={"pending"})) == 120


def test_a_lock_has_one_holder_until_it_is_dead(ledger: Ledger) -> None:
    def lives(holder: str) -> bool:
        return holder == "living"

    with ledger.lock("it", "living", lives) as first:
        assert first
        with ledger.lock("it", "other", lives) as second:
            assert not second
    with ledger.lock("it", "dead", lives), ledger.lock("it", "other", lives) as second:
        assert second


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a database, for sure, not at all" * 40, "file is not a database\n       the ledger of runs is damaged"),
        (None, "was written by a newer nemotron\n       update nemotron"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_message(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / FILE
    if content:
        file.write_bytes(content)
    else:
        Ledger(tmp_path).close()
        with sqlite3.connect(file) as db:
            db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError) as error:
        Ledger(tmp_path)
    assert f"{file}: {message}" in str(error.value) or message in str(error.value)
    assert error.value.exit_code == 1


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used: (not a directory|file exists)"):
        Ledger(tmp_path / "file" / "state")


def test_a_process_is_known_by_more_than_its_number() -> None:
    me = identity()
    assert alive(me) is True
    host, pid, _ = me.rsplit(":", 2)
    assert alive(f"{host}:{pid}:1-other") is False
    assert alive(f"elsewhere:{pid}:1") is None
    assert alive("") is False
    child = os.fork()
    if not child:
        signal.pause()
    name = identity(child)
    assert alive(name) is True
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert alive(name) is False  # a zombie
    os.waitpid(child, 0)
