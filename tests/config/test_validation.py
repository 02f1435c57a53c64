"""Checking a config against its schema: what jsonschema finds, in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from nemotron_launch.config.schema import Schema, load_schema
from nemotron_launch.config.validation import check
from nemotron_launch.errors import UserError

PART: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "steps": {"type": "integer", "minimum": 1, "maximum": 10},
        "rate": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "size": {"type": ["integer", "null"], "multipleOf": 4},
        "name": {"type": "string", "minLength": 1, "maxLength": 5, "pattern": "^[a-z]+$"},
        "on": {"type": "boolean"},
        "kind": {"enum": ["adam", "sgd", None, 3]},
        "packing": {"const": False, "x-unsupported": "sequences are padded"},
        "list": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3, "uniqueItems": True},
        "either": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "one": {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 5}]},
        "free": {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "propertyNames": {"pattern": "^[A-Z]+$"},
        },
        "inner": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "required": ["path"],
            "properties": {"path": {"type": "string"}, "n": {"type": "integer"}},
        },
    },
}
SCHEMA = Schema(Path("schema.json"), PART)


def message(data: dict[str, Any]) -> str:
    problems = check(SCHEMA, data)
    assert len(problems) == 1
    problem = problems[0]
    return problem.message + (f" | {problem.hint}" if problem.hint else "")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"stepz": 1}, "unknown key stepz | did you mean steps?"),
        ({"inner": {"path": "x", "nn": 1}}, "unknown key inner.nn | did you mean inner.n?"),
        ({"inner": {"n": 1}}, "inner.path is missing"),
        ({"path": "x"}, "unknown key path | did you mean inner.path?"),
        ({"steps": "5"}, "steps must be a whole number, got the text '5' | it is text; leave out the quotes"),
        ({"steps": "x"}, "steps must be a whole number, got the text 'x'"),
        ({"steps": 5.0}, "steps must be a whole number, got the number 5.0 | write 5"),
        ({"steps": True}, "steps must be a whole number, got true"),
        ({"steps": None}, "steps must be a whole number, got null"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 11}, "steps must be at most 10, got 11"),
        ({"rate": 0}, "rate must be greater than 0, got 0"),
        ({"rate": 1.0}, "rate must be less than 1, got 1.0"),
        ({"size": 6}, "size must be a multiple of 4, got 6"),
        ({"size": "x"}, "size must be a whole number or null, got the text 'x'"),
        ({"name": 3}, "name must be text, got the number 3 | quotes make it text: '3'"),
        ({"name": ""}, "name may not be empty"),
        ({"name": "A"}, "name must match ^[a-z]+$, got 'A'"),
        ({"on": "true"}, "on must be true or false, got the text 'true' | it is text; leave out the quotes"),
        ({"kind": "adm"}, "kind must be one of adam, sgd, null, 3; got adm | did you mean adam?"),
        ({"packing": True}, "packing=true is not implemented: sequences are padded | leave it false"),
        ({"list": 1}, "list must be a list, got the number 1"),
        ({"list": []}, "list needs at least 1 entries, got 0"),
        ({"list": [1, "x"]}, "list.1 must be a whole number, got the text 'x'"),
        ({"list": [1, 1]}, "list has the same entry twice"),
        ({"either": 1}, "either must be text or a list, got the number 1"),
        ({"either": ["a", 1]}, "either.1 must be text, got the number 1 | quotes make it text: '1'"),
        ({"one": 7}, "one fits several of the forms that exclude each other"),
        ({"free": {"A": "x"}}, "free.A must be a whole number, got the text 'x'"),
        ({"free": {"a": 1}}, "the key free.a is not allowed: free.a must match ^[A-Z]+$, got 'a'"),
        ({"inner": [1]}, "inner must be a mapping or null, got a list [1]"),
    ],
)
def test_each_problem_has_its_words(data: dict[str, Any], expected: str) -> None:
    assert message(data).startswith(expected)


def test_numbers_may_be_written_whole() -> None:
    data = {"rate": 0.5, "one": 3}
    assert check(SCHEMA, data) == []
    assert check(Schema(Path("s"), {"properties": {"x": {"type": "number"}}}), {"x": 1}) == []


def test_all_problems_are_found_at_once() -> None:
    problems = check(SCHEMA, {"steps": 0, "name": "", "inner": {"n": "x"}, "nope": 1})
    assert [".".join(p.path) for p in problems] == ["steps", "name", "inner", "inner.n", "nope"]


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 12)
    | st.floats(-1, 6)
    | st.sampled_from(["", "a", "abcdef", "adam", "X"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["A", "a", "path", "n", "x"]), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*PART["properties"], "other"]), _json, max_size=4))
@settings(max_examples=400)
def test_what_is_refused_is_what_jsonschema_refuses(data: dict[str, Any]) -> None:
    if any(isinstance(v, float) and v.is_integer() for v in _scalars(data)):
        return  # 3.0 is a whole number to JSON Schema; here it is none, because it stays a float in the trainer
    ours = check(SCHEMA, data)
    theirs = list(Draft202012Validator(PART).iter_errors(data))
    assert bool(ours) == bool(theirs)
    if theirs:
        paths = {".".join(problem.path).split(".")[0] for problem in ours}
        top = {str(error.absolute_path[0]) if error.absolute_path else "" for error in theirs}
        assert paths - {"other"} == top - {""}


def _scalars(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _scalars(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _scalars(item)]
    return [value]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "part.json").write_text(
        json.dumps(
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {"a": {"type": "integer", "default": 1}, "b": {"$ref": "#/$defs/b"}},
                "$defs": {"b": {"type": "string", "default": "x"}},
            }
        )
    )
    return tmp_path


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_references_lead_to_other_files(folder: Path, data: st.DataObject) -> None:
    (folder / "schema.json").write_text(json.dumps({"properties": {"p": {"$ref": "schemas/part.json"}}}))
    value = data.draw(st.sampled_from([({"a": 1}, 0), ({"a": "x"}, 1), ({"b": 1}, 1), ({"c": 1}, 1)]))
    assert len(check(load_schema(folder / "schema.json"), {"p": value[0]})) == value[1]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ('{"properties": {"x": {"tpye": "integer"}}}', "uses tpye"),
        ('{"$ref": "nope.json"}', "cannot be read"),
        ('{"$ref": "#/$defs/x"}', "refers to #/$defs/x, which is not there"),
        ('{"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}', "refers to itself"),
        ("{", "is not JSON"),
    ],
)
def test_a_broken_schema_is_named(folder: Path, schema: str, text: str) -> None:
    (folder / "schema.json").write_text(schema)
    with pytest.raises(UserError, match="schema") as caught:
        load_schema(folder / "schema.json")
    assert text in caught.value.message


def test_a_changed_schema_is_read_again(folder: Path) -> None:
    import os

    (folder / "schema.json").write_text(json.dumps({"properties": {"p": {"$ref": "schemas/part.json"}}}))
    assert check(load_schema(folder / "schema.json"), {"p": {"a": "x"}})
    part = folder / "schemas" / "part.json"
    part.write_text(json.dumps({"type": "object"}))
    os.utime(part, ns=(1, 1))
    assert check(load_schema(folder / "schema.json"), {"p": {"a": "x"}}) == []
