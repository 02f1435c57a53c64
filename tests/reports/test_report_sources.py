"""What is read of runs: through their host, only what is new, whatever becomes of the files meanwhile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Unreachable
from nemotron_launch.hosts.here import Here
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.reports.sources import (
    RunFiles,
    config_of,
    find_files,
    forget_copies,
    missing,
    open_folder,
    update,
)
from tests.jobs.rows import row


class Far(Here):
    """This machine under another name, as a remote host is known; counts what is asked of it."""

    name = "me@far"

    def __init__(self) -> None:
        self.asked: list[dict[str, int]] = []
        self.down = False

    def read(self, wanted: Mapping[str, int], *, limit: int = 1 << 20) -> dict[str, bytes]:
        if self.down:
            raise Unreachable("me@far does not answer")
        self.asked.append(dict(wanted))
        return super().read(wanted, limit=limit)


def write(folder: Path, *steps: int, mode: str = "a") -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps({"step": step, "time": 1e9 + step, "loss": 1 / step}) + "\n" for step in steps)


def quiet(text: str) -> None:
    raise AssertionError(text)


def remote(folder: Path, host: Far, state: Path) -> RunFiles:
    run = row("r", output_dir=str(folder), state="running")
    return RunFiles("r", str(folder), host, run=run, cache=state / "reports" / "r")


def steps(one: RunFiles) -> list[int]:
    return list(one.metrics().steps("loss"))


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    folder, host = tmp_path / "out", Far()
    write(folder, *range(1, 101))
    one = remote(folder, host, tmp_path)
    update([one], quiet)
    size = (folder / "metrics.jsonl").stat().st_size
    write(folder, 101, 102)
    update([one], quiet)
    assert steps(one) == list(range(1, 103))
    offsets = [asked[one.path("metrics.jsonl")] for asked in host.asked if one.path("metrics.jsonl") in asked]
    assert offsets[0] == 0
    assert min(offsets[1:]) == size - 64, "the last bytes again, to know the file by"


def test_metrics_of_another_machine_are_kept_for_the_next_command(tmp_path: Path) -> None:
    folder, state = tmp_path / "out", tmp_path / "state"
    write(folder, *range(1, 51))
    update([remote(folder, Far(), state)], quiet)
    write(folder, *range(51, 61))
    host = Far()
    again = remote(folder, host, state)
    assert steps(again) == list(range(1, 51)), "before anything is asked"
    update([again], quiet)
    assert steps(again) == list(range(1, 61))
    assert (state / "reports/r/metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert all(asked.get(again.path("metrics.jsonl"), 1) > 0 for asked in host.asked)
    forget_copies(state, ["r"])
    assert not (state / "reports/r").exists()


@pytest.mark.parametrize("later", [(), (31, 32), tuple(range(31, 200))], ids=["shorter", "a little", "longer"])
def test_a_file_that_a_restart_cut_back_is_read_anew(tmp_path: Path, later: tuple[int, ...]) -> None:
    """Also where it has outgrown the length that was known: its last bytes are others."""
    folder, host = tmp_path / "out", Far()
    write(folder, *range(1, 101))
    one = remote(folder, host, tmp_path)
    update([one], quiet)
    write(folder, *range(1, 31), *later, mode="w")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 500, "loss": 7.0}\n')
    update([one], quiet)
    assert steps(one) == [*range(1, 31), *later, 500]
    assert (tmp_path / "reports/r/metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_host_that_is_away_is_a_warning_and_what_was_read_stays(tmp_path: Path) -> None:
    folder, host = tmp_path / "out", Far()
    write(folder, 1, 2)
    one = remote(folder, host, tmp_path)
    update([one], quiet)
    host.down = True
    said: list[str] = []
    update([one], said.append)
    assert said == ["me@far does not answer: what is shown of r may be old"]
    assert steps(one) == [1, 2]


def test_configs_and_the_ends_of_samples_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, 1)
    (folder / "config.yaml").write_text("dpo: {max_num_steps: 5}\n")
    (folder / "samples.jsonl").write_text('{"step": 1, "answer": "a"}\nnot json\n[1]\n{"step": 2, "answer": "b"}\n')
    one = open_folder(folder)
    update([one], quiet)
    assert config_of(one) == {"dpo": {"max_num_steps": 5}}
    assert [sample["answer"] for sample in one.samples] == ["a", "b"]


def test_the_end_of_long_samples_begins_with_a_whole_line(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, 1)
    lines = [json.dumps({"step": step, "answer": "x" * 1000}) for step in range(3000)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    one = open_folder(folder)
    update([one], quiet)
    found = [sample["step"] for sample in one.samples]
    assert 500 < len(found) < 1100
    assert found == list(range(3000 - len(found), 3000))


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b", "\0", "a: " + "[" * 5000, "!!python/object:os.system {}"])
def test_a_config_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1)
    (tmp_path / "config.yaml").write_text(text)
    one = open_folder(tmp_path)
    update([one], quiet)
    assert config_of(one) == {}


def test_a_removed_run_is_one_clear_message(tmp_path: Path) -> None:
    run = row("gone", output_dir=str(tmp_path / "away"), state="finished")
    one = RunFiles("gone", run.output_dir, Here(), run=run)
    update([one], quiet)
    error = missing(one)
    assert error and str(error).startswith(f"error: {tmp_path}/away: the output of gone is gone\n")
    waiting = row("new", output_dir=str(tmp_path / "away"), state="pending")
    one = RunFiles("new", waiting.output_dir, Here(), run=waiting)
    update([one], quiet)
    assert "new is pending and has no metrics yet" in str(missing(one))


def test_a_finished_run_of_a_step_without_metrics_has_its_own_config(tmp_path: Path) -> None:
    run = row("prepared", output_dir=str(tmp_path / "out"), state_dir=str(tmp_path / "run"), state="finished")
    for folder, target in (("run", "dpo"), ("out", "of an earlier run")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text(f"target: {target}\n")
    one = RunFiles("prepared", run.output_dir, Here(), run=run)
    update([one], quiet)
    assert missing(one) is None
    assert config_of(one) == {"target": "dpo"}


def test_names_are_runs_or_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "folder", 1)
    write(tmp_path / "other", 1)
    with Ledger(tmp_path / "state") as ledger, Backends() as backends:
        ledger.add([row("a-run", tmp_path, state="finished", output_dir=str(tmp_path / "other"))])
        names = ["a-run", "folder", "./folder", "./folder/metrics.jsonl", str(tmp_path / "folder"), "a-r"]
        found = find_files(backends, ledger, names, quiet)
        assert [one.name for one in found] == ["a-run", "folder"]
        for name, message in {
            "nothing": "there is no run 'nothing'",
            "./nothing": "there is no such folder",
            str(tmp_path): "holds no metrics.jsonl",
        }.items():
            with pytest.raises(UserError, match=message):
                find_files(backends, ledger, [name], quiet)
