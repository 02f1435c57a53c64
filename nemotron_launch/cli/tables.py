"""How steps look: rich tables on a terminal, the same as plain text in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from nemotron_launch.resources import display

if TYPE_CHECKING:
    from nemotron_launch.catalog import Port, Step, Strategy
    from nemotron_launch.profiles import ProfileEntry


def print_steps(steps: Sequence[Step]) -> None:
    if not steps:
        click.echo("no step matches", err=True)
        return
    rows = [(step.id, step.category, _types(step.consumes), _types(step.produces), step.summary) for step in steps]
    print_table(("ID", "CATEGORY", "CONSUMES", "PRODUCES", "DESCRIPTION"), rows)


def print_step(step: Step) -> None:
    print_facts(
        [
            ("id", step.id),
            ("name", step.name),
            ("category", step.category),
            ("tags", ", ".join(step.tags)),
            ("configs", ", ".join(step.configs())),
            ("image", step.image),
            ("resources", f"{_count(step.nodes, 'node')} with {_count(step.gpus_per_node, 'GPU')}"),
            ("runs", f"{step.entry.script} ({_launch(step)})"),
            ("takes after --", ", ".join(step.entry.passthrough)),
            ("folder", str(step.folder)),
        ]
    )
    print_section("description", step.description.strip().splitlines())
    print_section("consumes", map(_port, step.consumes))
    print_section("produces", map(_port, step.produces))
    print_section("parameters", (line for parameter in step.parameters for line in _parameter(parameter)))
    print_section("strategies", (line for strategy in step.strategies for line in _strategy(strategy)))
    print_section(
        "errors", (line for e in step.errors for line in (e.name, f"    {e.meaning}", f"    recovery: {e.recovery}"))
    )
    print_section("reference", (f"{title}: {address}" for title, address in step.reference.items()))


def _strategy(strategy: Strategy) -> Iterator[str]:
    yield f"when  {strategy.when}"
    yield f"then  {strategy.then}"
    if strategy.sign is not None:
        yield f"sign  {' and '.join(map(_condition, strategy.sign['all']))}"
    yield ""


def _condition(condition: Mapping[str, Any]) -> str:
    """A condition of a sign: `train/reward rises 0.02`."""
    metric, (kind, bound) = condition["metric"], next(item for item in condition.items() if item[0] != "metric")
    if isinstance(bound, dict):
        bound = f"{bound['times']} × {bound['key']}" if "times" in bound else bound["key"]
    return f"{metric if isinstance(metric, str) else ' or '.join(metric)} {kind.replace('_', ' ')} {bound}"


def print_profiles(entries: Sequence[ProfileEntry]) -> None:
    rows = [(one.name, one.executor or "?", display(one.file), one.problem or one.description) for one in entries]
    print_table(("NAME", "EXECUTOR", "FILE", "DESCRIPTION"), rows)


def print_yaml(text: str) -> None:
    """YAML in colours, for a terminal."""
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text, "yaml", background_color="default", word_wrap=True))


def _types(ports: Iterable[Port]) -> str:
    """`?` marks what is optional."""
    return ",".join(port.type if port.required else f"{port.type}?" for port in ports) or "-"


def _port(port: Port) -> str:
    optional = "" if port.required else "  (optional)"
    return f"{port.type}  {port.key}{optional}\n    {port.description}"


def _parameter(parameter: Any) -> list[str]:
    choices = f"  one of {', '.join(map(_value, parameter.choices))}" if parameter.choices else ""
    return [f"{parameter.name} = {_value(parameter.default)}{choices}", f"    {parameter.description}"]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _launch(step: Step) -> str:
    return "one process per GPU" if step.entry.launch == "processes" else "one process"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, whole: int = 1) -> None:
    """A table. whole: how many of the first columns a narrow terminal does not cut: they are there to be copied."""
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column, name in enumerate(head):
            table.add_column(name.lower(), no_wrap=column < whole)
        for row in rows:
            table.add_row(f"[bold]{row[0]}[/bold]", *(cell.replace(",", "\n") for cell in row[1:-1]), row[-1])
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
    for row in (head, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    for name, value in facts:
        if value:
            click.echo(f"{click.style(name, bold=True)}{' ' * (15 - len(name))}{value}")


def print_section(title: str, lines: Iterable[str]) -> None:
    text = "\n".join(lines).rstrip("\n")
    if text:
        click.echo()
        click.secho(title, bold=True)
        click.echo("\n".join(f"  {line}".rstrip() for line in text.split("\n")))
