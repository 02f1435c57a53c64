"""The blend: which sources, how much of each, and what their columns mean; a YAML or JSON file, checked with lines."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nemotron_launch.config.checks_rewards import ENVIRONMENTS
from nemotron_launch.config.compose import report
from nemotron_launch.config.schema import load_schema
from nemotron_launch.config.tree import Node, child, to_plain
from nemotron_launch.config.validation import Problem, check
from nemotron_launch.config.yaml_files import load_tree
from nemotron_launch.errors import UserError
from nemotron_launch.resources import display
from nemotron_launch.trainer.paths import is_hub_id, resolve_path

#: What files may end in; hub ids cannot.
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst")
_HUB = "hf://"


@dataclass(frozen=True)
class Entry:
    """One thing that a source's path names. kind: `file`, `saved` (a folder of datasets) or `hub` (an id)."""

    kind: str
    name: str


@dataclass(frozen=True)
class Source:
    """One source of a blend; fields as in blend.schema.json. where: its file and line. entries: what `path` names."""

    name: str
    entries: tuple[Entry, ...]
    where: str
    subset: str | None = None
    split: str = "train"
    weight: float = 1.0
    limit: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    environment: str | None = None
    agent: str | None = None
    use: str = "train"

    def meaning(self) -> dict[str, Any]:
        """All that decides which rows come of it, but for the data themselves."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("entries", "where")}
        return {**plain, "fields": dict(self.fields), "entries": [[entry.kind, entry.name] for entry in self.entries]}


@dataclass(frozen=True)
class Reference:
    """A public dataset that placeholder rows name, and where its rows have question and answer."""

    path: str
    subset: str | None = None
    split: str = "train"
    question: str = "prompt.0.content"
    answer: str = "reward_model.ground_truth"


#: Datasets whose rows NVIDIA's RL blends name without carrying them, as those blends call them.
REFERENCES: Mapping[str, Reference] = {
    "nano_v3_sft_profiled_dapo17k": Reference("BytedTsinghua-SIA/DAPO-Math-17k"),
    "nano_v3_sft_profiled_skywork_no_omni": Reference("Skywork/Skywork-OR1-RL-Data", split="math"),
}


@dataclass(frozen=True)
class Blend:
    """A blend that was read. sha256: of the file. references: by the name that placeholder rows use."""

    path: Path
    sha256: str
    sources: tuple[Source, ...]
    references: Mapping[str, Reference]


def load_blend(path: Path, step_dir: Path) -> Blend:
    """Read and check a blend. Raises one UserError that names every problem, or every file that is missing.

    Paths in it are relative to its own folder; `step://x` is inside step_dir, where blend.schema.json lies too.
    """
    root = load_tree(path, "blend")
    schema = load_schema(step_dir / "blend.schema.json")
    plain = to_plain(root)
    problems = [_with_suggestion(problem, schema.tree) for problem in check(schema, plain)]
    key = "sources" if "sources" in plain else "datasets"
    if not problems and not plain.get(key):
        problems.append(Problem((), "the blend names no sources", "sources: is a list, each with a path"))
    if not problems and plain.get("sources") and plain.get("datasets"):
        problems.append(Problem(("datasets",), "sources and datasets are two names of one list", "keep one of them"))
    if not problems:
        problems += _environments(plain[key], key)
    if problems:
        raise report(problems, root, path)
    listed = child(root, key)
    assert listed is not None
    missing: list[str] = []
    sources = tuple(_source(node, path.parent, step_dir, missing) for node in listed.value)
    references = {
        **REFERENCES,
        **{name: _reference(given, path.parent) for name, given in (plain.get("placeholders") or {}).items()},
    }
    if missing:
        count = "a source is" if len(missing) == 1 else f"{len(missing)} sources are"
        raise UserError(
            f"{count} not there",
            where=display(path),
            hint="\n".join([*missing, "paths are relative to the blend's folder"]),
        )
    return Blend(path, hashlib.sha256(path.read_bytes()).hexdigest(), sources, references)


def _with_suggestion(problem: Problem, schema: Mapping[str, Any]) -> Problem:
    """What the key of a source could have been meant for; the schema's reader looks at no lists."""
    if problem.hint or not problem.message.startswith("unknown key") or len(problem.path) < 3:
        return problem
    known = schema["properties"]["sources"]["items"]["properties"]
    near = get_close_matches(problem.path[-1], known, n=1)
    return replace_hint(problem, f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}")


def replace_hint(problem: Problem, hint: str) -> Problem:
    return Problem(problem.path, problem.message, hint)


def _environments(sources: list[dict[str, Any]], key: str) -> list[Problem]:
    problems = []
    for i, source in enumerate(sources):
        name = source.get("environment")
        if name is None or name in ENVIRONMENTS or name.startswith("python:"):
            continue
        near = get_close_matches(name, ENVIRONMENTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(ENVIRONMENTS)}, python:module.function"
        problems.append(Problem((key, str(i), "environment"), f"there is no environment {name}", hint))
    return problems


def _source(node: Node, folder: Path, step_dir: Path, missing: list[str]) -> Source:
    given = to_plain(node)
    paths = child(node, "path")
    assert paths is not None
    entries: list[Entry] = []
    for one in paths.value if isinstance(paths.value, list) else [paths]:
        found = _entries(one.value, folder, step_dir)
        if isinstance(found, str):
            missing.append(f"{one.source}: {found}")
        else:
            entries += found
    first = given["path"] if isinstance(given["path"], str) else given["path"][0]
    base = Source(given.get("name") or first, tuple(entries), str(node.source))
    named = {name: value for name, value in given.items() if name not in ("name", "path") and value is not None}
    return replace(base, **named)


def _entries(text: str, folder: Path, step_dir: Path) -> list[Entry] | str:
    """What a path names, or why it names nothing."""
    if text.startswith(_HUB):
        return [Entry("hub", text.removeprefix(_HUB).removeprefix("datasets/"))]
    path = folder / resolve_path(text, step_dir, "path")
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return [Entry("saved", str(path))]
        return f"{text} is a folder, but no saved dataset; for its files, write {text.rstrip('/')}/*.jsonl"
    files = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file()]
    unknown = [file for file in files if not file.name.endswith(SUFFIXES)]
    if unknown:
        return f"{unknown[0].name} cannot be read; known are {', '.join(SUFFIXES)}"
    if files:
        return [Entry("file", str(file)) for file in files]
    if glob.has_magic(text):
        return f"no file matches {text}"
    if is_hub_id(text) and not text.endswith(SUFFIXES):
        return [Entry("hub", text)]
    return f"no such file: {text}"


def _reference(given: Mapping[str, Any], folder: Path) -> Reference:
    path = folder / given["path"]
    named = {name: value for name, value in given.items() if value is not None}
    return Reference(**{**named, "path": str(path) if path.is_dir() else given["path"].removeprefix(_HUB)})
