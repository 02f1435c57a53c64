"""A private sshd on loopback, with keys of its own, that tests may kill, freeze and cut; started in a moment.

It needs no rights: it lets in the user who runs the tests, with a key that is made for it. Everything lies below one
folder, and `environment` points SSH's clients there instead of at ~/.ssh.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WAIT = 20.0  # seconds, for what takes a tenth of one on an idle machine
PROGRAMS = ("sshd", "ssh", "ssh-keygen")
PACKAGES = "openssh-server openssh-client"
ALIAS = "cluster"  # the server's name in the clients' config


class Sshd:
    """The server, and what its clients need.

    env: what its sessions find in their environment. options: lines for the top of its config. prefix: a command that
    starts it, such as unshare.
    """

    def __init__(
        self, root: Path, *, env: Mapping[str, str] | None = None, options: str = "", prefix: Sequence[str] = ()
    ) -> None:
        self.root = root
        self.user = getpass.getuser()
        self.port = 0
        self.key = root / "id"
        self.known_hosts = root / "known_hosts"
        self.config = root / "ssh_config"
        self._env = {"PATH": os.environ["PATH"], **(env or {})}
        self._options, self._prefix = options, prefix
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def tunnel(self) -> dict[str, Any]:
        """A profile's `tunnel` to it."""
        return {"type": "ssh", "host": ALIAS}

    @property
    def environment(self) -> dict[str, str]:
        """For a process that uses the tunnel: where its SSH config lies."""
        return {"NEMOTRON_SSH_CONFIG": str(self.config), "SSH_AUTH_SOCK": ""}

    @property
    def log(self) -> str:
        """What the server has said so far."""
        return (self.root / "sshd.log").read_text(errors="replace")

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)
        for key in (self.root / "host_key", self.key):
            if not key.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=WAIT)
        keys = self.root / "authorized_keys"
        if not keys.exists():
            shutil.copy(f"{self.key}.pub", keys)
        if not os.geteuid():
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd shuts itself in as root
        for _ in range(5):
            # Once the clients know a port it stays; before, another process may have taken the one that was free.
            self.port = self.port or _free_port()
            if self._answers():
                break
            self.port = 0
        assert self.port, f"sshd did not start: {self.log}"
        public = (self.root / "host_key.pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public[0]} {public[1]}\n")
        self.config.write_text(f"""\
Host {ALIAS}
    HostName 127.0.0.1
    Port {self.port}
    User {self.user}
    IdentityFile {self.key}
Host *
    IdentitiesOnly yes
    UserKnownHostsFile {self.known_hosts}
    GlobalKnownHostsFile /dev/null
""")

    def _answers(self) -> bool:
        given = " ".join(f'"{name}={value}"' for name, value in self._env.items())
        (self.root / "sshd_config").write_text(f"""\
{self._options}
Port {self.port}
ListenAddress 127.0.0.1
HostKey {self.root}/host_key
AuthorizedKeysFile {self.root}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
SetEnv {given}
PrintMotd no
PrintLastLog no
MaxStartups 100
MaxSessions 100
""")
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "sshd"
        with (self.root / "sshd.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                [*self._prefix, sshd, "-D", "-e", "-f", self.root / "sshd_config"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(self._env), start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + WAIT
        while time.monotonic() < end and self._daemon.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self._daemon.poll() is None
            time.sleep(0.01)
        self._end_daemon()
        return False

    # Faults.

    def cut(self) -> None:
        """End every connection, at once and without a word; what they had started goes on, as after a real cut."""
        for pid in self.connections():
            _signal(pid, signal.SIGKILL)

    def kill(self) -> None:
        """The server dies with its connections: nobody listens any more, until the next start."""
        pids = self.connections()
        self._end_daemon()
        for pid in pids:
            _signal(pid, signal.SIGKILL)

    def freeze(self) -> None:
        """The server and its connections stay, and answer nothing."""
        for pid in (self._pid, *self.connections()):
            _signal(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in (self._pid, *self.connections()):
            _signal(pid, signal.SIGCONT)

    def connections(self) -> list[int]:
        """The process ids of sshd's processes for its connections."""
        return [pid for pid in self._descendants() if _program(pid).startswith("sshd")]

    def stop(self) -> None:
        """End the server and all that its sessions have left."""
        pids = self._descendants()
        self._end_daemon()
        for pid in pids:
            _signal(pid, signal.SIGKILL)

    @property
    def _pid(self) -> int:
        assert self._daemon is not None, "sshd is not running"
        return self._daemon.pid

    def _end_daemon(self) -> None:
        if self._daemon:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None

    def _descendants(self) -> list[int]:
        if self._daemon is None:
            return []
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (parent := _parent(int(entry.name))):
                parents.setdefault(parent, []).append(int(entry.name))
        found, new = [], [self._pid]
        while new:
            new = [child for pid in new for child in parents.get(pid, [])]
            found += new
        return found


class Relay:
    """A wire to a port, of this machine, that tests may cut, block and lengthen."""

    def __init__(self, port: int, *, delay: float = 0.0) -> None:
        self._to, self._delay = port, delay
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.sent = 0  # bytes from the clients so far
        self.accepted = 0  # connections so far
        self._cut_at: int | None = None
        self._sockets: list[socket.socket] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def cut(self) -> None:
        """End every connection now."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut_after(self, more: int) -> None:
        """End the connection once so many more bytes have gone from the client to the server."""
        self._cut_at = self.sent + more

    def block(self) -> None:
        """Let nothing through, and say nothing."""
        self._flowing.clear()

    def close(self) -> None:
        # The thread ends first: it could be about to accept from a descriptor that is another socket's by then.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(WAIT)
        self._listener.close()
        self._flowing.set()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to), WAIT)
                server.settimeout(None)
                self.accepted += 1
                self._sockets += [client, server]
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, to: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                time.sleep(self._delay)
                if counted and self._cut_at is not None and self.sent + len(data) >= self._cut_at:
                    data, self._cut_at = data[: max(0, self._cut_at - self.sent)], None
                    to.sendall(data)
                    break
                to.sendall(data)
                self.sent += len(data) if counted else 0
        for each in (source, to):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _program(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def missing() -> str:
    """What stands in the way of an sshd here, and what to do; empty when nothing does."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if absent := [program for program in PROGRAMS if not shutil.which(program, path=path)]:
        return f"no {', '.join(absent)} here: apt-get install --no-install-recommends {PACKAGES}"
    return ""


def running(root: Path, **given: Any) -> Iterator[Sshd]:
    """An sshd below `root`, for a fixture."""
    sshd = Sshd(root, **given)
    try:
        sshd.start()
        yield sshd
    finally:
        sshd.stop()
