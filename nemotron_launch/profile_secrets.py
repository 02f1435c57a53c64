"""The secrets of a profile: told apart from its other environment variables before any value is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemotron_launch.config import tree
from nemotron_launch.config.tree import Node
from nemotron_launch.config.validation import Problem
from nemotron_launch.frozen import frozen
from nemotron_launch.job import Secret
from nemotron_launch.secret_names import is_secret_name

_OC_ENV = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)\s*(?:,\s*(.*?)\s*)?\}", re.DOTALL)
_MENTION = re.compile(r"oc\.env\s*:\s*['\"]?([A-Za-z_]\w*)")
_NOTHING = ("", "''", '""', "null")


@frozen
class Secrets:
    """What `secrets:` and `env:` say of secrets.

    from_env: those that `env:` takes from a variable. declared: name → variable. public: those that are none.
    """

    from_env: Mapping[str, Secret]
    declared: Mapping[str, str]
    public: frozenset[str]

    @property
    def sources(self) -> frozenset[str]:
        """The variables of the submitting machine that hold their values."""
        return frozenset(self.declared.values()) | {secret.source for secret in self.from_env.values()}

    def all(self, declared: Mapping[str, Any] | list[Any]) -> tuple[Secret, ...]:
        """Every secret by name. declared: `secrets:` resolved; what it says of one goes over what `env:` says."""
        found = dict(self.from_env)
        for name, said in declared.items() if isinstance(declared, dict) else ():
            if said is False:
                continue
            known = found.get(name, Secret(name))
            said = said or {}
            found[name] = Secret(
                name,
                source=said.get("env") or known.source or name,
                reference=said.get("reference", ""),
                optional=said.get("optional") or known.optional,
            )
        return tuple(found[name] for name in sorted(found))

    def problems_in(self, config: Node | None) -> Iterator[Problem]:
        """Secrets that the profile's `config:` asks for by name."""
        if config is None:
            return
        for path, leaf in tree.leaves(config, ("config",)):
            for name in _MENTION.findall(leaf.value) if isinstance(leaf.value, str) else ():
                if name in self.sources or (is_secret_name(name) and name not in self.public):
                    text = f"{'.'.join(path)}: {name} is a secret: its value is not written anywhere"
                    yield Problem(path, text, f"the job finds it in its environment with  secrets: [{name}]")


def take_secrets(profile: Node) -> tuple[Node, Secrets, list[Problem]]:
    """Take the secrets out of a profile's `env:`; a value is looked at only to see that it is `${oc.env:NAME}`."""
    declared = profile.value.get("secrets")
    said = declared.value if declared is not None and isinstance(declared.value, dict) else {}
    public = frozenset(name for name, node in said.items() if node.value is False)
    sources = {name: _source(name, node) for name, node in said.items() if name not in public}
    env = profile.value.get("env")
    if env is None or not isinstance(env.value, dict):
        return profile, Secrets({}, sources, public), []
    kept: dict[str, Node] = {}
    found: dict[str, Secret] = {}
    problems: list[Problem] = []
    for name, node in env.value.items():
        if name in public or not (is_secret_name(name) or name in sources):
            kept[name] = node
        elif node.value is not None and node.value != "":
            match = _OC_ENV.fullmatch(node.value.strip()) if isinstance(node.value, str) else None
            if match and (match[2] is None or match[2] in _NOTHING):
                found[name] = Secret(name, source=match[1], optional=match[2] is not None)
            else:
                problems.append(_value_written(name))
    profile = Node({**profile.value, "env": Node(kept, env.source)}, profile.source)
    return profile, Secrets(found, sources, public), problems


def _source(name: str, said: Node) -> str:
    given = said.value.get("env") if isinstance(said.value, dict) else None
    return str(given.value) if given is not None else name


def _value_written(name: str) -> Problem:
    return Problem(
        ("env", name),
        f"env.{name} is a secret by its name: a profile does not hold its value",
        f"export {name}=… where you submit, and write  secrets: [{name}]\nif it is none:  secrets: {{{name}: false}}",
    )
