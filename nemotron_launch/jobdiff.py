"""How two compiled jobs differ, by config key and by rendered line. A job is a folder of files, or is compiled anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.compiler import compile_job
from nemotron_launch.config.overrides import dump_value
from nemotron_launch.config.tree import to_plain
from nemotron_launch.config.yaml_files import parse_tree
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.matrix import diff_files, read_folder

CONFIG = "config.yaml"
# In a Slurm job's comment, in a Lepton job's environment, in a local script's.
_RUN_ID = re.compile(r"nemotron:([a-z0-9-]+)|NEMOTRON_RUN_ID(?:\",\s*\"value\": \"|=)([a-z0-9-]+)")


@frozen
class Side:
    """One of two jobs: what it is called, its config as flat keys, its other files."""

    label: str
    config: dict[str, Any]
    files: dict[str, str]


def load(text: str, *, profiles_path: Path | None = None) -> Side:
    """A job's folder, a stored rendering, or what `ID[:CONFIG[:PROFILE]]` compiles to. UserError: neither."""
    folder = Path(text).expanduser()
    if folder.is_dir():
        files = read_folder(folder)
        if CONFIG not in files:
            raise UserError("is not a job's folder: it has no config.yaml", where=text)
        return _side(text, files, _run_id(files))
    if folder.exists():
        raise UserError("is a file; a job is a folder, or ID[:CONFIG[:PROFILE]]", where=text)
    from nemotron_launch.profiles import load_profile

    name, _, rest = text.partition(":")
    config, _, profile_name = rest.partition(":")
    try:
        step = find_step(name)
    except UserError as error:
        raise UserError(f"{text} is no folder, and {error.message}", hint=error.hint) from None
    profile = load_profile(profile_name, profiles_path=profiles_path) if profile_name else None
    compiled = compile_job(step, find_config(step, config or None), (), profile)
    return _side(text, {file.path: file.text for file in compiled.rendered.files}, compiled.job.run_id)


def compare(a: Side, b: Side) -> str:
    """What differs, ready to print: config keys first, then the lines of the other files. Empty when nothing does."""
    lines = list(_config_lines(a, b))
    head = "".join(f"{line}\n" for line in [f"--- {a.label}", f"+++ {b.label}", *lines]) if lines else ""
    return head + diff_files(a.files, b.files, a.label, b.label)


def _config_lines(a: Side, b: Side) -> Iterator[str]:
    missing = object()
    for key in dict.fromkeys([*a.config, *b.config]):
        old, new = a.config.get(key, missing), b.config.get(key, missing)
        if old is missing or new is missing or old != new or type(old) is not type(new):
            if old is not missing:
                yield f"-{key}={dump_value(old)}"
            if new is not missing:
                yield f"+{key}={dump_value(new)}"


def _side(label: str, files: dict[str, str], run_id: str) -> Side:
    """The run id, which always differs, is left out of the comparison."""
    named = {name: text.replace(run_id, "RUN_ID") if run_id else text for name, text in files.items()}
    config = to_plain(parse_tree(named.pop(CONFIG), f"{label}/{CONFIG}"))
    return Side(label, dict(_flat(config, "")), named)


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _run_id(files: dict[str, str]) -> str:
    """The id under which a folder's job was compiled, as its main file says."""
    for name in ("job.sbatch", "job.json", "run.sh"):
        if found := _RUN_ID.search(files.get(name, "")):
            return found[1] or found[2]
    return ""
