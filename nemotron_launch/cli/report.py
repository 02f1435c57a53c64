"""`nemotron jobs report`: a page about runs, in one file."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from nemotron_launch.cli.jobs import RUNS, opened, warn


@click.command()
@RUNS
@click.option("-o", "--output", metavar="FILE", help="Where to write it; - is the terminal. Default: RUN.html.")
@click.option("--json", "as_json", is_flag=True, help="Print the page's data as JSON instead.")
@click.option("--title", metavar="TEXT", help="The page's title.")
def report(names: tuple[str, ...], output: str | None, as_json: bool, title: str | None) -> None:
    """Write a page about runs: plots, warnings, config, samples. It is one file and needs no network.

    Of several runs, or of a sweep, the page lays the curves over each other and says in what the runs differ. RUN may
    also be an output folder, one that holds metrics.jsonl.
    """
    from nemotron_launch.reports.collect import collect
    from nemotron_launch.reports.page import page
    from nemotron_launch.resources import display

    with opened() as (ledger, backends):
        data = collect(ledger, backends, names, warn)
    if as_json:
        click.echo(json.dumps(data, indent=2, ensure_ascii=True))
        return
    text = page(data, title=title or "")
    if output == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
        return
    path = Path(output) if output else Path(f"{_file_name(data)}.html")
    _write(path, text)
    click.echo(f"wrote {display(path.absolute())} ({len(text) / 2**20:.1f} MiB)", err=True)


def _file_name(data: dict[str, Any]) -> str:
    """The run's name, or the sweep's; of several runs the first one's with their number."""
    runs = data["runs"]
    sweeps = {run.get("sweep") or "" for run in runs}
    name = next(iter(sweeps)) if len(runs) > 1 and len(sweeps) == 1 else ""
    name = name or (runs[0]["name"] if len(runs) == 1 else f"{runs[0]['name']}-and-{len(runs) - 1}-more")
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).lstrip(".-") or "report"


def _write(path: Path, text: str) -> None:
    """Write the page, a file whole or not at all."""
    from nemotron_launch.errors import UserError

    try:
        if path.exists() and not path.is_file():  # a pipe, a device; a folder says so itself
            path.write_text(text, encoding="ascii")
            return
        passing = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            passing.write_text(text, encoding="ascii")
            passing.replace(path)
        except OSError:
            with suppress(OSError):
                passing.unlink(missing_ok=True)
            raise
    except OSError as error:
        hint = "choose another place with -o"
        raise UserError((error.strerror or str(error)).lower(), where=str(path), hint=hint, exit_code=1) from None
