"""What the tests of the steps share: the schemas as any other tool reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from nemotron_launch.resources import steps_dir


@pytest.fixture(scope="session")
def standard() -> Callable[[Path], Draft202012Validator]:
    """A schema file as an editor reads it, by the standard alone, relative references and all."""
    files = [*steps_dir().glob("schemas/*.json"), *steps_dir().glob("**/schema.json")]
    registry: Registry[Any] = Registry().with_resources(
        (file.as_uri(), Resource.from_contents(json.loads(file.read_text()))) for file in files
    )
    return lambda path: Draft202012Validator({"$ref": path.as_uri()}, registry=registry)
