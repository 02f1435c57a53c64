"""Connections that are cut, frozen and gone, and disks that are full: one clear message, and nothing half done."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Host, Unreachable, Upload, open_host, session, ssh
from tests.sshd import Relay, Sshd, running

CLIENTS = ("paramiko", "openssh")


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """An sshd of this test alone, to be maltreated."""
    for sshd in running(tmp_path / "sshd"):
        for name, value in sshd.environment.items():
            monkeypatch.setenv(name, value)
        yield sshd


@pytest.fixture
def wire(own: Sshd) -> Iterator[Relay]:
    """A wire to that sshd."""
    relay = Relay(own.port)
    known = own.known_hosts.read_text()
    own.known_hosts.write_text(known + known.replace(f"]:{own.port} ", f"]:{relay.port} "))
    yield relay
    relay.close()


@pytest.fixture
def over_wire(own: Sshd, wire: Relay, client: str) -> Iterator[Host]:
    host = open_host({**own.tunnel, "client": client, "port": wire.port})
    yield host
    host.close()


@contextmanager
def meanwhile(act: Callable[[], object], *, when: Path) -> Iterator[None]:
    """Do something in the background once a file is there."""

    def wait() -> None:
        end = time.monotonic() + 30
        while not when.exists() and time.monotonic() < end:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_connection_cut_in_a_command_is_out_of_reach_and_the_next_command_connects_anew(
    own: Sshd, client: str, tmp_path: Path
) -> None:
    host = open_host({**own.tunnel, "client": client})
    started = tmp_path / "started"
    with meanwhile(own.cut, when=started), pytest.raises(Unreachable, match=r"\S+@cluster ended the connection"):
        host.run(f"touch {started}; sleep 60")
    assert host.run("echo again").stdout == "again\n"
    host.close()


def test_a_connection_cut_while_idle_is_replaced_without_a_word(own: Sshd, client: str) -> None:
    host = open_host({**own.tunnel, "client": client})
    assert isinstance(host, session.Remote)
    for number in range(3):
        assert host.run(f"echo {number}").stdout == f"{number}\n"
        own.cut()
        until(lambda: not (host._session and host._session.alive()))  # the end of a connection travels
    host.close()


def test_a_server_that_dies_is_down_until_it_is_back(own: Sshd, client: str, tmp_path: Path) -> None:
    host = open_host({**own.tunnel, "client": client})
    started = tmp_path / "started"
    with meanwhile(own.kill, when=started), pytest.raises(Unreachable, match="ended the connection"):
        host.run(f"touch {started}; sleep 60")
    with pytest.raises(Unreachable, match=rf"cannot be reached: 127\.0\.0\.1:{own.port} refuses connections"):
        host.run("true")
    own.start()
    assert host.run("echo again").stdout == "again\n"
    host.close()


def test_a_frozen_server_does_not_hang_a_command(own: Sshd, client: str, tmp_path: Path) -> None:
    host = open_host({**own.tunnel, "client": client})
    host.run("true")
    own.freeze()
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=r"did not answer within 0\.5 seconds"):
        host.run("true", timeout=0.5)
    assert time.monotonic() - begin < 20
    own.thaw()
    assert host.run("echo again").stdout == "again\n"
    host.close()


def test_a_frozen_server_does_not_hang_a_connection(own: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT", 0.3)
    own.freeze()
    with pytest.raises(Unreachable, match="does not speak SSH"):
        open_host(own.tunnel).run("true")


def test_a_connection_cut_anywhere_in_the_sign_in_is_out_of_reach(own: Sshd, wire: Relay, client: str) -> None:
    for bytes_sent in range(30, 3000, 350):  # a connection with its first command sends 3,200 (paramiko) or 4,900
        host = open_host({**own.tunnel, "client": client, "port": wire.port})
        wire.cut_after(bytes_sent)
        with pytest.raises(Unreachable, match="@cluster"):
            host.run("true")
        host.close()


def test_a_frozen_server_does_not_hang_an_upload(
    own: Sshd, client: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = open_host({**own.tunnel, "client": client})
    host.run("true")
    monkeypatch.setattr(session, "QUIET", 0.5)
    own.freeze()
    with pytest.raises(Unreachable, match="did not answer"):
        host.put(str(tmp_path / "run"), [Upload("big", bytes(20_000_000))])
    own.thaw()
    until(lambda: not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir()))
    host.close()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.98])
def test_an_upload_that_is_cut_leaves_nothing_to_be_seen(
    over_wire: Host, wire: Relay, tmp_path: Path, part: float
) -> None:
    folder = tmp_path / "run"
    files = [Upload(f"file-{number}", random.Random(number).randbytes(100_000)) for number in range(10)]
    over_wire.put(str(folder), [Upload("old", b"old")])
    wire.cut_after(int(1_000_000 * part))
    with pytest.raises(Unreachable, match="ended the connection"):
        over_wire.put(str(folder), files)
    until(lambda: [path.name for path in folder.iterdir()] == ["old"])
    over_wire.put(str(folder), files)
    assert len(list(folder.iterdir())) == 11


def test_a_script_whose_end_did_not_arrive_does_not_run(over_wire: Host, wire: Relay, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    script = f"touch {ran}\n" + "# filling\n" * 30_000
    for cut in (100, 20_000, 200_000):
        over_wire.run("true")
        wire.cut_after(cut)
        with pytest.raises(Unreachable):
            over_wire.run(script)
    assert over_wire.run("sleep 0.2").code == 0
    assert not ran.exists()


def test_a_download_that_is_cut_leaves_whole_files_only(
    over_wire: Host, wire: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        (tmp_path / f"from/{number}").parent.mkdir(exist_ok=True)
        (tmp_path / f"from/{number}").write_bytes(bytes(1_000_000))
    over_wire.run("true")
    with meanwhile(wire.cut, when=tmp_path / "to"), pytest.raises(Unreachable):
        over_wire.fetch(str(tmp_path / "from"), tmp_path / "to")
    left = list((tmp_path / "to").iterdir())
    assert len(left) < 40
    assert all(path.stat().st_size == 1_000_000 and path.name.isdigit() for path in left)


def test_everything_goes_over_one_connection(over_wire: Host, wire: Relay, tmp_path: Path) -> None:
    for number in range(3):
        over_wire.run("true")
        over_wire.put(str(tmp_path / "run"), [Upload("a", b"1")])
        over_wire.read({str(tmp_path / "run/a"): 0})
        over_wire.entries(str(tmp_path))
        over_wire.fetch(str(tmp_path / "run"), tmp_path / f"got-{number}")
    assert wire.accepted == 1


def test_no_process_stays_behind(own: Sshd, client: str) -> None:
    host = open_host({**own.tunnel, "client": client})
    host.run("true")
    host.close()
    until(lambda: not own.connections())


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """An sshd that sees two small disks, one full after 256 KiB and one read-only, which end with it."""
    if os.geteuid():
        pytest.skip("mounting is root's")
    (tmp_path / "full").mkdir()
    (tmp_path / "read-only").mkdir()
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}/full && mount -t tmpfs -o ro none {tmp_path}/read-only"
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount + ' && exec "$@"', "sh"]
    for sshd in running(tmp_path / "sshd", prefix=prefix):
        for name, value in sshd.environment.items():
            monkeypatch.setenv(name, value)
        yield sshd


def test_a_full_disk_is_said_and_nothing_is_left_on_it(full: Sshd, client: str, tmp_path: Path) -> None:
    host = open_host({**full.tunnel, "client": client})
    files = [Upload("small", b"1"), Upload("big", bytes(1_000_000))]
    with pytest.raises(UserError, match=r"@cluster: cannot write to .*/full/run: no space left") as error:
        host.put(f"{tmp_path}/full/run", files)
    assert "another file system" in str(error.value)
    assert host.entries(f"{tmp_path}/full/run") == []
    host.put(f"{tmp_path}/full/run", files[:1])
    host.close()


def test_a_read_only_disk_is_said(full: Sshd, client: str, tmp_path: Path) -> None:
    host = open_host({**full.tunnel, "client": client})
    with pytest.raises(UserError, match="the file system is read-only"):
        host.put(f"{tmp_path}/read-only/run", [Upload("a", b"1")])
    host.close()


@pytest.mark.skipif(not os.geteuid(), reason="root may write anywhere")
def test_a_folder_that_is_not_ours_is_said(own: Sshd, client: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    host = open_host({**own.tunnel, "client": client})
    with pytest.raises(UserError, match="permission denied"):
        host.put(f"{tmp_path}/theirs/run", [Upload("a", b"1")])
    host.close()


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next_one_s(own: Sshd, client: str) -> None:
    host = open_host({**own.tunnel, "client": client})
    assert isinstance(host, session.Remote)
    host._begun("echo first", b"", None)  # as a Ctrl-C between the request and its answer leaves it
    assert host.run("echo second").stdout == "second\n"
    host.close()
