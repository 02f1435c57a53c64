"""How an artifact looks on a terminal, by itself and in a run's status."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import click

from nemotron_launch.artifacts import record
from nemotron_launch.artifacts.record import Made
from nemotron_launch.artifacts.registry import Entry
from nemotron_launch.cli.job_tables import plain
from nemotron_launch.cli.tables import print_facts, print_section

_HASH = 12  # digits of a hash that a person compares
_METRICS = 12


def print_entry(one: Entry, *, again: int = 0) -> None:
    """All that is known of what a run made. again: runs since that found it made already."""
    made = one.record
    here = not one.host or one.host == os.uname().nodename
    code = {**made.code, **{name: value for name, value in one.code.items() if value}}
    revision = str(code.get("git_revision") or "")[:_HASH] + (" with changes" if code.get("git_dirty") else "")
    facts = [
        ("name", one.label),
        ("run", one.run_id + (f"  (and {again} since that found it made)" if again else "")),
        ("step", f"{one.step} -c {one.config}"),
        ("made", time.strftime("%F %T", time.localtime(made.created))),
        ("where", "this machine" if here else f"{one.executor}, {one.host}"),
        ("config sha256", made.config_sha256[:_HASH]),
        (
            "code",
            ", ".join(filter(None, [f"nemotron {code.get('version', '')}", str(code.get("bundle") or ""), revision])),
        ),
        ("record", os.path.join(made.folder, record.FILE)),
    ]
    print_facts([(name, plain(value)) for name, value in facts])
    for artifact in made.artifacts:
        print_section(artifact.type, map(plain, _lines(artifact, here)))
    print_section("made of", (plain(line) for line in _inputs(one)))
    metrics = sorted(made.metrics.items(), key=lambda one: not one[0].startswith("valid"))  # what counts most first
    print_section("metrics", (f"{name}  {value:.6g}" for name, value in metrics[:_METRICS]))
    click.echo(
        f"\nto use it:  KEY=artifact:{one.label}     where it comes from:  nemotron artifacts lineage {one.label}"
    )


def _lines(made: Made, here: bool) -> Iterator[str]:
    fate = record.is_there(made) if here else ""
    note = {"gone": "  (gone: there is nothing by now)", "replaced": "  (gone: it holds something else by now)"}
    yield f"path  {made.place}{note.get(fate, '')}"
    yield f"at    {made.key}"
    if made.content:
        yield f"content  {made.content[:_HASH]}"
    if made.tokens:
        template = made.tokens.chat_template[:_HASH] or "not known"
        yield f"tokenizer  {made.tokens.name or '?'}  {made.tokens.tokenizer[:_HASH]}, chat template {template}"
    if made.architecture:
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        yield "shape  " + ", ".join(f"{name} {made.architecture[name]}" for name in sizes)


def _inputs(one: Entry) -> Iterator[str]:
    names = {use.get("place"): f"  ({use['name']}@{use['version']})" for use in one.uses if use.get("name")}
    for used in one.record.inputs:
        yield f"{used.type}  {used.key} = {used.value}{names.get(used.value, '')}"
