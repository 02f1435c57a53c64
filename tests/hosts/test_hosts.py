"""What every host keeps, this machine and those over SSH, in each way to reach them."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Host, Unreachable, Upload
from nemotron_launch.hosts.shell import KEPT
from tests.hosts.conftest import LEAKS

HOSTILE = ["plain", "two words", "-rf", "new\nline", "quo'te\"s", "$HOME `id`", "*", "é ☃", "a\\b", ".hidden", "#mark"]


def test_a_command_s_output_errors_and_exit_code_come_back(host: Host) -> None:
    result = host.run("echo out; printf 'no newline'; echo err >&2; exit 7")
    assert (result.code, result.stdout, result.stderr) == (7, "out\nno newline", "err\n")


def test_one_command_leaves_nothing_to_the_next(host: Host) -> None:
    before = host.run("pwd; set").stdout
    host.run("cd /; x=1; set -e; trap 'echo trapped' EXIT; umask 0; exec 1>&2; exit 3", stdin=b"not read\n" * 99)
    host.run("if then")
    assert host.run("pwd").stdout == before.partition("\n")[0] + "\n"
    assert host.run('echo "${x-unset}"; umask').stdout.split()[0] == "unset"


@pytest.mark.parametrize(("script", "code"), [("true", 0), ("false", 1), ("sh -c 'kill -9 $$'", 137), ("no-such", 127)])
def test_exit_codes_are_the_shell_s(host: Host, script: str, code: int) -> None:
    assert host.run(script).code == code


def test_binary_input_arrives_whole(host: Host) -> None:
    data = random.Random(0).randbytes(3_000_000)
    assert host.run("sha256sum", stdin=data).stdout.split()[0] == hashlib.sha256(data).hexdigest()


def test_long_scripts_and_long_answers_pass_at_the_same_time(host: Host) -> None:
    # Longer than an argument may be (128 KiB), answered before it is read to its end.
    script = "cat\n" + "# filling\n" * 50_000 + "head -c 4000000 /dev/zero | tr '\\0' x"
    result = host.run(script, stdin=b"y" * 2_000_000)
    assert (result.code, len(result.stdout), set(result.stdout)) == (0, 6_000_000, {"x", "y"})


def test_undecodable_output_is_no_error(host: Host) -> None:
    assert host.run("printf '\\377\\0ok'").stdout == "\ufffd\0ok"


def test_commands_see_a_clean_environment(host: Host) -> None:
    seen = dict(line.partition("=")[::2] for line in host.run("env").stdout.splitlines())
    assert set(seen) <= {*KEPT, "PWD", "OLDPWD", "SHLVL", "_"}
    assert not set(seen) & set(LEAKS)
    assert {"PATH", "HOME", "SLURM_CONF"} <= set(seen)


def test_a_login_shell_brings_its_path_and_keeps_its_banner(host: Host, request: pytest.FixtureRequest) -> None:
    result = host.run("echo $SLURM_CONF")
    assert result.stderr == ""
    logged_in = request.node.callspec.id == "login"
    assert result.stdout == ("/opt/slurm/slurm.conf\n" if logged_in else "/etc/s.conf\n")
    assert ("/modules:" in host.run("echo $PATH").stdout) == logged_in


def test_a_command_that_takes_too_long_is_out_of_reach_and_the_next_one_works(host: Host) -> None:
    with pytest.raises(Unreachable, match=r"within 0\.3 s"):
        host.run("sleep 30", timeout=0.3)
    assert host.run("echo again").stdout == "again\n"


def test_files_are_placed_private_in_a_new_folder(host: Host, folder: Path) -> None:
    new = folder / "runs" / "run 1"
    host.put(
        str(new),
        [
            Upload("job.sbatch", b"#!/bin/bash\n", 0o755),
            Upload("secrets.env", b"A='b'\n"),
            Upload("point-1/logs/a b", b"\0\xff", 0o640),
            Upload("empty", b"", 0o600),
        ],
    )
    modes = {str(path.relative_to(new)): stat.S_IMODE(path.stat().st_mode) for path in sorted(new.rglob("*"))}
    assert modes == {
        "empty": 0o600, "job.sbatch": 0o755, "point-1": 0o700, "point-1/logs": 0o700, "point-1/logs/a b": 0o640,
        "secrets.env": 0o600,
    }  # fmt: skip
    assert stat.S_IMODE(new.stat().st_mode) == stat.S_IMODE(new.parent.stat().st_mode) == 0o700
    assert (new / "point-1/logs/a b").read_bytes() == b"\0\xff"
    assert (new / "job.sbatch").stat().st_mtime > 1e9


def test_placing_again_replaces_files_and_keeps_the_others(host: Host, folder: Path) -> None:
    (folder / "point-0").mkdir(mode=0o755)
    (folder / "point-0" / "kept").write_text("old")
    (folder / "point-0" / "config.yaml").write_text("old")
    folder.chmod(0o755)
    host.put(str(folder), [Upload("point-0/config.yaml", b"new"), Upload("point-1/x/config.yaml", b"new")])
    assert (folder / "point-0" / "kept").read_text() == "old"
    assert (folder / "point-0" / "config.yaml").read_text() == "new"
    assert (folder / "point-1" / "x" / "config.yaml").read_text() == "new"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert sorted(path.name for path in folder.iterdir()) == ["point-0", "point-1"]


def test_hostile_names_survive_every_way(host: Host, folder: Path, tmp_path: Path) -> None:
    host.put(str(folder), [Upload(f"{name}/{name}", name.encode(), 0o600) for name in HOSTILE])
    entries = host.entries(str(folder))
    assert entries is not None
    assert [entry.name for entry in entries] == sorted(HOSTILE)
    assert all(entry.is_dir for entry in entries)
    paths = {f"{folder}/{name}/{name}": 1 for name in HOSTILE}
    assert host.read(paths) == {f"{folder}/{name}/{name}": name.encode()[1:] for name in HOSTILE}
    host.fetch(str(folder), tmp_path / "got")
    assert {path.name: path.read_text() for path in (tmp_path / "got").rglob("*") if path.is_file()} == {
        name: name for name in HOSTILE
    }


@pytest.mark.parametrize("path", ["../x", "/etc/x", "", ".", "a/../../x", "a\0b"])
def test_no_upload_leaves_its_folder(host: Host, folder: Path, path: str) -> None:
    with pytest.raises(UserError, match="no path below"):
        host.put(str(folder), [Upload(path, b"x")])
    assert list(folder.iterdir()) == []


def test_a_zero_byte_is_refused_where_it_is_given(host: Host, tmp_path: Path) -> None:
    for call in (lambda: host.run("a\0b"), lambda: host.entries("a\0b"), lambda: host.read({"a\0b": 0})):
        with pytest.raises(UserError, match=r"zero byte|no path"):
            call()
    with pytest.raises(UserError, match="no path"):
        host.fetch("", tmp_path / "x")


def test_files_are_read_from_where_one_was(host: Host, folder: Path) -> None:
    (folder / "log").write_bytes(b"0123456789")
    (folder / "empty").touch()
    log, empty, none = f"{folder}/log", f"{folder}/empty", f"{folder}/none/log"
    assert host.read({log: 4, empty: 0, none: 0}) == {log: b"456789", empty: b""}
    assert host.read({log: 4}, limit=2) == {log: b"45"}
    assert host.read({log: 99}) == {log: b""}
    assert host.read({}) == {}
    with pytest.raises(UserError, match="cannot read"):
        host.read({str(folder): 0})


def test_many_files_are_read_in_one_go(host: Host, folder: Path) -> None:
    wanted = {}
    for number in range(100):
        (folder / f"node-{number}.log").write_bytes(b"x" * 70_000 + str(number).encode())
        wanted[f"{folder}/node-{number}.log"] = 70_000 - number
    assert host.read(wanted) == {
        f"{folder}/node-{n}.log": b"x" * n + str(n).encode() for n in range(100)
    }  # fmt: skip


def test_a_folder_s_entries_have_size_time_and_kind(host: Host, folder: Path) -> None:
    (folder / "file").write_bytes(b"12345")
    (folder / "sub").mkdir()
    (folder / "to-sub").symlink_to("sub")
    (folder / "nowhere").symlink_to("gone")
    os.utime(folder / "file", (1_700_000_000, 1_700_000_000.5))
    entries = {entry.name: entry for entry in host.entries(str(folder)) or []}
    assert set(entries) == {"file", "sub", "to-sub", "nowhere"}
    assert (entries["file"].size, entries["file"].mtime, entries["file"].is_dir) == (5, 1_700_000_000.5, False)
    assert [entries[name].is_dir for name in ("sub", "to-sub", "nowhere")] == [True, True, False]
    assert host.entries(f"{folder}/none") is None
    assert host.entries(f"{folder}/file/none") is None
    with pytest.raises(UserError, match="a file is in the way"):
        host.entries(f"{folder}/file")


def test_a_fetched_folder_is_the_same_folder(host: Host, folder: Path, tmp_path: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "void").mkdir()
    data = random.Random(1).randbytes(5_000_000)
    (folder / "deep" / "er" / "weights").write_bytes(data)
    (folder / "latest").symlink_to("deep")
    (folder / "away").symlink_to("/etc")
    (folder / "script").write_text("x")
    (folder / "script").chmod(0o755)
    os.link(folder / "script", folder / "twin")
    os.mkfifo(folder / "fifo")
    to = tmp_path / "got" / "here"
    for _ in range(2):  # and again over the first
        host.fetch(str(folder), to)
        assert (to / "deep" / "er" / "weights").read_bytes() == data
        assert os.readlink(to / "latest") == "deep"
        assert os.readlink(to / "away") == "/etc"
        assert (to / "void").is_dir()
        assert (to / "script").stat().st_mode & 0o777 == 0o755
        assert (to / "twin").read_text() == "x"
        assert sorted(path.name for path in to.iterdir()) == ["away", "deep", "latest", "script", "twin", "void"]


def test_nothing_is_fetched_through_a_link(host: Host, folder: Path, tmp_path: Path) -> None:
    outside, to = tmp_path / "outside", tmp_path / "got"
    outside.mkdir()
    (folder / "sub").symlink_to(outside)
    host.fetch(str(folder), to)
    (folder / "sub").unlink()
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("x")
    host.fetch(str(folder), to)
    assert list(outside.iterdir()) == []
    assert (to / "sub" / "file").read_text() == "x"


def test_a_file_is_fetched_under_the_name_that_is_given(host: Host, folder: Path, tmp_path: Path) -> None:
    (folder / "a").write_bytes(b"1" * 1000)
    host.fetch(f"{folder}/a", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"1" * 1000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b"]
    with pytest.raises(UserError, match="nothing is there"):
        host.fetch(f"{folder}/none", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_file_in_the_way_is_one_clear_error_and_nothing_is_left(host: Host, folder: Path) -> None:
    (folder / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write to .*file.*: a file is in the way of a folder"):
        host.put(f"{folder}/file/run", [Upload("a", b"1")])
    (folder / "sub" / "in-it").mkdir(parents=True)
    with pytest.raises(UserError, match="a folder is in the way of a file"):
        host.put(str(folder), [Upload("sub", b"1")])
    assert sorted(path.name for path in folder.iterdir()) == ["file", "sub"]


def test_a_closed_host_opens_again(host: Host) -> None:
    host.run("true")
    host.close()
    assert host.run("echo again").stdout == "again\n"


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(NAMES, st.binary(max_size=200), min_size=1, max_size=4), offset=st.integers(0, 100))
def test_whatever_is_put_is_read_and_fetched(host: Host, files: dict[str, bytes], offset: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = f"{name}/{next(iter(files))}"
        host.put(folder, [Upload(path, data) for path, data in files.items()])
        assert host.read({f"{folder}/{path}": offset for path in files}) == {
            f"{folder}/{path}": data[offset:] for path, data in files.items()
        }
        assert [entry.name for entry in host.entries(folder) or []] == sorted(files)
        host.fetch(folder, Path(name) / "fetched folder")
        assert {path.name: path.read_bytes() for path in (Path(name) / "fetched folder").iterdir()} == files


def test_a_big_file_is_fetched_without_being_held(host: Host, folder: Path, tmp_path: Path) -> None:
    # A third of it may be held in the buffers on the way.
    (folder / "weights").touch()
    os.truncate(folder / "weights", 60 << 20)
    tracemalloc.start()
    try:
        host.fetch(str(folder), tmp_path / "got")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "got" / "weights").stat().st_size == 60 << 20
    assert peak < 20 << 20
