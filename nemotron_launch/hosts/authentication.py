"""Who we are to an SSH server: keys of the agent and of files, passphrases, passwords and one-time codes."""

from __future__ import annotations

import base64
import getpass
import os
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko

from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Unreachable
from nemotron_launch.hosts.ssh_config import DEFAULT_KEYS, Contact, has_terminal

ANSWER = 30.0  # seconds for a server to take or refuse a key
TYPING = 120.0  # seconds for a person to type a code
TRIES = 3


def authenticate(transport: paramiko.Transport, there: Contact) -> None:
    """Prove who we are, by whatever of keys, codes and passwords the server takes; several where it wants several."""
    tried: list[str] = []
    wanted: list[str] = []
    transport.auth_timeout = ANSWER
    try:
        wanted = _methods(transport, there)
        if wanted and "publickey" in wanted:
            wanted = _with_keys(transport, there, wanted, tried)
        while wanted:
            wanted = _by_typing(transport, there, wanted, tried)
    except paramiko.BadAuthenticationType as error:
        raise _denied(there, error.allowed_types, tried) from None
    except paramiko.AuthenticationException as error:
        if not transport.is_active():
            raise _hung_up(there, tried) from None
        if "timeout" in str(error):
            raise Unreachable(f"{there.name} did not answer the sign-in", exit_code=1) from None
        raise _denied(there, wanted, tried) from None
    except (paramiko.SSHException, EOFError, OSError):
        raise _hung_up(there, tried) from None


def _methods(transport: paramiko.Transport, there: Contact) -> list[str]:
    """What the server takes; nothing where it lets everybody in."""
    try:
        return transport.auth_none(there.user)
    except paramiko.BadAuthenticationType as error:
        return error.allowed_types


def _with_keys(transport: paramiko.Transport, there: Contact, wanted: list[str], tried: list[str]) -> list[str]:
    """What is still wanted after one of our keys was taken; the methods but keys where none was."""
    for label, key in _keys(there, tried):
        try:
            further = transport.auth_publickey(there.user, key)
        except paramiko.BadAuthenticationType:
            raise
        except paramiko.AuthenticationException:
            if not transport.is_active():
                raise
            tried.append(label)
            continue
        except paramiko.SSHException as error:
            if not transport.is_active():
                raise
            tried.append(f"{label} ({error})")
            continue
        tried.append(f"{label} (taken)")
        return further
    rest = [method for method in wanted if method in ("keyboard-interactive", "password")]
    if not rest:
        raise _denied(there, wanted, tried)
    return rest


def _keys(there: Contact, tried: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """Our keys: those of the files, from the agent where it has them; the agent's others; locked files last."""
    with _agent(there.agent) as agent:
        held = {key.asbytes(): key for key in agent}
        locked = []
        for path in there.identities:
            if not path.is_file() and not Path(f"{path}.pub").is_file():
                continue
            label = _shown(path)
            public = _public(path)
            if public in held:
                yield f"{label} in the agent", held.pop(public)
                continue
            try:
                yield label, paramiko.PKey.from_path(path)
            except (paramiko.PasswordRequiredException, TypeError):
                locked.append((label, path))
            except Exception as error:
                if path.is_file():
                    tried.append(f"{label} ({_unusable(error)})")
        if not there.identities_only:
            for key in held.values():
                yield f"{key.comment or key.get_name()} in the agent", key
        for label, path in locked:
            yield from _unlocked(label, path, tried)


def _unlocked(label: str, path: Path, tried: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    if not has_terminal():
        tried.append(f"{label} (locked by a passphrase, and no terminal to ask on: ssh-add {path})")
        return
    for _ in range(TRIES):
        phrase = _ask(f"Passphrase of {label}: ", hidden=True)
        if not phrase:
            break
        try:
            yield label, paramiko.PKey.from_path(path, phrase.encode())  # type: ignore[arg-type]
            return
        except Exception:
            continue
    tried.append(f"{label} (not unlocked)")


def _by_typing(transport: paramiko.Transport, there: Contact, wanted: list[str], tried: list[str]) -> list[str]:
    """What is still wanted after a code or a password was typed."""
    method = next((name for name in ("keyboard-interactive", "password") if name in wanted), None)
    if method is None:
        raise _denied(there, wanted, tried)
    if not has_terminal():
        what = "a one-time code or a password" if method == "keyboard-interactive" else "a password"
        raise UserError(
            f"{there.name} asks for {what}, and there is no terminal to type it on",
            hint="run this in a terminal; or connect once with ssh and ControlPersist, and set tunnel.client: openssh"
            + _tried(tried),
            exit_code=1,
        )
    transport.auth_timeout = TYPING
    for left in reversed(range(TRIES)):
        try:
            with _echo_kept():
                if method == "password":
                    word = _ask(f"{there.name}'s password: ", hidden=True)
                    return transport.auth_password(there.user, word, fallback=False)
                return transport.auth_interactive(there.user, _answers)
        except paramiko.BadAuthenticationType:
            raise
        except paramiko.AuthenticationException:
            tried.append(method)
            if not left or not transport.is_active():
                raise
    raise AssertionError


def _answers(title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
    for text in (title, instructions):
        if text.strip():
            _say(text.strip())
    return [_ask(prompt, hidden=not echo) for prompt, echo in prompts]


def _ask(prompt: str, *, hidden: bool) -> str:
    """An answer, typed on the terminal wherever standard input and output lead."""
    prompt = "".join(letter for letter in prompt if letter.isprintable())
    if hidden:
        return getpass.getpass(prompt)
    with open("/dev/tty", "r+b", buffering=0) as terminal:
        terminal.write(prompt.encode())
        return terminal.readline().decode(errors="replace").rstrip("\n")


def _say(text: str) -> None:
    shown = "".join(letter for letter in text if letter.isprintable() or letter == "\n")
    with suppress(OSError), open("/dev/tty", "w") as terminal:
        terminal.write(f"{shown}\n")


@contextmanager
def _echo_kept() -> Iterator[None]:
    """Ctrl-C while a code is typed in another thread would leave the terminal mute."""
    terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    try:
        before = termios.tcgetattr(terminal)
        try:
            yield
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    finally:
        os.close(terminal)


@contextmanager
def _agent(socket: str) -> Iterator[tuple[paramiko.AgentKey, ...]]:
    """The keys of the agent behind a socket; paramiko finds it by the environment alone."""
    before = os.environ.get("SSH_AUTH_SOCK")
    agent = None
    if socket:
        os.environ["SSH_AUTH_SOCK"] = socket
        try:
            with suppress(paramiko.SSHException, OSError):
                agent = paramiko.Agent()
        finally:
            if before is None:
                del os.environ["SSH_AUTH_SOCK"]
            else:
                os.environ["SSH_AUTH_SOCK"] = before
    try:
        yield agent.get_keys() if agent else ()
    finally:
        if agent:
            agent.close()


def _public(path: Path) -> bytes:
    """A key file's public half, where it lies beside it."""
    with suppress(OSError, IndexError, ValueError):
        return base64.b64decode(Path(f"{path}.pub").read_text().split()[1])
    return b""


def _unusable(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return "of a kind that paramiko cannot use; set tunnel.client: openssh"


def _shown(path: Path) -> str:
    known = {str(Path(name).expanduser()): name for name in DEFAULT_KEYS}
    return known.get(str(path), str(path))


def _tried(tried: list[str]) -> str:
    return f"\ntried: {', '.join(tried)}" if tried else ""


def _denied(there: Contact, allowed: list[str], tried: list[str]) -> UserError:
    said = ", ".join(tried) or "no key was found"
    way = "tunnel.identity names another key" if there.given_identity else "tunnel.identity names the key to use"
    hint = f"tried: {said}\nthe server takes: {', '.join(allowed) or 'nothing else'}\n"
    hint += f"{way}; its public half belongs in ~/.ssh/authorized_keys there, or with the site"
    if any(method.startswith("gssapi") for method in allowed):
        hint += "\nfor Kerberos set tunnel.client: openssh"
    return UserError(f"{there.name}: permission denied", hint=hint, exit_code=1)


def _hung_up(there: Contact, tried: list[str]) -> UserError:
    if not tried:
        hint = "the server may be overloaded or refuse this address; try again"
        return Unreachable(f"{there.name} ended the connection during the sign-in", hint=hint, exit_code=1)
    hint = f"tried: {', '.join(tried)}\nname the one that it takes in tunnel.identity"
    return UserError(f"{there.name} hung up: too many keys that it does not take", hint=hint, exit_code=1)
