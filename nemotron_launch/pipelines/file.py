"""Pipeline files: read, checked for what the file alone can say, and put into the order in which the stages run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_launch.config import tree
from nemotron_launch.config.compose import report
from nemotron_launch.config.interpolation import resolve
from nemotron_launch.config.schema import load_schema, suggest
from nemotron_launch.config.tree import Node
from nemotron_launch.config.validation import Problem, check
from nemotron_launch.config.yaml_files import load_tree
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import field, frozen
from nemotron_launch.resources import pipelines_dir
from nemotron_launch.secret_names import GuardedEnvironment

SUFFIXES = (".yaml", ".yml", ".json")
_STAGE_KEYS = ("name", "step", "config", "overrides", "profile", "inputs", "after")
_OUTPUT = "${oc.env:RL_OUTPUT_DIR,./output/rl}/${name}"


@frozen
class Source:
    """From where a stage takes an input: the stage that makes it, and of what that makes which; "" for what fits."""

    stage: str
    key: str = ""


@frozen
class Stage:
    """A stage as it is written. inputs: artifact type or config key → source. node: every value with its line."""

    name: str
    step: str
    config: str | None
    overrides: tuple[str, ...]
    profile: str | None
    inputs: Mapping[str, Source]
    after: tuple[str, ...]
    node: Node = field(repr=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages that must be done before it."""
        return tuple(dict.fromkeys([*(source.stage for source in self.inputs.values()), *self.after]))

    def where(self, key: str = "") -> str:
        """`file:line` of a key of this stage, or of the stage."""
        return str(tree.nearest(self.node, tuple(key.split(".", 1)) if key else ()).source)

    def problem(self, key: str, message: str, hint: str | None = None) -> UserError:
        """A UserError about a key of this stage."""
        return UserError(f"stage {self.name}: {message}", where=self.where(key), hint=hint)


@frozen
class Pipeline:
    """A pipeline: its stages in an order in which they can run."""

    name: str
    description: str
    output_dir: str
    stages: tuple[Stage, ...]
    file: Path

    def stage(self, name: str, where: str | None = None) -> Stage:
        """The stage of that name. UserError: there is none; with suggestions."""
        for one in self.stages:
            if one.name == name:
                return one
        raise UserError(f"{self.name} has no stage {name}", where=where, hint=_near(name, self.stages))

    def behind(self, names: Iterable[str]) -> set[str]:
        """These stages and all that need them."""
        found = set(names)
        for one in self.stages:  # in their order
            if not found.isdisjoint(one.needs):
                found.add(one.name)
        return found

    def before(self, names: Iterable[str]) -> set[str]:
        """These stages and all that they need."""
        found = set(names)
        for one in reversed(self.stages):
            if one.name in found:
                found.update(one.needs)
        return found


def find_pipeline(text: str) -> Path:
    """The file of a pipeline: a path, or the name of a shipped one. UserError: there is none."""
    path = Path(text).expanduser()
    if path.is_file():
        return path
    shipped = {found.stem: found for found in sorted(pipelines_dir().glob("*.y*ml"))}
    if text in shipped:
        return shipped[text]
    if path.is_dir():
        raise UserError("is a folder; a pipeline is a YAML or JSON file", where=text)
    if "/" in text or path.suffix in SUFFIXES:
        raise UserError("there is no such pipeline file", where=text, hint=f"shipped: {', '.join(shipped)}")
    hint = suggest(list(shipped), text) or f"a path of a file, or one of: {', '.join(shipped)}"
    raise UserError(f"there is no pipeline {text}", hint=hint)


def load_pipeline(path: Path, output_dir: str | None = None, *, env: Mapping[str, str] | None = None) -> Pipeline:
    """Read a pipeline file. output_dir: in place of the file's own.

    UserError, with file and line: what the file cannot be; a name that two stages have; an input or `after` that names
    no stage; stages in a circle.
    """
    root = load_tree(path, "pipeline")
    problems = check(load_schema(pipelines_dir() / "schema.json"), tree.to_plain(root))
    if problems:
        raise report([_explained(problem) for problem in problems], root, path)
    head, problems = resolve(_head(root, path, output_dir), GuardedEnvironment(os.environ if env is None else env))
    if problems:
        raise report(problems, root, path)
    stages = [_stage(node) for node in root.value["stages"].value]
    _check_names(stages)
    return Pipeline(
        name=head["name"],
        description=head["description"],
        output_dir=os.path.normpath(head["output_dir"]),
        stages=tuple(_ordered(stages)),
        file=path,
    )


def _explained(problem: Problem) -> Problem:
    """What the schema says of a stage, with its number as people count, and the key that was perhaps meant."""
    path = problem.path
    if len(path) < 2 or path[0] != "stages":
        return problem
    at, name = ".".join(path[:2]), f"stage {int(path[1]) + 1}"
    message, hint = problem.message.replace(f"{at}.", f"{name}: ").replace(at, name), problem.hint
    if message.startswith(f"unknown key {name}: "):
        message = f"{name}: unknown key {'.'.join(path[2:])}"
        hint = suggest(list(_STAGE_KEYS), path[2]) or f"keys of a stage: {', '.join(_STAGE_KEYS)}"
    return Problem(path, message, hint)


def _head(root: Node, path: Path, output_dir: str | None) -> Node:
    """What stands above the stages, defaults filled in. What stages say is resolved in their configs."""
    given = {"description": Node("", root.source), "output_dir": Node(_OUTPUT, root.source)}
    given |= {"name": Node(path.stem, root.source)}
    given |= {key: node for key, node in root.value.items() if key != "stages"}
    if output_dir is not None:
        given["output_dir"] = Node(output_dir, tree.COMMAND_LINE)
    return Node(given, root.source)


def _stage(node: Node) -> Stage:
    data: dict[str, Any] = tree.to_plain(node)
    return Stage(
        name=data["name"],
        step=data["step"],
        config=data.get("config"),
        overrides=tuple(data.get("overrides", ())),
        profile=data.get("profile"),
        inputs={key: Source(*_split(text)) for key, text in data.get("inputs", {}).items()},
        after=tuple(data.get("after", ())),
        node=node,
    )


def _split(text: str) -> tuple[str, str]:
    name, _, key = text.partition(":")
    return name, key


def _check_names(stages: Sequence[Stage]) -> None:
    known: dict[str, Stage] = {}
    for one in stages:
        if one.name in known:
            first = known[one.name].where("name").rpartition(":")[2]
            raise UserError(f"two stages have the name {one.name}, the first on line {first}", where=one.where("name"))
        known[one.name] = one
    for one in stages:
        for key, source in one.inputs.items():
            if source.stage not in known:
                message = f"takes {key} from {source.stage}, which is no stage"
                raise one.problem(f"inputs.{key}", message, _near(source.stage, stages))
        for name in one.after:
            if name not in known:
                raise one.problem("after", f"comes after {name}, which is no stage", _near(name, stages))


def _near(name: str, stages: Iterable[Stage]) -> str:
    names = [one.name for one in stages]
    return suggest(names, name) or f"stages: {', '.join(names)}"


def _ordered(stages: Sequence[Stage]) -> list[Stage]:
    """Each behind those that it needs, as near to the written order as that allows. UserError: a circle."""
    left, done = list(stages), list[Stage]()
    names: set[str] = set()
    while left:
        ready = next((one for one in left if names.issuperset(one.needs)), None)
        if ready is None:
            raise _circle(left)
        left.remove(ready)
        done.append(ready)
        names.add(ready.name)
    return done


def _circle(left: Sequence[Stage]) -> UserError:
    """Each of these needs another one of them: going back from any leads round."""
    among = {one.name: one for one in left}
    chain = [left[0].name]
    while chain[-1] not in chain[:-1]:
        chain.append(next(name for name in among[chain[-1]].needs if name in among))
    chain = chain[chain.index(chain[-1]) :][::-1]
    first = among[chain[0]]
    return UserError(
        f"stages go in a circle: {' → '.join(chain)}", where=first.where("inputs" if first.inputs else "after")
    )
