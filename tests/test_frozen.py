"""Frozen records behave as frozen dataclasses do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from nemotron_launch.frozen import field, frozen, replace


@frozen
class Ours:
    """Fields of every kind."""

    name: str
    size: int = 3
    tags: dict[str, int] = field(default_factory=dict)
    hidden: int = field(default=0, repr=False)

    @property
    def double(self) -> int:
        return 2 * self.size


@dataclasses.dataclass(frozen=True)
class Theirs:
    name: str
    size: int = 3
    tags: dict[str, int] = dataclasses.field(default_factory=dict)
    hidden: int = dataclasses.field(default=0, repr=False)


@pytest.mark.parametrize(
    ("given", "named"),
    [(("a",), {}), (("a", 1), {}), ((), {"name": "a"}), (("a",), {"tags": {"x": 1}}), (("a", 1, {}, 2), {})],
)
def test_a_record_has_the_values_the_repr_and_the_data_of_a_dataclass(given: tuple[Any, ...], named: Any) -> None:
    ours, theirs = Ours(*given, **named), Theirs(*given, **named)
    assert vars(ours) == vars(theirs)
    assert repr(ours) == repr(theirs).replace("Theirs", "Ours")
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    assert [one.name for one in dataclasses.fields(ours)] == [one.name for one in dataclasses.fields(theirs)]


def test_records_are_equal_by_their_values_and_their_class() -> None:
    assert Ours("a") == Ours("a", 3)
    assert Ours("a") != Ours("b")
    assert Ours("a") != Theirs("a")
    assert len({Point(1), Point(1), Point(2)}) == 2


@frozen
class Point:
    x: int


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ours("a").name = "b"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del Ours("a").name
    assert replace(Ours("a"), size=5).double == 10
    assert dataclasses.replace(Ours("a"), size=5) == Ours("a", 5)


@pytest.mark.parametrize("named", [{}, {"nam": 1}, {"name": 1, "other": 2}])
def test_missing_and_unknown_fields_are_refused(named: Any) -> None:
    with pytest.raises(TypeError, match="Ours"):
        Ours(**named)
    with pytest.raises(TypeError):
        Ours("a", 1, {}, 0, 5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Ours("a", name="b")  # type: ignore[misc]


def test_two_records_do_not_share_a_default() -> None:
    assert Ours("a").tags is not Ours("a").tags


def test_copies_and_pickles_are_equal() -> None:
    record = Point(1)
    assert copy.deepcopy(record) == pickle.loads(pickle.dumps(record)) == record
