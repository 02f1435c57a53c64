"""Sweeps: the points of one config, read, checked and compiled together, so that all of them are one submission."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_launch import bundle, crosschecks
from nemotron_launch.catalog import Step
from nemotron_launch.config import tree
from nemotron_launch.config.compose import Composed
from nemotron_launch.config.sweep_values import Axis, parse_axis, zipped
from nemotron_launch.config.tree import Node
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen, replace
from nemotron_launch.job import Bundle, Job, Point
from nemotron_launch.plan import HERE, composer_for, new_run_id, plan_job, point_folder
from nemotron_launch.render import Rendered, render

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile

MOST_POINTS = 10_000
PACKED = "points.tar.gz"  # in the run's folder: a folder for each point, see pack
_LONGEST_NAME = 100
_SHOWN = 100  # different problems of points, in a message
# What may differ between the points of an array: all else is in the one script that they share.
_OWN = ("files", "command", "output_dir", "produces", "consumes", "artifact", "uses")
_REASONS = {
    "nodes": "cluster.num_nodes",
    "procs": "cluster.procs_per_node",
    "gpus_per_node": "cluster.gpus_per_node",
    "env": "run.env",
    "secrets": "run.secrets",
    "container": "run.image, run.python or run.mounts",
    "services": "run.services",
    "setup": "run.setup",
    "restart": "run.max_restarts",
    "bundle": "run.code",
    "options": "run.time or run.start_timeout",
}


@frozen
class Sweep:
    """A sweep, compiled. points: the overrides of each. jobs: one for each, complete, as if it ran alone.

    array: all of them as one job of Slurm's, with what it becomes; None on this machine, where each runs by itself.
    """

    step: Step
    profile: Profile | None
    run_id: str
    overrides: tuple[str, ...]
    points: tuple[tuple[str, ...], ...]
    composed: tuple[Composed, ...]
    jobs: tuple[Job, ...]
    max_parallel: int
    array: Job | None
    rendered: Rendered | None
    warnings: tuple[str, ...]


def read_points(axes: Sequence[str], *, pairs: bool = False) -> list[tuple[str, ...]]:
    """The overrides of each point: every combination of the axes' values, the last axis fastest; pairs: side by side.

    UserError: an axis that cannot be read, a key in two of them, two points that are the same, too many of them.
    """
    read = [parse_axis(text) for text in axes]
    for n, axis in enumerate(read):
        if any(axis.key == other.key for other in read[:n]):
            raise UserError(f"{axis.key} is swept twice", where="--sweep", hint="put all its values into one --sweep")
        twice = next((v for i, v in enumerate(axis.values) if v in axis.values[:i]), None)
        if twice is not None and not pairs:
            raise UserError(f"{axis.key} has the value {twice} twice", where="--sweep")
    count = len(read[0].values) if pairs else _product(read)
    if count > MOST_POINTS:
        raise UserError(f"{count} points are more than {MOST_POINTS}", where="--sweep")
    if not pairs:
        return list(itertools.product(*(axis.overrides() for axis in read)))
    points = zipped(read)
    first: dict[tuple[str, ...], int] = {}
    for n, point in enumerate(points):
        if first.setdefault(point, n) != n:
            raise UserError(f"the points {first[point]} and {n} are the same: {' '.join(point)}", where="--sweep")
    return points


def compile_sweep(
    step: Step,
    config: Path,
    points: Sequence[Sequence[str]],
    overrides: Sequence[str] = (),
    profile: Profile | None = None,
    passthrough: Sequence[str] = (),
    *,
    max_parallel: int = 0,
    run_id: str | None = None,
    submits: bool = False,
    attached: bool = False,
    env: Mapping[str, str] | None = None,
) -> Sweep:
    """Compose, plan and check every point, then render them.

    run_id: None draws a fresh one when it submits, and derives one from the content for a dry run. UserError: all that
    is wrong with any point, each by its number; points that do not fit into one array; outputs that two of them share.
    """
    executor = profile.executor if profile else "local"
    if executor == "lepton":
        assert profile is not None
        raise profile.problem("executor", "Lepton has no arrays", "a sweep runs on Slurm or on this machine")
    found: Callable[[str, tuple[str, ...]], Bundle] = cache(lambda _, code: bundle.bundle(step, code))
    origin = replace(HERE, bundle=lambda step, code: found(step.id, tuple(code)))
    names = _folders(points)
    compose = composer_for(step, config, profile, env=env)
    swept = {text.lstrip("+").partition("=")[0] for point in points for text in point}

    def composed(n: int) -> Composed:
        beside = None if "output_dir" in swept else lambda root: _below(root, names[n])
        return compose([*overrides, *points[n]], beside)

    all_composed = _each(points, composed)
    if run_id is None and submits:
        run_id = new_run_id(step, all_composed[0])
    elif run_id is None:
        alone = plan_job(step, all_composed[0], profile, passthrough, attached=attached, origin=origin)
        run_id = _content_id(alone, points)

    def planned(n: int) -> Job:
        one = all_composed[n]
        return plan_job(step, one, profile, passthrough, run_id=run_id, attached=attached, origin=origin, point=n)

    jobs = _each(points, planned)
    _check_outputs(all_composed, jobs)
    warnings: dict[str, None] = {}
    for job, one in zip(jobs, all_composed, strict=True):
        warnings.update(dict.fromkeys(crosschecks.warnings(job, one, profile)))
        if submits and executor == "local":
            continue  # what is missing is made first, or refused
        if one.get("run.make_missing") or Path(job.workdir).is_dir():
            from nemotron_launch.inputs import notes

            warnings.update(dict.fromkeys(notes(step, one, job, profile)))
    array = None if executor == "local" else _array(jobs, points, all_composed, max_parallel)
    return Sweep(
        step=step,
        profile=profile,
        run_id=run_id,
        overrides=tuple(overrides),
        points=tuple(tuple(point) for point in points),
        composed=tuple(all_composed),
        jobs=tuple(jobs),
        max_parallel=max_parallel,
        array=array,
        rendered=render(array) if array else None,
        warnings=tuple(warnings),
    )


def pack(array: Job) -> bytes:
    """All that is a point's own as one archive, the same bytes for the same points.

    For each `point-<number>/config.yaml`, and `output_dir` beside it, which holds that path on one line.
    """
    import gzip
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as packed:
        for n, point in enumerate(array.points):
            for name, text in (("config.yaml", point.config), ("output_dir", f"{point.output_dir}\n")):
                data = text.encode("utf-8", "surrogateescape")
                info = tarfile.TarInfo(f"{point_folder(n)}/{name}")  # owner, group and time are 0
                info.size, info.mode = len(data), 0o600
                packed.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue(), compresslevel=6, mtime=0)


# Points ------------------------------------------------------------------------------------------------------------


def _product(axes: Sequence[Axis]) -> int:
    count = 1
    for axis in axes:
        count *= len(axis.values)
    return count


def _each(points: Sequence[Sequence[str]], work: Callable[[int], Any]) -> list[Any]:
    """The work of every point. UserError: of all that have one, together."""
    done, wrong = [], {}
    for n in range(len(points)):
        try:
            done.append(work(n))
        except UserError as error:
            wrong[n] = error
    if wrong:
        raise _together(points, wrong)
    return done


def _together(points: Sequence[Sequence[str]], wrong: Mapping[int, UserError]) -> UserError:
    """One error for all points. What is wrong with every one of them alike is no matter of the sweep."""
    said = {n: str(error) for n, error in wrong.items()}
    first = next(iter(wrong.values()))
    if len(set(said.values())) == 1 and (len(wrong) == len(points) or len(points) == 1):
        return first
    lines: list[str] = []
    texts = list(dict.fromkeys(said.values()))
    for text in texts[:_SHOWN]:
        numbers = [n for n in said if said[n] == text]
        which = f"point {numbers[0]}" if len(numbers) == 1 else f"points {_ranges(numbers)}"
        shown = f" ({' '.join(points[numbers[0]])})" if len(numbers) == 1 else ""
        lines.append(f"{which}{shown}:")
        lines += [f"    {line}" for line in text.removeprefix("error: ").replace("\n       ", "\n").splitlines()]
    if len(texts) > _SHOWN:
        lines.append(f"… and {len(texts) - _SHOWN} more problems")
    return UserError(f"{len(wrong)} of {len(points)} points are wrong; nothing was submitted", hint="\n".join(lines))


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,7,9-10, as Slurm writes an array."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _below(root: Node, name: str) -> Node:
    """The config with its output folder one deeper, so that no two points write to the same."""
    there = tree.find(root, ("output_dir",))
    if there is None or not isinstance(there.value, str):
        return root
    return tree.put(root, ("output_dir",), Node(f"{there.value.rstrip('/')}/{name}", there.source))


def _folders(points: Sequence[Sequence[str]]) -> list[str]:
    """A name for each point's output folder, made of what it sets, so that the same point always finds its own."""
    keys = [text.lstrip("+").partition("=")[0].split(".") for text in points[0]]
    depth = 1
    while len({".".join(key[-depth:]) for key in keys}) < len(keys) and depth < max(map(len, keys)):
        depth += 1
    shorts = [".".join(key[-depth:]) for key in keys]
    names = []
    for point in points:
        values = [text.partition("=")[2] for text in point]
        whole = "+".join(f"{short}={value}" for short, value in zip(shorts, values, strict=True))
        name = re.sub(r"[^A-Za-z0-9._=+-]+", "-", whole.replace("'", "").replace('"', ""))
        if name != whole or len(name) > _LONGEST_NAME:
            name = f"{name[: _LONGEST_NAME - 9].rstrip('-')}-{sha256(whole.encode('utf-8', 'replace')).hexdigest()[:8]}"
        names.append(name)
    return names


def _check_outputs(all_composed: Sequence[Composed], jobs: Sequence[Job]) -> None:
    """Raise where two points would write to the same place."""
    for key, values in _written(all_composed, jobs):
        seen: dict[str, int] = {}
        for n, value in enumerate(values):
            if value is not None and seen.setdefault(value, n) != n:
                raise all_composed[n].problem(
                    key,
                    f"{key}: the points {seen[value]} and {n} would both write to {value}",
                    f"leave {key} to its default, which lies in the point's output_dir"
                    if key != "output_dir"
                    else "sweep output_dir with values that differ, or leave it to the sweep",
                )


def _written(all_composed: Sequence[Composed], jobs: Sequence[Job]) -> Iterator[tuple[str, list[str | None]]]:
    yield "output_dir", [posixpath.normpath(posixpath.join(job.workdir, job.output_dir)) for job in jobs]
    for key in dict.fromkeys(["checkpointing.checkpoint_dir", *(port.key for port in jobs[0].produces)]):
        if key != "output_dir":
            values = [one.get(key) for one in all_composed]
            yield key, [posixpath.normpath(value) if isinstance(value, str) else None for value in values]


# One array ---------------------------------------------------------------------------------------------------------


def _array(
    jobs: Sequence[Job], points: Sequence[Sequence[str]], all_composed: Sequence[Composed], max_parallel: int
) -> Job:
    """All points as one job. UserError: they differ in what one script and one set of directives cannot carry."""
    first = jobs[0]
    shared = _shared(first)
    for n, job in enumerate(jobs):
        if "\n" in job.output_dir:
            raise UserError(f"{job.output_dir!r} is no folder's name: it has several lines", where="output_dir")
        for name, value in _shared(job).items():
            if value != shared[name]:
                key = _REASONS.get(name, name)
                raise UserError(
                    f"the points of an array are alike but for what the trainer reads; {n} differs from 0 in {key}",
                    where="--sweep",
                    hint="submit a sweep for each of its values",
                )
    own = tuple(
        Point(tuple(point), job.output_dir, job.files[0].text, job.produces)
        for point, job in zip(points, jobs, strict=True)
    )
    return replace(first, files=(), points=own, max_parallel=max_parallel)


def _shared(job: Job) -> dict[str, Any]:
    return {name: value for name, value in vars(job).items() if name not in _OWN}


def _content_id(job: Job, points: Sequence[Sequence[str]]) -> str:
    """A run id that the same sweep always gets."""
    digest = sha256(repr((job.run_id, [list(point) for point in points])).encode("utf-8", "surrogatepass"))
    return f"{job.name}-{digest.hexdigest()[:8]}"
