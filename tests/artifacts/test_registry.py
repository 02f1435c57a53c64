"""What runs made, in the ledger: names and versions, whoever registers, from ledgers of every age."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.artifacts import record, registry
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import Host, open_host
from nemotron_launch.jobs import ledger as ledgers
from nemotron_launch.jobs.ledger import FILE, Ledger
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.jobs.submission import _check_named
from nemotron_launch.plan import config_text
from tests.artifacts.made import composed, finished, ledger
from tests.jobs.rows import row
from tests.sshd import Sshd, missing, running

__all__ = ["ledger"]


def labels(ledger: Ledger) -> list[str]:
    return [one.label for one in registry.entries(ledger)]


def test_versions_count_what_a_name_was_given_to(ledger: Ledger) -> None:
    finished(ledger, run_id="sft-1", loss=0.3, ago=300)
    finished(ledger, run_id="sft-2", loss=0.2, ago=200)
    finished(ledger, "sft/megatron", "run.artifact_name=other", "output_dir=elsewhere", run_id="sft-3", ago=100)
    assert sorted(labels(ledger)) == ["other@1", "sft-tiny@1", "sft-tiny@2"]
    made = registry.of_run(ledger, "sft-2")
    assert made and (made.label, made.step, made.config) == ("sft-tiny@2", "sft/megatron", "tiny")
    assert registry.find(ledger, "sft-tiny").label == registry.find(ledger, "sft-tiny@latest").label == "sft-tiny@2"
    assert registry.find(ledger, "sft-tiny@1").run_id == "sft-1"


def test_a_run_that_found_that_it_had_finished_shares_what_was_made(ledger: Ledger) -> None:
    finished(ledger, run_id="sft-1", ago=300)
    finished(ledger, run_id="sft-2", ago=100)
    assert labels(ledger) == ["sft-tiny@1"]
    shared = registry.of_run(ledger, "sft-2")
    assert shared and shared.run_id == "sft-1"


def test_a_run_whose_folder_a_later_one_has_taken_made_nothing_that_is_left(ledger: Ledger) -> None:
    early = finished(ledger, run_id="sft-1", ago=3600, register=False)
    late = finished(ledger, "sft/megatron", "sft.seed=7", run_id="sft-2", loss=0.2, register=False)
    registry.register(ledger, open_host({}), [early, late])
    assert registry.of_run(ledger, "sft-1") is None
    made = registry.of_run(ledger, "sft-2")
    assert made and made.label == "sft-tiny@1"


def test_a_run_that_nobody_saw_finish_is_registered_by_who_asks_next(ledger: Ledger) -> None:
    finished(ledger, run_id="sft-1", register=False)
    assert labels(ledger) == []
    with Backends() as backends:
        registry.register_finished(ledger, backends, pytest.fail)
    assert labels(ledger) == ["sft-tiny@1"]


class Counting:
    """This machine, with its calls counted; at most `limit` files are there."""

    def __init__(self) -> None:
        self.here, self.calls = open_host({}), 0

    def read(self, wanted: Mapping[str, int], *, limit: int = 1 << 20) -> dict[str, bytes]:
        self.calls += 1
        return self.here.read(wanted, limit=limit)


def test_many_runs_are_read_in_few_calls(ledger: Ledger) -> None:
    first = finished(ledger, run_id="sft-1", register=False)
    runs = [replace(first, run_id=f"run-{n}") for n in range(400)]
    ledger.add(runs)
    host: Any = Counting()
    registry.register(ledger, host, runs)
    assert host.calls == 2
    assert len(registry.labels(ledger)) == 400 and labels(ledger) == ["sft-tiny@1"]


def test_a_record_on_its_way_through_a_file_system_is_waited_for_and_then_no_more(ledger: Ledger) -> None:
    now = time.time()
    runs = [
        row("late", Path.cwd(), state="finished", ended=now - 5),
        row("never", Path.cwd(), state="finished", ended=now - 500),
    ]
    ledger.add(runs)
    registry.register(ledger, open_host({}), runs)
    assert [run_id for (run_id,) in ledger.query("SELECT run_id FROM registered")] == ["never"]


def test_a_run_of_another_machine_is_left_to_that_machine(ledger: Ledger) -> None:
    run = row("theirs", Path.cwd(), state="finished", ended=1.0, host="another-machine")
    ledger.add([run])
    registry.register(ledger, open_host({}), [run])
    assert ledger.query("SELECT * FROM registered") == []


def test_a_record_that_is_none_is_a_warning_once(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1", register=False)
    Path(run.output_dir, record.FILE).write_text("{}")
    said: list[str] = []
    with Backends() as backends:
        registry.register_finished(ledger, backends, said.append)
        registry.register_finished(ledger, backends, said.append)
    assert len(said) == 1 and "is not a record of artifacts: what sft-1 made is not known" in said[0]


def test_a_host_out_of_reach_leaves_its_runs_for_later(ledger: Ledger) -> None:
    contact = {"type": "ssh", "host": "127.0.0.1", "port": 1, "user": "nobody", "client": "paramiko"}
    ledger.add([row("far", executor="slurm", contact=contact, host="far", state="finished", ended=1.0)])
    said: list[str] = []
    with Backends() as backends:
        registry.register_finished(ledger, backends, said.append)
    assert len(said) == 1 and said[0].endswith("what far made is not registered yet")
    assert ledger.query("SELECT * FROM registered") == []


def test_without_a_folder_to_read_a_run_is_known_by_its_job(ledger: Ledger) -> None:
    _, config = composed("sft/megatron")
    kept = ledger.folder / "runs" / "cloud"
    kept.mkdir(parents=True)
    (kept / "config.yaml").write_text(config_text(config))
    run = row(
        "cloud", step="sft/megatron", executor="lepton", workdir="/mnt/shared", output_dir="/mnt/shared/output",
        state="finished", ended=time.time(), artifact="cloudy",
    )  # fmt: skip
    ledger.add([run])
    no_host: Host | None = None
    registry.register(ledger, no_host, [run])
    made = registry.find(ledger, "cloudy@1").record.artifacts[0]
    assert made.place == "/mnt/shared/output/rl/sft-tiny/checkpoints"
    assert made.tokens and made.tokens.name == "bytes"


def test_forgotten_runs_leave_what_they_made(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    ledger.remove([run.run_id])
    assert labels(ledger) == ["sft-tiny@1"] and registry.find_any(ledger, "sft-1").label == "sft-tiny@1"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("sft-tin@1", "there is no artifact sft-tin", "did you mean sft-tiny?"),
        ("sft-tiny@9", "sft-tiny has no version 9", "there are: 1"),
        ("sft-tiny@new", "a version of sft-tiny is a number, not 'new'", "sft-tiny@latest"),
        ("xyz", "there is no artifact and no run 'xyz'", "nemotron artifacts list"),
        ("sft-tinny", "there is no artifact and no run 'sft-tinny'", "did you mean sft-tiny?"),
        ("going", "going is running: it has made nothing yet", "jobs status going"),
    ],
)
def test_a_name_that_means_nothing_is_one_message(ledger: Ledger, text: str, message: str, hint: str) -> None:
    finished(ledger, run_id="sft-1")
    ledger.add([row("going", state="running", created=1.0)])
    with pytest.raises(UserError) as raised:
        registry.find_any(ledger, text)
    assert message in raised.value.message and hint in (raised.value.hint or "")


# Ledgers of other ages ---------------------------------------------------------------------------------------------


def old_ledger(folder: Path) -> Path:
    """A ledger as the first version made it, with a run in it."""
    folder.mkdir()
    with sqlite3.connect(folder / FILE) as db:
        for statement in ledgers._SCHEMAS[0].split(";"):
            db.execute(statement)
        db.execute("PRAGMA user_version = 1")
        old = dict(vars(row("old", state="finished", ended=1.0)))
        for key in ("artifact", "uses", "code", "pipeline", "stage"):  # which came later
            old.pop(key, None)
        db.execute(ledgers._INSERT, (json.dumps(old), "finished", "", None, 1.0, "old"))
    return folder


def test_an_older_ledger_learns_of_artifacts_and_keeps_its_runs(tmp_path: Path) -> None:
    with Ledger(old_ledger(tmp_path / "state")) as ledger:
        run = ledger.get("old")
        assert run and (run.artifact, run.uses, dict(run.code)) == ("", (), {})
        assert registry.entries(ledger) == []
        assert ledger.query("PRAGMA user_version") == [(2,)]


def _open(folder: Path, barrier: Any, said: Any) -> None:
    barrier.wait(30)
    try:
        with Ledger(folder) as ledger:
            said.put(registry.entries(ledger) or [run.run_id for run in ledger.runs()])
    except BaseException as error:
        said.put(repr(error))


def test_processes_that_open_an_older_ledger_at_once_all_can(tmp_path: Path) -> None:
    folder, context = old_ledger(tmp_path / "state"), multiprocessing.get_context("fork")
    barrier, said = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_open, args=(folder, barrier, said)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [said.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert answers == [["old"]] * 4


def test_a_newer_ledger_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "state").close()
    with sqlite3.connect(tmp_path / "state" / FILE) as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(UserError, match="was written by a newer nemotron"):
        Ledger(tmp_path / "state")


def _register(folder: Path, runs: list[Run], barrier: Any, said: Any) -> None:
    barrier.wait(30)
    try:
        with Ledger(folder) as ledger:
            registry.register(ledger, open_host({}), runs)
        said.put("")
    except BaseException as error:
        said.put(repr(error))


def test_processes_that_register_the_same_runs_give_each_one_version(ledger: Ledger) -> None:
    runs = [
        finished(ledger, "sft/megatron", f"output_dir=there/{n}/sft", run_id=f"sft-{n}", loss=0.1 * n, register=False)
        for n in range(5)
    ]
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_register, args=(ledger.folder, runs, barrier, said)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [said.get(timeout=60) for _ in processes] == ["", "", ""]
    for process in processes:
        process.join(60)
    assert sorted(labels(ledger)) == [f"sft@{n}" for n in range(1, 6)]


def test_a_thousand_runs_are_listed_in_a_moment(ledger: Ledger) -> None:
    first = finished(ledger, run_id="sft-0")
    entry = registry.of_run(ledger, "sft-0")
    assert entry
    runs = [replace(first, run_id=f"sft-{n}", created=float(n)) for n in range(1, 1000)]
    ledger.add(runs)
    registry._enter(ledger, [(run, replace(entry.record, digest=f"d{n}")) for n, run in enumerate(runs)])
    began = time.perf_counter()
    assert len(registry.entries(ledger)) == 1000
    assert time.perf_counter() - began < 2  # 0.1 s on a quiet core


# Over SSH ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if reason := missing():
        pytest.fail(reason)
    yield from running(tmp_path_factory.mktemp("sshd"))


def test_runs_of_a_cluster_are_registered_through_its_host_and_looked_for_there(
    ledger: Ledger, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in sshd.environment.items():
        monkeypatch.setenv(name, value)
    local = finished(ledger, run_id="sft-0", register=False)
    ledger.remove(["sft-0"])
    there = {"executor": "slurm", "contact": sshd.tunnel, "host": "cluster", "profile": "site"}
    ledger.add([replace(local, run_id="sft-1", **there), row("none", state="finished", ended=1.0, **there)])
    with Backends() as backends:
        registry.register_finished(ledger, backends, pytest.fail)
        entry = registry.find(ledger, "sft-tiny")
        assert (entry.run_id, entry.executor, entry.host) == ("sft-1", "slurm", "cluster")
        assert registry.of_run(ledger, "none") is None
        place = entry.record.artifacts[0].place
        use = {"key": "k", "text": "run:sft-1", "name": "sft-tiny", "version": 1, "run_id": "sft-1", "place": place}
        host = backends.of(replace(local, **there)).host
        assert host
        _check_named(host, [row("next", uses=(use,))])
        shutil.rmtree(local.output_dir)
        with pytest.raises(UserError, match=f"sft-tiny@1 .run sft-1. is gone: there is no {place} on {host.name}"):
            _check_named(host, [row("next", uses=(use,))])
