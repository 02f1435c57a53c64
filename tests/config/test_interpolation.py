"""Interpolation: OmegaConf's results, our messages."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemotron_launch.config.interpolation import UNRESOLVED, resolve
from nemotron_launch.config.tree import Source, from_plain

SOURCE = Source("f.yaml", 1)


def value_of(data: dict[str, Any], env: dict[str, str] | None = None) -> Any:
    plain, problems = resolve(from_plain(data, SOURCE), env or {})
    assert problems == []
    return plain


def problem_of(data: dict[str, Any], env: dict[str, str] | None = None) -> str:
    _, problems = resolve(from_plain(data, SOURCE), env or {})
    assert len(problems) == 1
    return f"{problems[0].message} | {problems[0].hint}"


CONFIG = {
    "n": 3,
    "f": 1.5,
    "t": "text",
    "none": None,
    "flag": True,
    "deep": {"x": 1, "list": [10, 20, {"y": 5}], "again": {"up": "${..x}"}},
    "name": "deep",
    "chain": "${n}",
}


@pytest.mark.parametrize(
    "text",
    [
        "${n}",
        "${f}",
        "${none}",
        "${flag}",
        "${chain}",
        "a-${n}-${t}",
        "${t}${t}",
        "${deep.x}",
        "${deep.list.1}",
        "${deep.list[1]}",
        "${deep[list][2].y}",
        "${deep.list.2.y}",
        "${deep}",
        "${deep.list}",
        "${deep.again.up}",
        "${.n}",
        "${${name}.x}",
        "${deep.${sub}}",
        "x${none}y${flag}z${f}",
        r"\${n}",
        r"a\${n}b${n}",
        "${oc.env:SET}",
        "${oc.env:UNSET,default}",
        "${oc.env:UNSET,./a/b c}",
        "${oc.env:UNSET,3}",
        "${oc.env:UNSET,null}",
        "${oc.env:UNSET,'quo,ted'}",
        "${oc.env:UNSET,${t}}/x",
        "${oc.env:UNSET,${oc.env:SET}}",
        "${oc.decode:${oc.env:NUMBER}}",
        "${oc.decode:'[1, {a: b}]'}",
        "${oc.select:deep.x}",
        "${oc.select:nope,7}",
        "${oc.select:nope}",
        "no interpolation $n {n} $ {n}",
    ],
)
def test_values_are_omegaconf_s(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"SET": "from env", "NUMBER": "12"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)
    data = {**CONFIG, "sub": "x", "out": text}
    expected = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    assert value_of(data, dict(os.environ)) == expected


@given(
    st.lists(st.integers(-5, 5) | st.floats(-5, 5), min_size=1, max_size=4),
    st.sampled_from(["add", "mul", "max", "min"]),
)
def test_arithmetic_is_python_s(numbers: list[float], name: str) -> None:
    data: dict[str, Any] = {f"v{i}": number for i, number in enumerate(numbers)}
    data["out"] = "${%s:%s}" % (name, ",".join(f"${{v{i}}}" for i in range(len(numbers))))  # noqa: UP031
    expected: float = {"add": sum, "max": max, "min": min}.get(name, lambda v: __import__("math").prod(v))(numbers)  # type: ignore[operator]
    assert value_of(data)["out"] == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${div:${n},2}", 1.5),
        ("${div:6,2}", 3),
        ("${int:${div:${n},2}}", 1),
        ("${sub:${n},1}", 2),
        ("${mul:${n},${mul:2,${deep.x}}}", 6),
        ("${max:${n},${f},10}", 10),
        ("${mul:.5,4}", 2.0),
    ],
)
def test_nested_calls(text: str, value: object) -> None:
    read = value_of({**CONFIG, "out": text})["out"]
    assert read == value
    assert type(read) is type(value)


def test_relative_keys_start_at_the_mapping_around() -> None:
    data = {"a": {"b": {"x": 1, "same": "${.x}", "up": "${..y}", "top": "${...z}"}, "y": 2}, "z": 3}
    assert value_of(data)["a"]["b"] == {"x": 1, "same": 1, "up": 2, "top": 3}


def test_relative_keys_in_a_list_count_the_list() -> None:
    data = {"x": 5, "items": [{"a": 1, "b": "${.a}", "c": "${...x}"}, "${..x}"]}
    expected = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    assert value_of(data) == expected


def test_a_section_taken_over_resolves_where_it_was_written() -> None:
    data = {"a": {"lr": 1, "min": "${.lr}"}, "b": "${a}", "c": "${b.min}"}
    assert value_of(data) == {"a": {"lr": 1, "min": 1}, "b": {"lr": 1, "min": 1}, "c": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": "${polcy.x}", "policy": {"x": 1}}, "a: ${polcy.x} names no key | did you mean policy.x?"),
        ({"a": {"b": "${.c}"}}, "a.b: ${.c} names no key"),
        ({"a": "${.....x}"}, "a: ${.....x} leads above the top"),
        ({"a": "${oc.env:NOPE}"}, "a: the environment variable NOPE is not set | export NOPE=…"),
        ({"a": "???"}, "a has no value yet | give it: a=…"),
        ({"a": "${b}", "b": "???"}, "b has no value yet"),
        ({"a": "${nope:1}"}, "a: there is no resolver nope | there are: add, div"),
        ({"a": "${div:1,0}"}, "a: div(1, 0) has no value: division by zero"),
        ({"a": "${mul:x,2}"}, "a: mul('x', 2) has no value: 'x' is not a number"),
        ({"a": "${sub:1}"}, "a: sub(1) has no value: sub missing 1 required positional argument: 'b'"),
        ({"a": "${int:x}"}, "a: int('x') has no value: invalid literal"),
        ({"a": "${b"}, "a: a '}' is missing"),
        ({"a": "${}"}, "a: ${} is not an interpolation"),
        ({"a": "${mul:[1,2}"}, "a: ${mul:…}: cannot read"),
        ({"a": "${b" * 5000 + "}" * 5000}, "a: interpolations nested too deeply"),
        ({"a": "${a}"}, "a: interpolations in a circle: a → a"),
        ({"a": {"b": "${a}"}}, "a.b: interpolations in a circle: a.b → a"),
    ],
)
def test_what_cannot_be_resolved_is_one_message(data: dict[str, Any], message: str) -> None:
    assert problem_of(data).startswith(message)


def test_a_circle_names_its_members() -> None:
    _, problems = resolve(from_plain({"a": "${b}", "b": "x${c}", "c": "${a}"}, SOURCE), {})
    assert [p.message for p in problems] == ["a: interpolations in a circle: a → b → c → a"] or (
        len(problems) == 1 and "a → b → c → a" in problems[0].message
    )


def test_what_depends_on_a_broken_key_is_not_reported_again() -> None:
    plain, problems = resolve(from_plain({"x": "${y}", "y": "${z}", "z": "${oc.env:NOPE}", "ok": 1}, SOURCE), {})
    assert [problem.path for problem in problems] == [("z",)]
    assert plain == {"x": UNRESOLVED, "y": UNRESOLVED, "z": UNRESOLVED, "ok": 1}


def test_values_of_environment_variables_are_not_read_again() -> None:
    assert value_of({"a": "${oc.env:X}"}, {"X": "${b}"}) == {"a": "${b}"}
