"""The public tool's env.toml: finding it, and reading its tables as profiles of ours. Imported by profile_files.py."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_launch.config.tree import Node, Source, merge
from nemotron_launch.errors import UserError
from nemotron_launch.resources import display

RESERVED = ("wandb", "cli", "cache", "artifacts")
# Their names for keys of ours. Of several in one table the first one here counts.
RENAMED = {
    "env_vars": "env",
    "container_image": "image",
    "container": "image",
    "nproc_per_node": "procs_per_node",
    "nprocs_per_node": "procs_per_node",
    "ntasks_per_node": "procs_per_node",
    "node_reservation": "reservation",
    "shared_memory_size": "shared_memory_mib",
    "queue_priority": "priority",
}
SETUP = ("setup_lines", "startup_commands", "pre_launch_commands", "setup")
TUNNEL = ("host", "user", "identity", "port")
PREEMPTION = ("can_be_preempted", "can_preempt")
WANDB = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
}
# What the public tool reads and a run of ours has no use for: it starts no Ray cluster and installs no packages.
WITHOUT_MEANING = {
    "ray_version": "no Ray cluster is started",
    "existing_ray_cluster": "no Ray cluster is started",
    "head_resource_shape": "no Ray cluster is started",
    "pip_extras": "the image is used as it is; setup: installs more",
    "custom_spec": "the job is written whole; template: takes one of your own",
    "launcher": "the step says how it is started",
    "run_command": "the step says how it is started",
    "packager": "the installed package travels as a bundle",
    "repo_root": "the installed package travels as a bundle",
    "build_image": "images are not built here",
    "build_cache_dir": "images are not built here",
    "persistent_cache": "HF_HOME says where models are kept",
}
_HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?\Z")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_SEGMENT = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")
_parsed: dict[Path, tuple[int, str, dict[str, Node]]] = {}


def find(here: Path | None, env: Mapping[str, str]) -> Path | None:
    """The env.toml in use: NEMOTRON_ENV_FILE, or the first one upwards, up to the folder that holds pyproject.toml."""
    named = env.get("NEMOTRON_ENV_FILE")
    if named:
        return Path(named).expanduser().absolute()
    for folder in (here, *here.parents) if here else ():
        if (folder / "env.toml").is_file():
            return folder / "env.toml"
        if (folder / "pyproject.toml").exists():
            return None
    return None


def names(path: Path) -> list[str]:
    """The profiles in it. UserError: it cannot be read, or is no TOML."""
    return [name for name in _tables(path) if name not in RESERVED]


def load(path: Path, name: str) -> Node | None:
    """One profile's table with our names for its keys, or None. UserError: a value that has no place here."""
    if name in RESERVED:
        return None
    table = _tables(path).get(name)
    if table is None:
        return None
    if not isinstance(table.value, dict):
        raise UserError(f"{name} is no table: a profile is written as [{name}]", where=str(table.source))
    items = dict(table.value)
    _refuse_auto_mount(items)
    for theirs, ours in RENAMED.items():
        if theirs in items:
            items.setdefault(ours, items[theirs])
            del items[theirs]
    lines = [items.pop(key) for key in SETUP if key in items]
    if lines and all(isinstance(one.value, list) for one in lines):
        items["setup"] = Node([line for one in lines for line in one.value], lines[0].source)
    elif lines:
        items["setup"] = next(one for one in lines if not isinstance(one.value, list))
    tunnel = {key: items.pop(key) for key in TUNNEL if key in items}
    if "tunnel" in items and not isinstance(items["tunnel"].value, dict):
        tunnel["type"] = items.pop("tunnel")
        if tunnel["type"].value == "local":
            tunnel = {"type": tunnel["type"]}
    if tunnel:
        first = next(iter(tunnel.values()))
        items["tunnel"] = Node(tunnel, first.source, replaces=len(tunnel) == 1 and first.value == "local")
    preemption = {key: items.pop(key) for key in PREEMPTION if key in items}
    if preemption:
        items["preemption"] = Node(preemption, next(iter(preemption.values())).source)
    return Node(items, table.source)


def finish(merged: Node, path: Path) -> tuple[Node, list[str]]:
    """What can be told only of a whole profile, all that it extends merged: what is left out, with one warning for it.

    Their default mount of /lustre, their two job folders, `[wandb]` below the profile's own variables.
    """
    items = dict(merged.value)
    executor = items["executor"].value if "executor" in items else None
    left_out = {key: reason for key, reason in WITHOUT_MEANING.items() if items.pop(key, None) is not None}
    workspace = items.get("workspace")
    if workspace is not None and "/" in str(workspace.value):
        del items["workspace"]
        left_out["workspace"] = "it is a folder there; mounts and remote_job_dir say where files are"
    env = items.get("env", Node({}, merged.source))
    if isinstance(env.value, dict):
        theirs = [name for name, node in env.value.items() if str(node.value).startswith("/nemo_run/")]
        left_out.update({f"env_vars.{name}": "there is no /nemo_run; the code is on PYTHONPATH" for name in theirs})
        kept = Node({name: node for name, node in env.value.items() if name not in theirs}, env.source)
        items["env"] = merge(_wandb(path), kept)
    job_dir = items.pop("nemo_run_dir", None)
    if job_dir is not None:
        items.setdefault("remote_job_dir", job_dir)
    include = items.pop("build_include_gpus", None)
    if include is not None and include.value is False:
        items["build_gpus_per_node"] = Node(0, include.source)
    image = items.get("image")
    if image is not None and "nvidia/nemo-rl" in str(image.value):  # its python3 has no megatron-core
        items.setdefault("python", Node("python-MegatronPolicyWorker", image.source))
    lustre = items.pop("lustre_mount", None)
    if executor == "slurm":
        items["mounts"] = _with_lustre(items.get("mounts"), lustre, merged.source)
    warnings = []
    if left_out:
        reasons = dict.fromkeys(left_out.values())
        said = [f"{', '.join(key for key in left_out if left_out[key] == why)} ({why})" for why in reasons]
        warnings.append(f"{display(path)}: keys without a meaning here, left out: {'; '.join(said)}")
    return Node(items, merged.source), warnings


def _with_lustre(mounts: Node | None, lustre: Node | None, source: Source) -> Node:
    """The public tool mounts /lustre unless `lustre_mount` says another folder, or an empty text."""
    if mounts is not None and not isinstance(mounts.value, list):
        return mounts
    listed = list(mounts.value) if mounts is not None else []
    extra = lustre or Node("/lustre:/lustre", source)
    targets = [str(one.value).split(":")[1] for one in listed if isinstance(one.value, str) and ":" in one.value]
    if isinstance(extra.value, str) and extra.value and extra.value.split(":")[-1] not in targets:
        listed.append(extra)
    return Node(listed, mounts.source if mounts is not None else source)


def _wandb(path: Path) -> Node:
    table = _tables(path).get("wandb")
    if table is None or not isinstance(table.value, dict):
        return Node({}, Source(display(path)))
    found = {variable: table.value[key] for key, variable in WANDB.items() if key in table.value}
    enabled = table.value.get("enabled")
    if enabled is not None and enabled.value is False:
        found["WANDB_MODE"] = Node("disabled", enabled.source)
    return Node(found, table.source)


def _refuse_auto_mount(items: Mapping[str, Node]) -> None:
    mounts = items.get("mounts")
    for mount in mounts.value if mounts is not None and isinstance(mounts.value, list) else ():
        if isinstance(mount.value, str) and "${auto_mount:" in mount.value:
            raise UserError(
                f"{mount.value} is not supported: nothing is cloned on the cluster",
                where=str(mount.source),
                hint="clone it there and mount the folder: HOST:CONTAINER",
            )


# Reading -----------------------------------------------------------------------------------------------------------


def _tables(path: Path) -> dict[str, Node]:
    """The tables of a file, with lines. Kept until it changes."""
    import tomllib

    shown = display(path)
    try:
        changed = path.stat().st_mtime_ns
        known = _parsed.get(path)
        if known and known[:2] == (changed, shown):
            return known[2]
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError:
        hint = "NEMOTRON_ENV_FILE names it"
        raise UserError("there is no such file of profiles", where=shown, hint=hint) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", where=shown) from None
    except OSError as error:
        raise UserError(f"cannot be read: {(error.strerror or str(error)).lower()}", where=shown) from None
    except tomllib.TOMLDecodeError as error:
        said = re.match(r"(.*?) \(at line (\d+), column \d+\)\Z", str(error))
        where = f"{shown}:{said[2]}" if said else shown
        message = said[1] if said else str(error)
        raise UserError(f"not TOML: {message[:1].lower()}{message[1:]}", where=where) from None
    lines = _lines(text)
    tables = {name: _node(value, (name,), lines, Source(shown, lines.get((name,), 1))) for name, value in data.items()}
    _parsed[path] = (changed, shown, tables)
    return tables


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """The line of every table and key, which tomllib does not tell."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        if header:
            table = _path(header[1])
            found.setdefault(table, number)
            continue
        key = _KEY.match(line)
        if key:
            found.setdefault((*table, *_path(key[1])), number)
    return found


def _path(dotted: str) -> tuple[str, ...]:
    return tuple(segment.strip("\"'") for segment in _SEGMENT.findall(dotted))


def _node(value: Any, path: tuple[str, ...], lines: Mapping[tuple[str, ...], int], around: Source) -> Node:
    source = Source(around.origin, lines.get(path, around.line))
    if isinstance(value, dict):
        return Node({key: _node(item, (*path, key), lines, source) for key, item in value.items()}, source)
    if isinstance(value, list):
        return Node([_node(item, (*path, str(n)), lines, source) for n, item in enumerate(value)], source)
    if isinstance(value, datetime.date | datetime.time):  # time = 04:00:00 without quotes
        return Node(value.isoformat(), source)
    return Node(value, source)
