"""How a compiled job looks: a summary and its files in colours on a terminal, the file that is submitted in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from nemotron_launch.compiler import Compiled, as_data, write_to
from nemotron_launch.job import Artifact, Job, Mount
from nemotron_launch.resources import display


def show(compiled: Compiled, output: str | None) -> None:
    """Print a dry run, as `--output` asks for it. Warnings go to stderr, so that a pipe gets the job's bytes alone."""
    terminal = sys.stdout.isatty()
    if output is None and terminal:
        print_summary(facts_of(compiled), compiled.warnings)
        print_files(compiled)
        return
    for warning in compiled.warnings:
        click.echo(f"warning: {warning}", err=True)
    if output in (None, "script"):
        print_bytes(compiled.rendered.text)
    elif output == "json":
        click.echo(json.dumps(as_data(compiled), indent=2, ensure_ascii=False))
    elif output == "yaml":
        from nemotron_launch.config.yaml_files import dump

        print_bytes(dump(as_data(compiled)))
    else:
        assert output is not None
        _write(compiled, Path(output.removeprefix("dir=")).expanduser())


def print_bytes(text: str) -> None:
    """Print the text's very bytes, whatever the terminal's encoding is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def _write(compiled: Compiled, folder: Path) -> None:
    written = write_to(compiled, folder)
    job = compiled.job
    click.echo(f"wrote {len(written)} files to {display(folder)}", err=True)
    if job.executor == "slurm":
        print_by_hand(job, compiled.rendered.main)


def print_by_hand(job: Job, main: str) -> None:
    """Say how a job that was written into a folder is submitted without us."""
    import shlex

    click.echo(f"to submit them by hand, copy the folder to {job.run_dir} on the cluster; there:", err=True)
    if job.secrets:
        names = ", ".join(secret.name for secret in job.secrets)
        click.echo(f"  write secrets.env, mode 600, with lines  export NAME=value  for {names}", err=True)
    click.echo(f"  sbatch {shlex.quote(f'{job.run_dir}/{main}')}", err=True)


# On a terminal -----------------------------------------------------------------------------------------------------


def print_summary(facts: Sequence[tuple[str, str]], warnings: Sequence[str]) -> None:
    """Print what a job is, a line for each fact."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in facts:
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    for warning in warnings:
        table.add_row("[bold yellow]warning[/bold yellow]", escape(warning))
    Console(highlight=False).print(table)


def facts_of(compiled: Compiled) -> list[tuple[str, str]]:
    """What a job is, by name, for a summary."""
    import shlex

    job, composed, profile = compiled.job, compiled.composed, compiled.profile
    facts = [
        ("run", job.run_id),
        ("step", f"{job.step} -c {job.config}" + "".join(f" {override}" for override in composed.overrides)),
        ("where", _where(compiled)),
        ("resources", _resources(job)),
    ]
    if job.container.runtime != "none":
        facts.append(("image", job.container.image))
        facts += [("mount", _mount(mount)) for mount in job.container.mounts]
    facts += [("service", f"{one.name} on port {one.port}: {shlex.join(one.command)}") for one in job.services]
    named = {use.key: f"  ({use.name}@{use.version} of run {use.run_id})" for use in job.uses}
    facts += [("input", _artifact(one) + named.get(one.key, "")) for one in job.consumes if one.value is not None]
    facts += [("output", _artifact(one)) for one in job.produces if one.value is not None]
    facts += [("folder", job.run_dir), ("command", shlex.join(job.command))]
    if job.env:
        facts.append(("environment", ", ".join(job.env)))
    if job.secrets:
        facts.append(("secrets", ", ".join(secret.name for secret in job.secrets)))
    if job.bundle is not None:
        facts.append(("code", _code(job)))
    if profile is not None and job.profile_from_cwd:
        facts.append(("profile", f"from the working directory: {display(profile.file)}"))
    if job.template:
        origin = "from the working directory: " if job.template_from_cwd else ""
        facts.append(("template", origin + display(Path(job.template))))
    return facts


def _where(compiled: Compiled) -> str:
    job, profile = compiled.job, compiled.profile
    if profile is None:
        return "this machine"
    if job.executor == "local":
        return f"this machine, profile {job.profile}"
    if job.executor == "lepton":
        place = job.options.get("node_group") or "shared capacity"
        shape = job.options.get("resource_shape")
        return f"Lepton, {place if isinstance(place, str) else ', '.join(place)}, {shape}, profile {job.profile}"
    tunnel = job.options.get("tunnel") or {}
    host = f" on {tunnel['host']}" if tunnel.get("type") == "ssh" else ""
    partition = f", partition {job.options['partition']}" if job.options.get("partition") else ""
    return f"Slurm{host}{partition}, profile {job.profile}"


def _resources(job: Job) -> str:
    nodes = job.nodes + sum(service.nodes for service in job.services)
    text = (
        f"{_count(nodes, 'node')} with {_count(job.gpus_per_node, 'GPU')}, {_count(job.nodes * job.procs, 'process')}"
    )
    hours = node_hours(job)
    return text if hours is None else f"{text}, at most {hours:g} node-hours"


def node_hours(job: Job) -> float | None:
    """What the job costs at most: its nodes for its time limit, each attempt and point anew. None without a limit."""
    from nemotron_launch.profiles import seconds

    time = job.options.get("time")
    if job.executor == "local" or not time:
        return None
    nodes = job.nodes + sum(service.nodes for service in job.services)
    return round(nodes * seconds(time) / 3600 * (1 + job.restart.max_restarts) * (len(job.points) or 1), 2)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def _mount(mount: Mount) -> str:
    volume = f"{mount.volume} " if mount.volume else ""
    return f"{volume}{mount.source} → {mount.target}{' (read-only)' if mount.read_only else ''}"


def _artifact(artifact: Artifact) -> str:
    value = ", ".join(map(str, artifact.value)) if isinstance(artifact.value, list) else artifact.value
    return f"{artifact.type}  {artifact.key} = {value}"


def _code(job: Job) -> str:
    made = job.bundle
    assert made is not None
    state = f", git {made.git_revision[:12]}{' with changes' if made.git_dirty else ''}" if made.git_revision else ""
    return f"{made.file}, {made.size / 1024:.0f} KiB{state}"


_LONGEST_LINE = 2000
_LANGUAGES = {".json": "json", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash"}


def print_files(compiled: Compiled) -> None:
    """Print the files of a job in colours."""
    from rich.console import Console
    from rich.rule import Rule
    from rich.syntax import Syntax

    console = Console()
    for file in compiled.rendered.files:
        if compiled.job.executor == "local" and file.path != compiled.rendered.main:
            continue  # the script writes it, so it has been seen
        console.print(Rule(file.path, align="left"))
        language = _LANGUAGES.get(Path(file.path).suffix, "text")
        text = "\n".join(_cut(line) for line in file.text.splitlines())
        console.print(Syntax(text, language, background_color="default", word_wrap=True))


def _cut(line: str) -> str:
    """A line that a person can look at: a Lepton job carries its code in a few very long ones."""
    return line if len(line) <= _LONGEST_LINE else f"{line[:80]}… ({len(line)} characters)"
