"""SSH through paramiko: connecting, hosts on the way, and the pipes of a command. Imports paramiko: import it late."""

from __future__ import annotations

import errno
import logging
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import termios
import tty
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import Any

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Unreachable
from nemotron_launch.hosts.authentication import authenticate
from nemotron_launch.hosts.known_hosts import Known, check, known_keys
from nemotron_launch.hosts.session import Link
from nemotron_launch.hosts.ssh_config import Contact, contact, jump

CONNECT = 15.0  # seconds for TCP, and again for the server's first line
KEEP_ALIVE = 15  # seconds between signs of life, so that firewalls do not forget the connection
MOST_JUMPS = 8

logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False


class SSH:
    """A connection, made by the first command that needs it, and anew after it was cut."""

    def __init__(self, tunnel: Mapping[str, Any]) -> None:
        self._tunnel = tunnel
        self.login = tunnel.get("remote_shell") == "login"
        self._transport: paramiko.Transport | None = None
        self._ways = ExitStack()

    @property
    def name(self) -> str:
        return self._contact.name

    @cached_property
    def _contact(self) -> Contact:
        return contact(self._tunnel)

    def start(self, command: str) -> Link:
        channel = self._channel()
        try:
            link = ChannelLink(channel)
            channel.exec_command(command)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._lost(error) from None
        return link

    def terminal(self, command: str) -> int:
        channel = self._channel()
        try:
            return _in_terminal(channel, command) if sys.stdin.isatty() else _in_pipes(channel, command)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._lost(error) from None
        finally:
            channel.close()

    def close(self) -> None:
        if self._transport:
            self._transport.close()
            self._transport = None
        self._ways.close()

    def _channel(self) -> paramiko.Channel:
        for attempt in range(2):
            fresh = self._transport is None or not self._transport.is_active()
            if fresh:
                self.close()
                self._transport = connect(self._contact, self._ways)
            assert self._transport is not None
            try:
                return self._transport.open_session(timeout=CONNECT)
            except paramiko.ChannelException as error:
                hint = "the server allows too few sessions on one connection (MaxSessions), or refuses commands"
                raise UserError(f"{self.name} opens no session: {error.text}", hint=hint, exit_code=1) from None
            except (paramiko.SSHException, EOFError, OSError) as error:
                # Nothing was asked for yet, so a connection that died while it lay idle may be replaced.
                self.close()
                if fresh or attempt:
                    raise self._lost(error) from None
        raise AssertionError

    def _lost(self, error: BaseException) -> Unreachable:
        said = f": {error}" if str(error) else ""
        return Unreachable(
            f"{self.name} ended the connection{said}", hint="the next command connects anew", exit_code=1
        )


class ChannelLink:
    """The pipes of a command at the other end."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._ready = select.poll()
        self._ready.register(channel.fileno(), select.POLLIN)

    def send(self, data: bytes) -> None:
        self._channel.sendall(data)

    def receive(self, seconds: float) -> tuple[bytes, bytes]:
        self._ready.poll(seconds * 1000)
        channel = self._channel
        ended = channel.eof_received or channel.closed
        out = channel.recv(1 << 18) if channel.recv_ready() else b""
        err = channel.recv_stderr(1 << 18) if channel.recv_stderr_ready() else b""
        if not out and not err and ended and not channel.recv_ready() and not channel.recv_stderr_ready():
            raise EOFError
        return out, err

    def ended(self) -> UserError | None:
        return None

    def close(self) -> None:
        with suppress(Exception):
            self._channel.close()


def connect(there: Contact, ways: ExitStack, depth: int = 0) -> paramiko.Transport:
    """An authenticated connection. ways: ends what leads there, hosts on the way and proxy commands."""
    known = known_keys(there.known_hosts, there.known_as)
    transport = paramiko.Transport(_socket(there, ways, depth))
    try:
        _prefer(transport, known)
        transport.banner_timeout = CONNECT
        try:
            transport.start_client(timeout=CONNECT * 2)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise _no_ssh(there, error) from None
        key = transport.get_remote_server_key()
        check(key.get_name(), key.asbytes(), known, host=there.name, name=there.known_as, files=there.known_hosts)
        authenticate(transport, there)
        transport.set_keepalive(KEEP_ALIVE)
    except BaseException:
        transport.close()
        raise
    return transport


def _prefer(transport: paramiko.Transport, known: list[Known]) -> None:
    """Ask for a key of a kind that is known first: a server with several shows another one else."""
    kinds = [line.kind for line in known if not line.marker]
    names = {name for kind in kinds for name in (("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,))}
    options = transport.get_security_options()
    options.key_types = sorted(options.key_types, key=lambda name: name not in names)


def _socket(there: Contact, ways: ExitStack, depth: int) -> Any:
    if depth > MOST_JUMPS:
        raise UserError(f"more than {MOST_JUMPS} hosts on the way to {there.name}", where="tunnel.proxy_jump")
    if there.jumps:
        *before, last = there.jumps
        tunnel = {**jump(last), "proxy_jump": ",".join(before) or None}
        transport = connect(contact(tunnel), ways, depth + 1)
        ways.callback(transport.close)
        try:
            return transport.open_channel(
                "direct-tcpip", (there.hostname, there.port), ("127.0.0.1", 0), timeout=CONNECT
            )
        except paramiko.ChannelException as error:
            hint = f"{last} is reached, but cannot connect to {there.hostname}:{there.port} from there"
            raise Unreachable(f"{there.name} cannot be reached: {error.text}", hint=hint, exit_code=1) from None
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise Unreachable(f"{there.name} cannot be reached through {last}: {error}", exit_code=1) from None
    if there.proxy_command:
        return _through(_expanded(there.proxy_command, there), ways)
    return _direct(there)


def _direct(there: Contact) -> socket.socket:
    try:
        sock = socket.create_connection((there.hostname, there.port), timeout=CONNECT)
    except socket.gaierror as error:
        hint = "check tunnel.host and ~/.ssh/config; a VPN may be needed"
        said = (error.strerror or str(error)).lower()
        raise Unreachable(
            f"no address for {there.hostname}: {said}", where=there.asked, hint=hint, exit_code=1
        ) from None
    except OSError as error:
        raise _down(there, error) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError, AttributeError):
        # Of data that nobody takes in, the kernel tells after this long instead of after a quarter of an hour.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 45_000)
    return sock


def _down(there: Contact, error: OSError) -> Unreachable:
    at = f"{there.hostname}:{there.port}"
    if isinstance(error, TimeoutError):
        text = f"{there.name} does not answer: nothing from {at} within {CONNECT:g} seconds"
        hint = "the host is down, or a firewall is between; a VPN or a proxy jump may be needed"
    elif error.errno == errno.ECONNREFUSED:
        text = f"{there.name} cannot be reached: {at} refuses connections"
        hint = "no SSH server listens there: check host and port"
    else:
        text = f"{there.name} cannot be reached: {at}: {(error.strerror or str(error)).lower()}"
        hint = "check the network; a VPN or a proxy jump may be needed"
    return Unreachable(text, hint=hint, exit_code=1)


def _no_ssh(there: Contact, error: BaseException) -> UserError:
    if isinstance(error, IncompatiblePeer):
        hint = "set tunnel.client: openssh"
        return UserError(f"{there.name} speaks no SSH that paramiko does: {error}", hint=hint, exit_code=1)
    text = (
        f"{there.name} does not speak SSH: {there.hostname}:{there.port} accepted the connection, and then nothing came"
    )
    hint = "the server may be overloaded or refuse this address; check the port"
    return Unreachable(text, hint=hint, exit_code=1)


def _expanded(command: str, there: Contact) -> str:
    tokens = {"%%": "%", "%h": there.hostname, "%p": str(there.port), "%r": there.user, "%n": there.asked}
    parts, rest = [], command
    while rest:
        parts.append(tokens.get(rest[:2], rest[0]))
        rest = rest[2:] if rest[:2] in tokens else rest[1:]
    return "".join(parts)


def _through(command: str, ways: ExitStack) -> socket.socket:
    """A socket whose other end is a proxy command's standard input and output."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"trap '' INT; exec {command}"], stdin=theirs.fileno(), stdout=theirs.fileno()
        )

    def end() -> None:
        process.terminate()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    ways.callback(end)
    return ours


def _in_terminal(channel: paramiko.Channel, command: str) -> int:
    """Run a command with this terminal: every key goes there, Ctrl-C too, and the window's size follows."""
    channel.get_pty(os.environ.get("TERM", "xterm"), *os.get_terminal_size(0))
    channel.exec_command(command)
    before = termios.tcgetattr(0)
    resized: Callable[..., None] = lambda *_: channel.resize_pty(*os.get_terminal_size(0))  # noqa: E731
    handler = signal.signal(signal.SIGWINCH, resized)
    try:
        tty.setraw(0)
        _pump(channel)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)
    return channel.recv_exit_status()


def _in_pipes(channel: paramiko.Channel, command: str) -> int:
    channel.exec_command(command)
    _pump(channel)
    return channel.recv_exit_status()


def _pump(channel: paramiko.Channel) -> None:
    """Both ways until the other end closes."""
    with selectors.DefaultSelector() as ready:
        ready.register(channel.fileno(), selectors.EVENT_READ)
        listening = True
        try:
            ready.register(0, selectors.EVENT_READ)
        except PermissionError:  # a plain file, which is always ready
            listening = False
            channel.sendall(sys.stdin.buffer.read())
            channel.shutdown_write()
        while True:
            ready.select()
            if channel.recv_ready():
                _write(1, channel.recv(1 << 16))
            if channel.recv_stderr_ready():
                _write(2, channel.recv_stderr(1 << 16))
            if (
                (channel.eof_received or channel.closed)
                and not channel.recv_ready()
                and not channel.recv_stderr_ready()
            ):
                return
            if listening and select.select([0], [], [], 0)[0]:
                if typed := os.read(0, 1 << 12):
                    channel.sendall(typed)
                else:
                    channel.shutdown_write()
                    ready.unregister(0)
                    listening = False


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
