"""Writes the keys of docs/profiles.md from the schema of profiles. Run it after changing one; a test compares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron_launch.profile_files import executor_schemas
from nemotron_launch.profiles import REQUIRED, UNUSED

PAGE = Path(__file__).with_name("profiles.md")
BEGIN, END = "<!-- keys: made by docs/generate_profiles.py -->\n", "<!-- /keys -->"
_HEAD = "| key | takes | default | |\n|---|---|---|---|"
_KINDS = {"integer": "whole number", "string": "text", "boolean": "true, false", "array": "list", "object": "mapping"}


def page() -> str:
    """The whole page: what stands around the keys stays as it is."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}{keys()}{END}{rest.split(END)[1]}"


def keys() -> str:
    """Every key with what it takes and its default, grouped by the executors that use it."""
    parts = {name: part.tree["properties"] for name, part in executor_schemas().items()}
    every = [key for key in parts["local"] if all(parts["local"][key] == part.get(key) for part in parts.values())]
    cluster = [key for key in parts["slurm"] if key not in every and parts["slurm"][key] == parts["lepton"].get(key)]
    groups = [("Every executor", ["executor", *every], parts["slurm"]), ("Slurm and Lepton", cluster, parts["slurm"])]
    for name, part in parts.items():
        shared = {"executor", *every, *(cluster if name != "local" else ())}
        own = [key for key in part if key not in shared]
        groups.append((f"{name.title()} only", own, part))
    text = ""
    for title, names, part in groups:
        rows = "\n".join(row for name in names for row in _rows(name, part[name]))
        text += f"\n### {title}\n\n{_HEAD}\n{rows}\n"
    needed = "; ".join(f"{name}: {', '.join(f'`{key}`' for key in names)}" for name, names in REQUIRED.items())
    reasons = "".join(f"- `{key}` with {name}: {reason}.\n" for (name, key), reason in UNUSED.items())
    return (
        f"{text}\nNeeded, in the profile or one that it extends: {needed}.\n\nNot used, and so refused:\n\n{reasons}\n"
    )


def _rows(name: str, part: dict[str, Any]) -> Iterator[str]:
    default = f"`{json.dumps(part['default'], ensure_ascii=False)}`" if "default" in part else ""
    takes = "local, slurm or lepton" if name == "executor" else _takes(part)
    yield f"| `{name}` | {_cell(takes)} | {_cell(default)} | {_cell(part['description'])} |"
    for branch in (part, *part.get("anyOf", ())):
        for below, sub in branch.get("properties", {}).items():
            yield from _rows(f"{name}.{below}", sub)
        for holder, mark in ((branch.get("additionalProperties"), "NAME"), (branch.get("items"), "N")):
            for inner in (holder, *holder.get("anyOf", ())) if isinstance(holder, dict) else ():
                for below, sub in inner.get("properties", {}).items():
                    yield from _rows(f"{name}.{mark}.{below}", sub)


def _takes(part: dict[str, Any]) -> str:
    if "x-alias-of" in part:
        return f"as {part['x-alias-of']}"
    if "enum" in part:
        return ", ".join(map(str, part["enum"]))
    if "const" in part:
        return json.dumps(part["const"])
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(_takes(branch) for branch in part["anyOf"] if branch.get("type") != "null"))
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    said = " or ".join(_KINDS.get(kind, kind) for kind in kinds if kind != "null")
    low, high = part.get("minimum"), part.get("maximum")
    if low is not None and high is not None:
        return f"{said}, {low} to {high}"
    return f"{said}, at least {low}" if low is not None else said


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
