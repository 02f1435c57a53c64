"""The steps: their manifests (`step.yaml`), the artifact types (`artifacts.yaml`), and which step a user means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemotron_launch.config.yaml_files import load_plain, load_tree
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import field, frozen
from nemotron_launch.resources import display, steps_dir


@frozen
class ArtifactType:
    """A kind of artifact. `is_a` names the more general type as which it may be consumed."""

    name: str
    description: str
    is_a: str | None = None
    convert_to: dict[str, str] = field(default_factory=dict)


@frozen
class Port:
    """An artifact that a step consumes or produces, bound to the config key that holds its path."""

    type: str
    required: bool
    key: str
    description: str


@frozen
class Parameter:
    """A config key that people change often. `default` is None where the manifest gives none."""

    name: str
    description: str
    default: Any = None
    choices: tuple[Any, ...] = ()


@frozen
class Strategy:
    """What to do in which situation. sign: by which metrics a run shows that it is in it (reports/signs.py)."""

    when: str
    then: str
    sign: dict[str, Any] | None = None


@frozen
class KnownError:
    """Something that goes wrong, and how to recover."""

    name: str
    meaning: str
    recovery: str


@frozen
class Entry:
    """What a step runs. launch: "processes" (one per GPU) or "python"; passthrough: its options after `--`."""

    script: str
    launch: str
    passthrough: tuple[str, ...] = ()


@frozen
class Step:
    """A step's manifest. `folder` is where it lies; note: what to know before anything else."""

    id: str
    name: str
    category: str
    description: str
    tags: tuple[str, ...]
    consumes: tuple[Port, ...]
    produces: tuple[Port, ...]
    parameters: tuple[Parameter, ...]
    strategies: tuple[Strategy, ...]
    errors: tuple[KnownError, ...]
    image: str
    nodes: int
    gpus_per_node: int
    entry: Entry
    reference: dict[str, str]
    folder: Path
    note: str = ""

    @property
    def summary(self) -> str:
        """The description's first line."""
        return self.description.strip().splitlines()[0] if self.description.strip() else ""

    @property
    def schema(self) -> Path | None:
        """The schema of its configs."""
        path = self.folder / "schema.json"
        return path if path.is_file() else None

    def configs(self) -> dict[str, Path]:
        """Its configs by name, `default` first."""
        found = {path.stem: path for path in sorted((self.folder / "config").glob("*.y*ml"))}
        return {name: found[name] for name in sorted(found, key=lambda name: (name != "default", name))}

    def as_json(self) -> dict[str, Any]:
        """The manifest as plain data, with its configs and its folder."""
        data = asdict(self)
        data["path"] = str(data.pop("folder"))
        data["resources"] = {"nodes": data.pop("nodes"), "gpus_per_node": data.pop("gpus_per_node")}
        data["configs"] = list(self.configs())
        for strategy in data["strategies"]:
            if strategy["sign"] is None:  # as the manifest has it
                del strategy["sign"]
        return data


def load_steps(root: Path | None = None) -> list[Step]:
    """Every step below the steps folder, by id. UserError: a manifest that is none, two steps with one id."""
    root = root or steps_dir()
    if not root.is_dir():
        raise UserError("there is no such folder of steps", where=display(root), hint="NEMOTRON_STEPS names it")
    steps: dict[str, Step] = {}
    for path in _manifests(root):
        step = _load_step(path, root)
        if step.id in steps:
            other = display(steps[step.id].folder)
            raise UserError(f"the id {step.id} belongs to {other} already", where=display(path))
        steps[step.id] = step
    return [steps[name] for name in sorted(steps)]


def load_step(folder: Path) -> Step:
    """The step whose manifest lies in this folder. UserError: there is none."""
    return _load_step(folder / "step.yaml", folder.parent)


def load_artifacts(root: Path | None = None) -> dict[str, ArtifactType]:
    """The artifact types by name. UserError: an `is_a` that names none, or a circle of them."""
    path = (root or steps_dir()) / "artifacts.yaml"
    if not path.is_file():
        return {}
    try:
        types = {name: ArtifactType(name, **body) for name, body in load_plain(path)["artifacts"].items()}
    except (KeyError, TypeError, AttributeError):
        _explain(path, path.parent / "schemas" / "artifacts.json")
        raise
    for name in types:
        seen = [name]
        while (above := types[seen[-1]].is_a) is not None:
            if above not in types:
                raise UserError(f"{seen[-1]}: is_a names {above}, which is no type", where=display(path))
            if above in seen:
                raise UserError(f"is_a goes in a circle: {' → '.join([*seen, above])}", where=display(path))
            seen.append(above)
    return types


def find_step(text: str, steps: Iterable[Step] | None = None) -> Step:
    """The step with this id, or the only one whose id ends in it. UserError with suggestions where there is none."""
    wanted = text.strip("/")
    if steps is None and wanted and (direct := steps_dir() / wanted / "step.yaml").is_file():
        step = _load_step(direct, steps_dir())
        if step.id == wanted:  # as it should be: the others need not be read
            return step
    known = {step.id: step for step in (load_steps() if steps is None else steps)}
    if wanted in known:
        return known[wanted]
    tails = [name for name in known if name.endswith("/" + wanted)] if wanted else []
    if len(tails) == 1:
        return known[tails[0]]
    if tails:
        raise UserError(f"{text} could be several steps", hint=f"one of: {', '.join(tails)}")
    raise UserError(f"there is no step {text}", hint=_similar(wanted, known))


def find_config(step: Step, text: str | None) -> Path:
    """The config file that `-c` means: a name in the step's folder, or a path. None: `default`, or the only one.

    A path contains `/`, ends in .yaml or .yml, or is an existing file that is no config's name.
    """
    configs = step.configs()
    if text is None:
        if "default" in configs:
            return configs["default"]
        if len(configs) == 1:
            return next(iter(configs.values()))
        raise UserError(f"{step.id} has no default config", hint=f"choose one with -c: {', '.join(configs) or 'none'}")
    if text in configs:
        return configs[text]
    path = Path(text).expanduser()
    if path.is_file():
        return path.absolute()
    if "/" in text or path.suffix in (".yaml", ".yml"):
        if path.is_dir():
            raise UserError("is a folder; a config is a YAML file", where=text)
        raise UserError("there is no such config file", where=text, hint=_near_file(path))
    raise UserError(f"{step.id} has no config {text}", hint=_similar(text, configs, "configs"))


def select(
    steps: Iterable[Step],
    types: dict[str, ArtifactType],
    *,
    category: str | None = None,
    consumes: str | None = None,
    produces: str | None = None,
    tag: str | None = None,
) -> list[Step]:
    """The steps that match every filter that is given.

    A subtype may stand for its type. So `consumes` finds the steps that an artifact of this type can be given to (they
    ask for it or for something more general), and `produces` those whose output can serve as this type (it, or
    something more special). UserError: a type, category or tag that does not exist.
    """
    steps = list(steps)
    used = {port.type for step in steps for port in (*step.consumes, *step.produces)}
    for given in (consumes, produces):
        if given is not None:
            known_type(given, [*types, *used])
    for given, name, choices in (
        (category, "category", sorted({step.category for step in steps})),
        (tag, "tag", sorted({tag for step in steps for tag in step.tags})),
    ):
        if given is not None and given not in choices:
            raise UserError(f"no step has the {name} {given}", hint=_similar(given, choices, "there are"))

    def fits(step: Step) -> bool:
        return (
            (category is None or step.category == category)
            and (tag is None or tag in step.tags)
            and (consumes is None or any(is_a(types, consumes, port.type) for port in step.consumes))
            and (produces is None or any(is_a(types, port.type, produces) for port in step.produces))
        )

    return [step for step in steps if fits(step)]


def known_type(name: str, types: Iterable[str]) -> None:
    """UserError with suggestions where there is no artifact type of this name."""
    if name not in types:
        raise UserError(f"there is no artifact type {name}", hint=_similar(name, types, "types"))


def is_a(types: dict[str, ArtifactType], special: str, general: str) -> bool:
    """Whether an artifact of type `special` may be used where `general` is asked for."""
    name: str | None = special
    while name is not None:
        if name == general:
            return True
        name = types[name].is_a if name in types else None
    return False


def conversion(made_type: str, wanted: str, named: str) -> str | None:
    """The command that converts one type into another, where a step does. named: what the config has at its key."""
    types, steps = load_artifacts(), {step.id: step for step in load_steps()}
    kind = types.get(made_type)
    while kind is not None:
        for target, step_id in kind.convert_to.items():
            if is_a(types, target, wanted) and step_id in steps:
                given = _input(steps[step_id].consumes, made_type, named)
                return f"convert it first:  nemotron steps run {step_id} {given}"
        kind = types.get(kind.is_a or "")
    return None


def _input(ports: Iterable[Port], type_name: str, named: str) -> str:
    types = load_artifacts()
    key = next((port.key for port in ports if is_a(types, type_name, port.type)), "")
    return f"{key}={named or '…'}" if key else ""


def _manifests(folder: Path) -> Iterator[Path]:
    """Every step.yaml, not looking below a step (its data may be large) nor into hidden folders."""
    manifest = folder / "step.yaml"
    if manifest.is_file():
        yield manifest
        return
    for below in sorted(folder.iterdir()):
        if below.is_dir() and not below.name.startswith((".", "_")):
            yield from _manifests(below)


def _load_step(path: Path, root: Path) -> Step:
    data = load_plain(path)
    try:
        step = Step(
            id=data["id"],
            name=data["name"],
            category=data["category"],
            description=data["description"],
            tags=tuple(data.get("tags") or ()),
            consumes=tuple(Port(**port) for port in data["consumes"]),
            produces=tuple(Port(**port) for port in data["produces"]),
            parameters=tuple(
                Parameter(**{**given, "choices": tuple(given.get("choices", ()))}) for given in data["parameters"]
            ),
            strategies=tuple(Strategy(**given) for given in data["strategies"]),
            errors=tuple(KnownError(**given) for given in data["errors"]),
            image=data["image"],
            nodes=data["resources"]["nodes"],
            gpus_per_node=data["resources"]["gpus_per_node"],
            entry=Entry(**{**data["entry"], "passthrough": tuple(data["entry"].get("passthrough") or ())}),
            reference=dict(data.get("reference") or {}),
            folder=path.parent,
            note=data.get("note", ""),
        )
        if not all(isinstance(text, str) for text in (step.id, step.name, step.category, step.description, step.image)):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        _explain(path, root / "schemas" / "manifest.json")
        raise
    return step


def _explain(path: Path, schema: Path) -> None:
    """Say what is wrong with a manifest that could not be read, each problem on its line."""
    from nemotron_launch.config.compose import report
    from nemotron_launch.config.schema import load_schema
    from nemotron_launch.config.tree import to_plain
    from nemotron_launch.config.validation import check

    root = load_tree(path, "manifest")
    if schema.is_file():
        problems = check(load_schema(schema), to_plain(root))
        if problems:
            raise report(problems, root, path)
    raise UserError("is not a manifest", where=display(path), hint=f"its keys are described in {display(schema)}")


def _similar(text: str, known: Iterable[str], what: str = "steps") -> str:
    from difflib import get_close_matches

    names = sorted(set(known))
    near = get_close_matches(text, names, n=3, cutoff=0.5)
    if not near:  # a misspelt tail
        tails: dict[str, list[str]] = {}
        for name in names:
            tails.setdefault(name.rpartition("/")[2], []).append(name)
        near = [name for tail in get_close_matches(text, tails, n=3, cutoff=0.5) for name in tails[tail]]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"{what}: {', '.join(names) or 'none'}"


def _near_file(path: Path) -> str | None:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    from difflib import get_close_matches

    near = get_close_matches(path.name, [found.name for found in folder.glob("*.y*ml")], n=1)
    return f"did you mean {folder / near[0]}?" if near else None
