"""SSH through the system's ssh: for Kerberos, hardware keys, and all else that it can and paramiko cannot."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Unreachable
from nemotron_launch.hosts.known_hosts import changed, known_keys, shown, unknown
from nemotron_launch.hosts.session import Link
from nemotron_launch.hosts.ssh_config import Contact, config_arguments, contact, has_terminal

CONNECT = 15  # seconds
CONNECTION_FAILED = 255  # ssh's exit code
LONGEST_SOCKET = 60  # characters of the folder; ssh adds 60 for the name, and a path may have 108


class OpenSSH:
    """A connection of the system's ssh: the first command holds it, others go through its socket.

    It ends with that command, so that nothing stays behind, not even when this process is killed. Where ~/.ssh/config
    shares connections itself (ControlPath), that is left as it is: one may be open already.
    """

    def __init__(self, tunnel: Mapping[str, Any]) -> None:
        self._tunnel = tunnel
        self.login = tunnel.get("remote_shell") == "login"
        self._folder: Path | None = None
        self._links: list[ProcessLink] = []

    @property
    def name(self) -> str:
        return self._contact.name

    @cached_property
    def _contact(self) -> Contact:
        if not shutil.which("ssh"):
            hint = "install OpenSSH's client, or leave tunnel.client out"
            raise UserError("no ssh on this machine", where="tunnel.client", hint=hint)
        return contact(self._tunnel)

    def start(self, command: str) -> Link:
        self._links = [link for link in self._links if link.running()]
        link = ProcessLink([*self._command("-T"), command], self._explained)
        self._links.append(link)
        return link

    def terminal(self, command: str) -> int:
        code = subprocess.call([*self._command("-t" if os.isatty(0) else "-T"), command])
        if code == CONNECTION_FAILED:
            raise Unreachable(f"{self.name} ended the connection", hint="ssh's own words are above", exit_code=1)
        return code

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links = []
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _command(self, *kind: str) -> list[str]:
        there = self._contact
        options: dict[str, object] = {
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": CONNECT,
            "ServerAliveInterval": CONNECT,
            "ServerAliveCountMax": 3,
            "EscapeChar": "none",
            # What a person's own sessions with the host do, and commands must not.
            "RemoteCommand": "none",
            "PermitLocalCommand": "no",
            "ClearAllForwardings": "yes",
        }
        if "-v" not in kind:
            options["LogLevel"] = "ERROR"
        if "-v" in kind or not has_terminal():
            options["BatchMode"] = "yes"
        if "-v" in kind:
            options["ControlPath"] = "none"
        elif not there.shares_connection:
            self._folder = self._folder or Path(tempfile.mkdtemp(prefix="nemotron-ssh-", dir=_short_folder()))
            options |= {"ControlMaster": "auto", "ControlPath": f"{self._folder}/%C", "ControlPersist": "no"}
        command = ["ssh", *config_arguments(), *kind, "-l", there.user, "-p", str(there.port)]
        if there.given_identity:
            command += ["-i", str(there.identities[0]), "-o", "IdentitiesOnly=yes"]
        if self._tunnel.get("proxy_jump"):
            command += ["-J", ",".join(there.jumps)]
        for name, value in options.items():
            command += ["-o", f"{name}={value}"]
        return [*command, there.asked]

    def _explained(self, said: str) -> UserError:
        """What ssh's last words mean."""
        there = self._contact
        at = f"{there.hostname}:{there.port}"
        if "Host key verification failed" in said or "host key is known" in said or "HAS CHANGED" in said:
            return self._host_key()
        if "Permission denied (" in said or "Too many authentication failures" in said:
            allowed = re.findall(r"Permission denied \(([^)]*)\)", said)
            hint = f"the server takes: {', '.join(allowed[-1].split(','))}\n" if allowed else ""
            hint += "see why: ssh -v, with the same host and user; tunnel.identity names the key to use"
            if not has_terminal():
                hint += "\nthere is no terminal here to type a passphrase, a password or a code on"
            return UserError(f"{there.name}: permission denied", hint=hint, exit_code=1)
        if "Could not resolve hostname" in said:
            hint = "check tunnel.host and ~/.ssh/config; a VPN may be needed"
            return Unreachable(f"no address for {there.hostname}", where=there.asked, hint=hint, exit_code=1)
        if "Connection refused" in said:
            hint = "no SSH server listens there: check host and port"
            return Unreachable(f"{there.name} cannot be reached: {at} refuses connections", hint=hint, exit_code=1)
        if "timed out" in said and "connect to host" in said:
            text = f"{there.name} does not answer: nothing from {at} within {CONNECT} seconds"
            hint = "the host is down, or a firewall is between; a VPN or a proxy jump may be needed"
            return Unreachable(text, hint=hint, exit_code=1)
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        text = f"{there.name} ended the connection{': ' + lines[-1] if lines else ''}"
        return Unreachable(text, hint="the next command connects anew; ssh -v shows more", exit_code=1)

    def _host_key(self) -> UserError:
        """Which key the server showed, which ssh tells only when it is talkative."""
        there = self._contact
        said = ""
        with suppress(subprocess.TimeoutExpired):
            command = [*self._command("-v", "-T"), "exit"]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=3 * CONNECT)
            said = done.stderr.decode(errors="replace")
        found = re.search(r"Server host key: (\S+) (SHA256:\S+)", said)
        key = shown(found[1], found[2]) if found else "a key that ssh -v tells"
        known = known_keys(there.known_hosts, there.known_as)
        if any(not line.marker for line in known):
            return changed(key, known, host=there.name, name=there.known_as)
        return unknown(key, known, host=there.name, name=there.known_as, files=there.known_hosts)


class ProcessLink:
    """The pipes of an ssh process. explained: what its last words mean, where it failed itself."""

    def __init__(self, command: list[str], explained: Callable[[str], UserError]) -> None:
        self._explained = explained
        # It stays in our session, where it can ask for a password, and leaves Ctrl-C to us.
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in = self._process.stdin
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._process.stdout, selectors.EVENT_READ, True)
        self._ready.register(self._process.stderr, selectors.EVENT_READ, False)
        self._said = b""

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._in.write(view) or 0 :]

    def receive(self, seconds: float) -> tuple[bytes, bytes]:
        out = err = b""
        for key, _ in self._ready.select(seconds):
            data = os.read(key.fd, 1 << 18)
            if not data:
                self._ready.unregister(key.fileobj)
            elif key.data:
                out = data
            else:
                err = data
                self._said = (self._said + err)[-8000:]
        if not out and not err and not any(key.data for key in self._ready.get_map().values()):
            if self._ready.get_map() and self.running():
                return out, err  # its last words may still come
            raise EOFError
        return out, err

    def ended(self) -> UserError | None:
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(5) == CONNECTION_FAILED:
                return self._explained(self._said.decode(errors="replace"))
        return None

    def running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        with suppress(OSError):
            self._in.close()
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._ready.close()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()


def _short_folder() -> str:
    """For sockets: a folder of ours with a short name."""
    ours = os.environ.get("XDG_RUNTIME_DIR", "")
    return next(
        (name for name in (ours, tempfile.gettempdir()) if 0 < len(name) <= 30 and os.access(name, os.W_OK)), "/tmp"
    )
