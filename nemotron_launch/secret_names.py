"""Which environment variables are secrets, and an environment that does not give their values away."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from nemotron_launch.config.interpolation import _Unresolvable

# Whole words of a name, so that TOKENIZERS_PARALLELISM is none. TOKENS counts tokens (MAX_TOKENS) and is left out.
_WORDS = frozenset(
    "KEY KEYS APIKEY TOKEN SECRET SECRETS PASSWORD PASSWORDS PASSWD CREDENTIAL CREDENTIALS".split()  # noqa: SIM905
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret: one of its words, cut at `_`, says so. Case does not matter."""
    return not _WORDS.isdisjoint(name.upper().split("_"))


class GuardedEnvironment(Mapping[str, str]):
    """An environment for `${oc.env:…}` that refuses secrets by name, set or not, before their values are read.

    declared: variables that are secrets whatever their name; public: those that are none, whatever it says.
    """

    def __init__(self, env: Mapping[str, str], declared: Collection[str] = (), public: Collection[str] = ()) -> None:
        self._env = env
        self._declared = frozenset(declared)
        self._public = frozenset(public)

    def _refuses(self, name: str) -> bool:
        return name in self._declared or (is_secret_name(name) and name not in self._public)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._refuses(name) or name in self._env)

    def __getitem__(self, name: str) -> str:
        if self._refuses(name):
            raise _Unresolvable(
                f"{name} is a secret: its value is not written anywhere",
                f"the job finds it in its environment with  secrets: [{name}]\n"
                f"under another name with  secrets: {{NAME: {{env: {name}}}}}",
            )
        return self._env[name]

    def __iter__(self) -> Iterator[str]:
        return iter(name for name in self._env if not self._refuses(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)
