"""Which server it is and who we are: keys, agents, codes, hosts on the way; and one clear message when that fails."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Unreachable, open_host, ssh
from tests.hosts.terminal import in_terminal
from tests.hosts.test_terminal import OPEN
from tests.sshd import Sshd, running

CLIENTS = ("paramiko", "openssh")
Say = Callable[..., str]


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def said(at_sshd: Sshd, client: str) -> Say:
    """What `echo hello` says over a tunnel; the error's text where it is refused."""

    def said(**tunnel: Any) -> str:
        host = open_host({**at_sshd.tunnel, "client": client, **tunnel})
        try:
            return host.run("echo hello").stdout.strip()
        except UserError as error:
            return str(error)
        finally:
            host.close()

    return said


@pytest.fixture
def config(at_sshd: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Put lines before the SSH config of this test."""

    def config(lines: str) -> None:
        file = tmp_path / "ssh_config"
        file.write_text(f"{lines}\nMatch all\n{at_sshd.config.read_text()}")
        monkeypatch.setenv("NEMOTRON_SSH_CONFIG", str(file))

    return config


def new_key(path: Path, phrase: str = "", kind: str = "ed25519") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", phrase, "-f", path], check=True, timeout=60)
    return path


def fingerprint(sshd: Sshd) -> str:
    done = subprocess.run(["ssh-keygen", "-lf", sshd.root / "host_key.pub"], capture_output=True, text=True, timeout=60)
    return done.stdout.split()[1]


def test_a_wrong_key_is_one_message_that_names_host_and_key(
    said: Say, at_sshd: Sshd, tmp_path: Path, client: str
) -> None:
    text = said(host="127.0.0.1", port=at_sshd.port, identity=str(new_key(tmp_path / "other")))
    assert "@127.0.0.1: permission denied" in text
    assert "publickey" in text and "tunnel.identity" in text
    assert client == "openssh" or str(tmp_path / "other") in text


def test_a_missing_key_file_is_said_before_anybody_is_called(said: Say) -> None:
    assert said(identity="/no/such/key").startswith("error: tunnel.identity: no key /no/such/key")


def test_an_unknown_host_key_is_refused_with_its_fingerprint(
    said: Say, config: Any, at_sshd: Sshd, tmp_path: Path
) -> None:
    config(f"Host *\n UserKnownHostsFile {tmp_path}/none")
    text = said()
    assert f"the host key of {at_sshd.user}@cluster is not in {tmp_path}/none: ED25519 {fingerprint(at_sshd)}" in text
    assert f"ssh -p {at_sshd.port} {at_sshd.user}@cluster" in text
    assert not (tmp_path / "none").exists()


def test_a_changed_host_key_is_refused_in_strong_words(said: Say, config: Any, at_sshd: Sshd, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other").with_suffix(".pub").read_text().split()[:2]
    (tmp_path / "known").write_text(f"# ours\n[127.0.0.1]:{at_sshd.port} {' '.join(other)}\n")
    config(f"Host *\n UserKnownHostsFile {tmp_path}/known")
    text = said()
    assert "HAS CHANGED" in text and fingerprint(at_sshd) in text
    assert f"{tmp_path}/known:2" in text and f"ssh-keygen -R '[127.0.0.1]:{at_sshd.port}'" in text


def test_a_revoked_host_key_is_refused(said: Say, config: Any, at_sshd: Sshd, tmp_path: Path) -> None:
    known = at_sshd.known_hosts.read_text()
    (tmp_path / "known").write_text(f"{known}@revoked * {' '.join(known.split()[1:])}\n")
    config(f"Host *\n UserKnownHostsFile {tmp_path}/known")
    assert "hello" not in said()


@pytest.mark.parametrize("form", ["hashed", "pattern", "alias"])
def test_every_form_of_known_hosts_is_read(said: Say, config: Any, at_sshd: Sshd, tmp_path: Path, form: str) -> None:
    known = tmp_path / "known"
    _, kind, key = at_sshd.known_hosts.read_text().split()
    name = {"hashed": f"[127.0.0.1]:{at_sshd.port}", "pattern": "!other,[127.0.*]:*", "alias": "the-name"}[form]
    known.write_text(f"other {kind} AAAA\n\n{name} {kind} {key} a comment\n")
    if form == "hashed":
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True, timeout=60)
        assert "127.0.0.1" not in known.read_text()
    alias = " HostKeyAlias the-name\n" if form == "alias" else ""
    config(f"Host *\n{alias} UserKnownHostsFile {known}")
    assert said() == "hello"


def test_the_kind_of_key_that_is_known_is_the_one_asked_for(client: str, tmp_path: Path, monkeypatch: Any) -> None:
    new_key(tmp_path / "rsa", kind="rsa")
    for sshd in running(tmp_path / "sshd", options=f"HostKey {tmp_path}/rsa"):
        for name, value in sshd.environment.items():
            monkeypatch.setenv(name, value)
        kind, key = (tmp_path / "rsa.pub").read_text().split()[:2]
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n")
        host = open_host({**sshd.tunnel, "client": client})
        assert host.run("echo hello").stdout == "hello\n"
        host.close()


def test_no_address_is_said(said: Say) -> None:
    assert "no address for nowhere.invalid" in said(host="nowhere.invalid")


def test_a_port_where_nobody_listens_is_said(said: Say) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert f"cannot be reached: 127.0.0.1:{port} refuses connections" in said(port=port)


def test_a_port_that_speaks_something_else_is_said(at_sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Unreachable, match="does not speak SSH"):
        open_host({**at_sshd.tunnel, "port": silent.getsockname()[1]}).run("true")


@pytest.mark.parametrize("name", ["-oProxyCommand=touch x", "a b", "$(id)", "a\nb", "", "a;b"])
def test_a_name_that_ssh_would_take_for_something_else_is_refused(said: Say, name: str) -> None:
    assert "no name for SSH" in said(host=name)
    assert name == "" or "no name for SSH" in said(user=name)


def test_an_account_without_a_shell_is_said(client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for sshd in running(tmp_path / "sshd", options='ForceCommand echo "This account is closed."'):
        for name, value in sshd.environment.items():
            monkeypatch.setenv(name, value)
        host = open_host({**sshd.tunnel, "client": client})
        with pytest.raises(UserError, match=r"@cluster gave no shell; it said: This account is closed\."):
            host.run("true")
        host.close()


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real ssh-agent, without keys."""
    path = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    while not path.exists():
        assert process.poll() is None
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
    yield path
    process.terminate()
    process.wait()


def test_a_locked_key_in_the_agent_opens(said: Say, at_sshd: Sshd, agent: Path, tmp_path: Path) -> None:
    key = tmp_path / "locked"
    shutil.copy(at_sshd.key, key)
    shutil.copy(f"{at_sshd.key}.pub", f"{key}.pub")
    key.chmod(0o600)
    subprocess.run(["ssh-add", "-q", key], check=True, timeout=60)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "a phrase", "-f", key], check=True, timeout=60, capture_output=True)
    assert said(identity=str(key)) == "hello"


def test_the_agent_s_keys_are_tried_without_a_file(said: Say, at_sshd: Sshd, agent: Path, config: Any) -> None:
    config("Host cluster\n IdentitiesOnly no\n IdentityFile /none")
    (Path(os.environ["NEMOTRON_SSH_CONFIG"])).write_text(
        Path(os.environ["NEMOTRON_SSH_CONFIG"]).read_text().replace(f"IdentityFile {at_sshd.key}", "")
    )
    assert "permission denied" in said()
    subprocess.run(["ssh-add", "-q", at_sshd.key], check=True, timeout=60)
    assert said() == "hello"


def test_too_many_keys_are_said(at_sshd: Sshd, agent: Path, config: Any, tmp_path: Path) -> None:
    for number in range(7):
        subprocess.run(["ssh-add", "-q", new_key(tmp_path / f"key-{number}")], check=True, timeout=60)
    config("Host cluster\n IdentitiesOnly no\n IdentityFile /none")
    file = Path(os.environ["NEMOTRON_SSH_CONFIG"])
    file.write_text(file.read_text().replace(f"IdentityFile {at_sshd.key}", ""))
    with pytest.raises(UserError, match="too many keys that it does not take"):
        open_host(at_sshd.tunnel).run("true")


def test_a_locked_key_without_a_terminal_is_said(at_sshd: Sshd, tmp_path: Path) -> None:
    key = new_key(tmp_path / "locked", phrase="a phrase")
    code = OPEN.format(json.dumps({**at_sshd.tunnel, "identity": str(key)})) + "host.run('true')"
    done = subprocess.run(
        ["setsid", "--wait", sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, **at_sshd.environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "locked by a passphrase, and no terminal to ask on" in done.stderr


def test_a_locked_key_is_unlocked_on_the_terminal(at_sshd: Sshd, client: str, tmp_path: Path) -> None:
    key = new_key(tmp_path / "locked", phrase="a phrase")
    with (at_sshd.root / "authorized_keys").open("a") as keys:
        keys.write(Path(f"{key}.pub").read_text())
    tunnel = {**at_sshd.tunnel, "identity": str(key), "client": client}
    code = OPEN.format(json.dumps(tunnel)) + "print(host.run('echo hel''lo').stdout)"
    env = at_sshd.environment
    status, shown = in_terminal(code, [("assphrase", "wrong\r"), ("assphrase", "a phrase\r"), ("hello", "")], env=env)
    assert status == 0, shown
    assert "a phrase" not in shown


def test_hosts_on_the_way_lead_there(said: Say, at_sshd: Sshd, config: Any) -> None:
    config("Host first second\n HostName 127.0.0.1\nHost inner\n ProxyJump first\n HostName 127.0.0.1\n")
    file = Path(os.environ["NEMOTRON_SSH_CONFIG"])
    file.write_text(file.read_text().replace("Host cluster", "Host cluster first second inner"))
    assert said(proxy_jump="first") == "hello"
    assert said(proxy_jump=f"first,{at_sshd.user}@second:{at_sshd.port}") == "hello"
    assert said(host="inner") == "hello"
    assert "hello" not in said(proxy_jump="nowhere.invalid")


def test_a_proxy_command_leads_there(said: Say, config: Any, tmp_path: Path) -> None:
    relay = tmp_path / "relay.py"
    relay.write_text("""\
import os, socket, sys, threading
there = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def up():
    while data := os.read(0, 65536):
        there.sendall(data)
threading.Thread(target=up, daemon=True).start()
while data := there.recv(65536):
    os.write(1, data)
""")
    config(f"Host cluster\n ProxyCommand {sys.executable} {relay} %h %p 2>/dev/null")
    assert said() == "hello"
    config("Host cluster\n ProxyCommand false")
    assert "hello" not in said()


def test_included_files_are_read(said: Say, config: Any, at_sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "more").write_text(
        f"Host short\n HostName 127.0.0.1\n Port {at_sshd.port}\n IdentityFile {at_sshd.key}\n"
    )
    config(f"Include {tmp_path}/mo*")
    assert said(host="short") == "hello"


def test_a_broken_config_is_said_with_its_line(said: Say, config: Any, tmp_path: Path) -> None:
    config("Host x\n NoSuchThing yes")
    assert f"{tmp_path}/ssh_config" in said() and "line 2" in said()


class OneTimePassword(paramiko.ServerInterface):
    """A server that wants a code, shown to be typed, and a pin, hidden; paramiko's, since sshd needs PAM for that."""

    def get_allowed_auths(self, username: str) -> str:
        return "keyboard-interactive"

    def check_auth_interactive(self, username: str, submethods: str) -> Any:
        return paramiko.InteractiveQuery("Two things", "Have your device ready", ("Code: ", True), ("Pin: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        return paramiko.AUTH_SUCCESSFUL if responses == ["123 456", "9876"] else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command), daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, command: bytes) -> None:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        assert process.stdin and process.stdout and process.stderr

        def feed() -> None:
            while data := channel.recv(1 << 15):
                process.stdin.write(data)  # type: ignore[union-attr]
            process.stdin.close()  # type: ignore[union-attr]

        def errors() -> None:
            while data := process.stderr.read(1 << 15):  # type: ignore[union-attr]
                channel.sendall_stderr(data)

        for each in (feed, errors):
            threading.Thread(target=each, daemon=True).start()
        while data := process.stdout.read(1 << 15):
            channel.sendall(data)
        channel.send_exit_status(process.wait())
        channel.close()


@pytest.fixture
def wants_codes(at_sshd: Sshd, config: Any) -> Iterator[dict[str, Any]]:
    """A tunnel to a server with one-time passwords."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        transports = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                transport = paramiko.Transport(connection)
                transport.add_server_key(paramiko.Ed25519Key(filename=str(at_sshd.root / "host_key")))
                transport.start_server(server=OneTimePassword())
                transports.append(transport)

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        config(f"Host cluster\n HostKeyAlias [127.0.0.1]:{at_sshd.port}")
        yield {**at_sshd.tunnel, "port": port}
        listener.shutdown(socket.SHUT_RDWR)
        serving.join(20)
        for transport in transports:
            transport.close()


def test_a_one_time_password_is_typed_on_the_terminal(wants_codes: dict[str, Any], client: str) -> None:
    code = OPEN.format(json.dumps({**wants_codes, "client": client})) + "print(host.run('echo hel''lo').stdout)"
    dialogue = [("device ready", "")] if client == "paramiko" else []
    dialogue += [("Code: ", "wrong\r"), ("Pin: ", "1\r")]
    dialogue += [("Code: ", "123 456\r"), ("Pin: ", "9876\r"), ("hello", "")]
    status, shown = in_terminal(code, dialogue, env={"NEMOTRON_SSH_CONFIG": os.environ["NEMOTRON_SSH_CONFIG"]})
    assert status == 0, shown
    assert "123 456" in shown and "9876" not in shown


def test_a_one_time_password_without_a_terminal_is_refused(wants_codes: dict[str, Any], client: str) -> None:
    code = OPEN.format(json.dumps({**wants_codes, "client": client})) + "host.run('true')"
    done = subprocess.run(
        ["setsid", "--wait", sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no terminal" in done.stderr
