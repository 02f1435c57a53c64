"""Hydra's override grammar."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_launch.config.overrides import dump_value, parse_arguments, parse_override, parse_value
from nemotron_launch.errors import UserError


@pytest.mark.parametrize(
    ("text", "operation", "path", "value"),
    [
        ("a.b=1", "set", ("a", "b"), 1),
        ("+a.b=1", "add", ("a", "b"), 1),
        ("++a.b=1", "force", ("a", "b"), 1),
        ("~a.b", "delete", ("a", "b"), None),
        ("~a.b=1", "delete", ("a", "b"), 1),
        ("a[0].b=1", "set", ("a", "0", "b"), 1),
        ("a.0.b=1", "set", ("a", "0", "b"), 1),
        ("a-b.c_d=x", "set", ("a-b", "c_d"), "x"),
    ],
)
def test_marks_choose_the_operation(text: str, operation: str, path: tuple[str, ...], value: object) -> None:
    override = parse_override(text)
    assert (override.operation, override.path, override.value) == (operation, path, value)


# What hydra-core 1.3 makes of the same words.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("1_000", 1000),
        ("007", "007"),
        ("1e-6", 1e-6),
        ("1.0e-6", 1e-6),
        (".5", 0.5),
        ("5.", 5.0),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("None", "None"),
        ("yes", "yes"),
        ("", ""),
        ("  padded  ", "padded"),
        ("two words", "two words"),
        ("/data/a-b/c.jsonl", "/data/a-b/c.jsonl"),
        ("s3://bucket/x:1", "s3://bucket/x:1"),
        ("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
        ("a=b", "a=b"),
        ("'1'", "1"),
        ('"a, b"', "a, b"),
        (r"'it\'s'", "it's"),
        (r"'C:\new'", r"C:\new"),
        (r"'ends in \\'", "ends in \\"),
        (r"a\,b", "a,b"),
        (r"\ x", " x"),
        ("[]", []),
        ("[1, 2.5,x y,'z,']", [1, 2.5, "x y", "z,"]),
        ("{}", {}),
        ("{x:1, y:[a,b], z: {w: null}}", {"x": 1, "y": ["a", "b"], "z": {"w": None}}),
        ("{a: http://h:80/p}", {"a": "http://h:80/p"}),
        ("${a.b}", "${a.b}"),
        ("${oc.env:X,'a}b'}/sub", "${oc.env:X,'a}b'}/sub"),
        ("[${a},${mul:${b},2}]", ["${a}", "${mul:${b},2}"]),
        ("naïve ☃", "naïve ☃"),
    ],
)
def test_values_are_typed_as_hydra_types_them(text: str, value: object) -> None:
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_float() -> None:
    assert math.isnan(parse_value("nan"))


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("a", 2, "'='"),
        ("=1", 1, "a key"),
        ("a..b=1", 3, "a key"),
        ("a b=1", 2, "'.' or '='"),
        ("model/name=x", 6, "a key with dots"),
        ("a=1,2", 4, "one value"),
        ("a=choice(1,2)", 9, "no '('"),
        ("a=[1,2", 7, "',' or ']'"),
        ("a=[1,,2]", 6, "a value"),
        ("a=[1,]", 6, "a value"),
        ("a={x}", 5, "':' and a value"),
        ("a={x:1,x:2}", 8, "not there yet"),
        ("a='x", 3, "closing '"),
        ("a='x'y", 6, "the end"),
        ("a=${b", 3, "'}'"),
        ("a=x]", 4, "the end"),
        ("a[x]=1", 3, "a list index"),
    ],
)
def test_an_error_shows_the_position_and_what_was_expected(text: str, position: int, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_override(text)
    assert expected in caught.value.message
    pointer = (caught.value.hint or "").splitlines()[-1]
    assert pointer.endswith(f"^ position {position}")
    assert pointer.index("^") == position - 1
    assert caught.value.exit_code == 2


def test_a_long_override_is_shown_around_the_error() -> None:
    with pytest.raises(UserError) as caught:
        parse_override("a=" + "x" * 500 + "(")
    line, pointer = (caught.value.hint or "").splitlines()
    assert len(line) < 100
    assert line[pointer.index("^")] == "("


def test_endless_nesting_is_one_message() -> None:
    with pytest.raises(UserError, match="less nesting"):
        parse_override("a=" + "[" * 100_000)


def test_arguments_of_a_resolver_are_values() -> None:
    assert parse_arguments("RL_OUTPUT_DIR,./output/rl") == ["RL_OUTPUT_DIR", "./output/rl"]
    assert parse_arguments("1, 2.5,'x,y',${a}") == [1, 2.5, "x,y", "${a}"]
    assert parse_arguments("X,") == ["X", ""]
    assert parse_arguments("") == []


_text = st.text(max_size=20)
_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _text
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text.filter(bool), inner, max_size=4),
    max_leaves=8,
)


@given(_values.filter(lambda value: "${" not in repr(value)))
def test_what_is_written_is_read_back(value: object) -> None:
    read = parse_value(dump_value(value))
    assert read == value
    assert repr(read) == repr(value)


@given(_text)
def test_any_text_is_a_value_or_one_clear_error(text: str) -> None:
    try:
        parse_override(f"a={text}")
    except UserError as error:
        assert "expected" in error.message


@given(_text)
def test_any_word_is_an_override_or_one_clear_error(text: str) -> None:
    try:
        parse_override(text)
    except UserError as error:
        assert "^ position" in (error.hint or "")
