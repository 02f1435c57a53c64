"""Verifies that an answer is JSON that a schema allows. In a worker: a schema's patterns may take for ever.

Row: `json_schema` (or `schema`): the schema, as an object or as text. The JSON is the last fenced block of the answer,
or all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry

from nemotron_launch.trainer.environments import Score
from nemotron_launch.trainer.environments.answers import without_thoughts

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def problem(row: Mapping[str, Any]) -> str:
    """Why a row cannot be verified; empty if it can."""
    try:
        schema = _schema(row)
    except ValueError as error:
        return str(error)
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        at = "/".join(str(part) for part in error.absolute_path)
        return f"json_schema is no JSON schema ({at + ': ' if at else ''}{error.message[:200]})"
    elsewhere = next((ref for ref in _references(schema) if not ref.startswith("#")), "")
    return f"json_schema refers to another document ({elsewhere})" if elsewhere else ""


def verify(text: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Score:
    """1 for JSON that the schema allows, else 0; components: whether it is JSON at all."""
    said = without_thoughts(text)
    fenced = _FENCED.findall(said)
    try:
        value = json.loads(fenced[-1] if fenced else said, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return Score(0.0, components={"valid_json": 0.0})
    schema = _schema(row)
    validator = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())
    return Score(float(validator.is_valid(value)), components={"valid_json": 1.0})


def _schema(row: Mapping[str, Any]) -> Any:
    """The row's schema. Raises ValueError, in words for the user."""
    schema = row.get("json_schema") if row.get("json_schema") is not None else row.get("schema")
    if schema is None:
        raise ValueError("missing key json_schema or schema")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"json_schema is not valid JSON ({error})") from None
    if not isinstance(schema, Mapping | bool):
        raise ValueError("json_schema is no object")
    return schema


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for key in ("$ref", "$dynamicRef"):
            if isinstance(schema.get(key), str):
                yield schema[key]
        for inner in schema.values():
            yield from _references(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _references(inner)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
