"""What ~/.ssh/config and a profile's `tunnel` together say of a host: where it is, as whom, with which keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from getpass import getuser
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen

CONFIG = "NEMOTRON_SSH_CONFIG"  # a file in place of ~/.ssh/config, as ssh -F
DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")


@frozen
class Contact:
    """How to reach a host. identities: private key files, in order; identities_only: no other keys of the agent.

    asked: the name that the profile gives, of which ~/.ssh/config may make another hostname. jumps: hosts on the way.
    """

    asked: str
    hostname: str
    port: int
    user: str
    identities: tuple[Path, ...]
    identities_only: bool
    given_identity: bool
    jumps: tuple[str, ...]
    proxy_command: str
    known_hosts: tuple[Path, ...]
    host_key_alias: str
    agent: str
    shares_connection: bool

    @property
    def name(self) -> str:
        return f"{self.user}@{self.asked}"

    @property
    def known_as(self) -> str:
        """Its name in known_hosts."""
        if self.host_key_alias:
            return self.host_key_alias
        return self.hostname.lower() if self.port == 22 else f"[{self.hostname.lower()}]:{self.port}"


def contact(tunnel: Mapping[str, Any]) -> Contact:
    """The settings for a profile's tunnel: what it says, else ~/.ssh/config, else ssh's defaults."""
    host = plain(str(tunnel.get("host") or ""), "tunnel.host")
    user = plain(str(tunnel["user"]), "tunnel.user") if tunnel.get("user") else ""
    said = _said(host, user, tunnel.get("port"))

    def one(key: str) -> str:
        value = said.get(key, [""])[0]
        return "" if value.lower() == "none" else value

    identity = tunnel.get("identity")
    if identity:
        identities: tuple[Path, ...] = (Path(str(identity)).expanduser(),)
        if not identities[0].is_file():
            hint = "name a private key's file, or leave tunnel.identity out: then the agent and ~/.ssh/config say"
            raise UserError(f"no key {identity}", where="tunnel.identity", hint=hint)
    else:
        identities = tuple(Path(name).expanduser() for name in said.get("identityfile", DEFAULT_KEYS))
    jumps = tunnel.get("proxy_jump") or one("proxyjump")
    known = " ".join(said.get("userknownhostsfile", ["~/.ssh/known_hosts"])).split()
    known += " ".join(said.get("globalknownhostsfile", ["/etc/ssh/ssh_known_hosts"])).split()
    return Contact(
        asked=host,
        hostname=one("hostname") or host,
        port=int(tunnel.get("port") or one("port") or 22),
        user=user or one("user") or getuser(),
        identities=identities,
        identities_only=bool(identity) or one("identitiesonly") == "yes",
        given_identity=bool(identity),
        jumps=() if str(jumps).lower() == "none" else tuple(filter(None, str(jumps or "").split(","))),
        proxy_command="" if tunnel.get("proxy_jump") else one("proxycommand"),
        known_hosts=tuple(Path(name).expanduser() for name in known),
        host_key_alias=one("hostkeyalias"),
        agent=_agent(one("identityagent")),
        shares_connection=bool(one("controlpath")),
    )


def jump(text: str) -> dict[str, Any]:
    """A host on the way, [user@]host[:port] or ssh://…, as a tunnel of its own."""
    found = re.fullmatch(r"(?:ssh://)?(?:([^@]+)@)?(\[[^]]+\]|[^:]+)(?::(\d+))?/?", text.strip())
    if not found:
        raise UserError(f"{text!r} is no host", where="tunnel.proxy_jump", hint="write [user@]host[:port],…, as ssh -J")
    user, host, port = found.groups()
    return {"host": host.strip("[]"), "user": user, "port": int(port) if port else None}


def config_arguments() -> list[str]:
    """What makes ssh read another config than ~/.ssh/config."""
    return ["-F", os.environ[CONFIG]] if os.environ.get(CONFIG) else []


def has_terminal() -> bool:
    """Whether somebody can be asked for a password or a code."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def plain(text: str, key: str) -> str:
    """A host's or user's name that ssh takes for nothing else."""
    if not text or text.startswith("-") or re.search(r"[\s\0'\"`$\\;&<>|(){}]", text) or not text.isprintable():
        raise UserError(f"{text!r} is no name for SSH", where=key)
    return text


def _said(host: str, user: str, port: object) -> dict[str, list[str]]:
    """ssh's own view of the config, by lower-case keyword: it knows Include, Match and tokens."""
    if not shutil.which("ssh"):
        return {}
    command = ["ssh", "-G", *config_arguments()]
    command += ["-l", user] if user else []
    command += ["-p", str(port)] if port else []
    try:
        done = subprocess.run([*command, host], stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    except subprocess.TimeoutExpired:
        raise UserError("ssh -G did not answer within 20 seconds", where=host, hint="try: ssh -G " + host) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["ssh -G gave no reason"]
        raise UserError(lines[0], where=host, hint="see man ssh_config")
    said: dict[str, list[str]] = {}
    for line in os.fsdecode(done.stdout).splitlines():
        key, _, value = line.partition(" ")
        said.setdefault(key, []).append(value)
    return said


def _agent(said: str) -> str:
    if not said or said == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK", "")
    return os.environ.get(said[1:].strip("{}"), "") if said.startswith("$") else str(Path(said).expanduser())
