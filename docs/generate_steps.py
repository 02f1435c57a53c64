"""Writes docs/steps.md from the steps' manifests. Run it after changing one; a test compares."""

from __future__ import annotations

import json
from pathlib import Path

from nemotron_launch.catalog import Step, load_artifacts, load_steps

PAGE = Path(__file__).with_name("steps.md")


def page() -> str:
    """The whole page."""
    parts = [
        "# Steps\n\nMade by `docs/generate_steps.py` from the manifests; `nemotron steps show ID` prints the same.\n",
        *(_step(step) for step in load_steps()),
        "## Artifact types\n\n| type | what it is | is a |\n|---|---|---|\n" + "".join(_artifact_rows()),
    ]
    return "\n".join(parts)


def _step(step: Step) -> str:
    lines = [f"## {step.id}\n", step.description.strip() + "\n"]
    if step.note:
        lines.append(f"**{step.note}**\n")
    lines.append(f"Configs: {', '.join(f'`{name}`' for name in step.configs())}. Image: `{step.image}`.\n")
    lines.append("| | type | config key | |\n|---|---|---|---|")
    for word, ports in (("consumes", step.consumes), ("produces", step.produces)):
        for port in ports:
            optional = "" if port.required else " (optional)"
            lines.append(f"| {word}{optional} | `{port.type}` | `{port.key}` | {_cell(port.description)} |")
    lines.append("\n| parameter | default | |\n|---|---|---|")
    for parameter in step.parameters:
        lines.append(f"| `{parameter.name}` | {_default(parameter.default)} | {_cell(parameter.description)} |")
    lines.append("\n| when | then |\n|---|---|")
    lines.extend(f"| {_cell(strategy.when)} | {_cell(strategy.then)} |" for strategy in step.strategies)
    lines.append("\n| error | what it means | what to do |\n|---|---|---|")
    lines.extend(f"| `{error.name}` | {_cell(error.meaning)} | {_cell(error.recovery)} |" for error in step.errors)
    return "\n".join(lines) + "\n"


def _artifact_rows() -> list[str]:
    return [
        f"| `{name}` | {_cell(artifact.description)} | {f'`{artifact.is_a}`' if artifact.is_a else ''} |\n"
        for name, artifact in load_artifacts().items()
    ]


def _default(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
