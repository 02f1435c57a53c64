"""Host keys that are known: whether a server is the one that it was, and what to say when it is not."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen


@frozen
class Known:
    """A line of a known_hosts file. marker: empty, cert-authority or revoked; key: base64."""

    marker: str
    kind: str
    key: str
    where: str


def known_keys(files: Iterable[Path], name: str) -> list[Known]:
    """The lines that are about a host, by its name there: host, or [host]:port where the port is not 22."""
    return [known for known, patterns in _lines(files) if _matches(patterns, name)]


def check(kind: str, key: bytes, known: list[Known], *, host: str, name: str, files: tuple[Path, ...]) -> None:
    """Refuse a host key that is not among the known ones.

    kind: ssh-ed25519, …; key: its public half as on the wire; host: as people know it; name: as known_hosts has it.
    """
    text = base64.b64encode(key).decode()
    text, seen = base64.b64encode(key).decode(), shown(kind, fingerprint(key))
    for line in known:
        if line.marker == "revoked" and line.key == text:
            hint = f"{line.where} says so; do not connect, ask the site"
            raise UserError(f"the host key of {host} is revoked: {seen}", hint=hint, exit_code=1)
    plain = [line for line in known if not line.marker]
    if not plain:
        raise unknown(seen, known, host=host, name=name, files=files)
    if all(line.key != text for line in plain):
        raise changed(seen, known, host=host, name=name)


def unknown(seen: str, known: list[Known], *, host: str, name: str, files: tuple[Path, ...]) -> UserError:
    """What to say of a host whose key was never seen."""
    hint = "compare the fingerprint with the one that the site publishes; when it is the same, connect once by hand\n"
    hint += f"and answer yes: {_by_hand(host, name)}"
    if any(line.marker == "cert-authority" for line in known):
        hint += "\n(a certificate of the host is trusted; to use it, set tunnel.client: openssh)"
    where = str(files[0]) if files else "known_hosts"
    return UserError(f"the host key of {host} is not in {where}: {seen}", hint=hint, exit_code=1)


def changed(seen: str, known: list[Known], *, host: str, name: str) -> UserError:
    """What to say of a host whose key is another one than before."""
    where = next(line.where for line in known if not line.marker)
    hint = f"""\
{where} has another one. Somebody may be between you and the host, and read all that you send;
or the site has renewed its key. Ask the site for the new fingerprint. Only when it is this one:
ssh-keygen -R '{name}' -f {where.rpartition(":")[0]}, then connect once by hand: {_by_hand(host, name)}"""
    return UserError(f"THE HOST KEY OF {host} HAS CHANGED: it shows {seen}", hint=hint, exit_code=1)


def shown(kind: str, fingerprint: str) -> str:
    """A key as people compare it: ED25519 SHA256:…"""
    return f"{kind.removeprefix('ssh-').split('-')[0].upper()} {fingerprint}"


def fingerprint(key: bytes) -> str:
    """As ssh shows it: SHA256:…"""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


def _by_hand(host: str, name: str) -> str:
    port = re.fullmatch(r"\[.*\]:(\d+)", name)
    return f"ssh {f'-p {port[1]} ' if port else ''}{host}"


def _lines(files: Iterable[Path]) -> Iterator[tuple[Known, str]]:
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            parts = line.split()
            if not parts or parts[0].startswith("#"):
                continue
            marker = parts.pop(0)[1:] if parts[0].startswith("@") else ""
            if len(parts) >= 3:
                yield Known(marker, parts[1], parts[2], f"{file}:{number}"), parts[0]


def _matches(patterns: str, name: str) -> bool:
    if patterns.startswith("|1|"):
        salt, _, digest = patterns[3:].partition("|")
        try:
            made = hmac.new(base64.b64decode(salt), name.encode(), hashlib.sha1).digest()
            return hmac.compare_digest(made, base64.b64decode(digest))
        except ValueError:
            return False
    found = False
    for pattern in patterns.split(","):
        negated = pattern.startswith("!")
        # Only * and ? are special there.
        escaped = pattern.lstrip("!").replace("[", "[[]").lower()
        if fnmatch.fnmatchcase(name.lower(), escaped):
            if negated:
                return False
            found = True
    return found
