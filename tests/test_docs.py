"""The generated pages are those that the manifests make, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps_page_is_what_the_manifests_make() -> None:
    assert (ROOT / "docs" / "steps.md").read_text(encoding="utf-8") == load("generate_steps").page(), (
        "run: python docs/generate_steps.py"
    )


def test_profiles_page_has_the_keys_of_the_schema() -> None:
    assert (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8") == load("generate_profiles").page(), (
        "run: python docs/generate_profiles.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
