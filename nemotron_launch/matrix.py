"""`nemotron steps check`: every step with every config and profile that fit, compiled, checked, and compared.

What is compared is the same on every machine: the run has its step's and config's name for an id, and a placeholder
stands for the code that travels, so that a rendering changes when what it says changes, and only then.
"""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nemotron_launch import bundle
from nemotron_launch.catalog import Step, find_config, load_steps
from nemotron_launch.compiler import Compiled, compile_job
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen, replace
from nemotron_launch.job import File
from nemotron_launch.plan import Origin, compose_for
from nemotron_launch.profiles import Profile, list_profiles, load_profile
from nemotron_launch.render import render
from nemotron_launch.resources import display

INDEX = "index.txt"  # which folders of a place are renderings; nothing else there is ever removed
_LONGEST_LINE = 200
NEUTRAL = Origin(python="python3", steps="steps", bundle=lambda step, code: bundle.PLACEHOLDER)


@frozen
class Case:
    """One cell of the matrix. named: the profile was asked for, so that it must fit."""

    step: Step
    config: Path
    profile: str
    named: bool = False

    @property
    def name(self) -> str:
        """Its folder among renderings: rl_nemo_rl_dpo-default-slurm."""
        return f"{self.step.id.replace('/', '_')}-{self.config.stem}-{Path(self.profile).stem}"


@frozen
class Result:
    """What came of a case. problems: why it does not compile or what is wrong with its files; diff: old and new."""

    case: Case
    files: tuple[File, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    diff: str = ""

    @property
    def ok(self) -> bool:
        return not self.problems and not self.diff


@dataclass
class _Found:
    """What was read or checked already: profiles by name, scripts by text."""

    profiles: dict[str, Profile | UserError] = field(default_factory=dict)
    scripts: dict[str, str] = field(default_factory=dict)


def cases(
    steps: Iterable[Step], configs: Sequence[str] = (), profiles: Sequence[str] = (), path: Path | None = None
) -> list[Case]:
    """Every step × config × profile that fit, or those that are named.

    A profile that bears a step's id (slurm_rl_nemo_rl_dpo) is that step's alone. UserError: a config that no step has.
    """
    steps = list(steps)
    names = list(profiles) or [entry.name for entry in list_profiles(profiles_path=path)]
    ids = [step.id for step in load_steps()]
    found: list[Case] = []
    taken: set[str] = set()
    for step in steps:
        own = step.configs()
        chosen = [own[name] for name in (configs or own) if name in own]
        for name in configs:
            if name not in own and ("/" in name or name.endswith((".yaml", ".yml"))):
                chosen.append(find_config(step, name))
        taken |= {name for name in configs if name in own or "/" in name or name.endswith((".yaml", ".yml"))}
        found += [Case(step, config, name) for config in chosen for name in names if profiles or _fits(name, step, ids)]
    if missing := [name for name in configs if name not in taken]:
        raise UserError(f"no step has a config {missing[0]}", hint=f"looked at {', '.join(step.id for step in steps)}")
    return found


def _fits(profile: str, step: Step, ids: Iterable[str]) -> bool:
    bears = [own for own in (name.replace("/", "_") for name in ids) if profile == own or profile.endswith(f"_{own}")]
    return not bears or max(bears, key=len) == step.id.replace("/", "_")


def check(
    chosen: Iterable[Case],
    *,
    against: Path | None = None,
    update: bool = False,
    whole: bool = False,
    test_only: bool = False,
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Result]:
    """Compile every case and look at what it becomes, in the order given.

    against: a folder of renderings to compare with. update: write them there instead. whole: nothing was left out, so
    that renderings of cases that are gone are wrong too. test_only: ask sbatch, where the profile reaches it from here.
    """
    found = _Found()
    compiled = [made for case in chosen if (made := _compile(case, found, path, env)) is not None]
    _check_scripts(compiled, found)
    results = [_result(case, made, found, test_only) for case, made in compiled]
    if against is not None:
        results = [_compared(result, against, update) for result in results]
        if whole:
            results += _gone(results, against, update)
        if update:
            _write_index(results, against, whole)
    return results


def _compile(
    case: Case, found: _Found, path: Path | None, env: Mapping[str, str] | None
) -> tuple[Case, Compiled | UserError] | None:
    """What a case compiles to; None where it needs several nodes and its profile is this machine."""
    if case.profile not in found.profiles:
        try:
            found.profiles[case.profile] = load_profile(case.profile, profiles_path=path, env=env)
        except UserError as error:
            found.profiles[case.profile] = error
    profile = found.profiles[case.profile]
    if isinstance(profile, UserError):
        return case, profile
    try:
        if profile.executor == "local" and not case.named and _nodes(case, profile, env) > 1:
            return None
        compiled = compile_job(case.step, case.config, (), profile, run_id=_run_id(case), origin=NEUTRAL, env=env)
        if compiled.job.executor == "lepton":  # carries its code inside: does it fit?
            code = [str(folder) for folder in compiled.composed.get("run.code", [])]
            render(replace(compiled.job, bundle=bundle.bundle(case.step, code)))
    except UserError as error:
        return case, error
    return case, compiled


def _nodes(case: Case, profile: Profile, env: Mapping[str, str] | None) -> int:
    composed = compose_for(case.step, case.config, (), profile, env=env)
    services = (composed.get("run.services") or {}).values()
    return int(composed.get("cluster.num_nodes", 1)) + sum(int(service.get("nodes", 0)) for service in services)


def _run_id(case: Case) -> str:
    tail = case.step.id.rpartition("/")[2]
    return re.sub(r"[^a-z0-9]+", "-", f"{tail}-{case.config.stem}".lower())[:60].strip("-")


def _result(case: Case, made: Compiled | UserError, found: _Found, test_only: bool) -> Result:
    if isinstance(made, UserError):
        return Result(case, problems=(str(made),))
    problems = [f"{file.path}: {found.scripts[file.text]}" for file in _scripts(made) if found.scripts[file.text]]
    if test_only and made.job.executor == "slurm":
        problems += _ask_sbatch(made)
    return Result(case, made.rendered.files, tuple(problems), made.warnings)


# Checks of files ---------------------------------------------------------------------------------------------------


def _scripts(compiled: Compiled) -> Iterator[File]:
    return (file for file in compiled.rendered.files if file.path.endswith((".sh", ".sbatch")))


def _check_scripts(compiled: Iterable[tuple[Case, Compiled | UserError]], found: _Found) -> None:
    """`bash -n` on every script, each text once."""
    texts = {file.text for _, made in compiled if isinstance(made, Compiled) for file in _scripts(made)}
    with ThreadPoolExecutor(4) as pool:
        found.scripts.update(zip(texts, pool.map(_bash_says, texts), strict=True))


def _bash_says(text: str) -> str:
    """What bash has against a script's syntax; nothing when it is well."""
    try:
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "cannot be checked: there is no bash"
    return done.stderr.strip() or (f"bash -n ended with {done.returncode}" if done.returncode else "")


def _ask_sbatch(compiled: Compiled) -> list[str]:
    """`sbatch --test-only`, for a cluster whose login node this is."""
    tunnel = compiled.job.options.get("tunnel") or {}
    if tunnel.get("type") == "ssh":
        return []
    if shutil.which("sbatch") is None:
        return ["sbatch --test-only: there is no sbatch on this machine"]
    command = ["sbatch", "--test-only"]
    done = subprocess.run(command, input=compiled.rendered.text, capture_output=True, text=True, timeout=120)
    return [f"sbatch --test-only: {done.stderr.strip()}"] if done.returncode else []


# Renderings --------------------------------------------------------------------------------------------------------


def _compared(result: Result, against: Path, update: bool) -> Result:
    if result.problems:
        return result
    folder = against / result.case.name
    before = read_folder(folder)
    now = {file.path: file.text for file in result.files}
    if before == now:
        return result
    if update:
        _write(folder, before, now)
        return result
    if not before:
        return replace(result, diff=f"there is no rendering in {display(folder)}; --update writes it\n")
    return replace(result, diff=diff_files(before, now, display(folder), "now"))


def read_folder(folder: Path) -> dict[str, str]:
    """The text files of a folder by their names; files that are no text are left out."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            try:
                found[path.relative_to(folder).as_posix()] = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise UserError(f"cannot be read: {reason}", where=display(path)) from None
    return found


def diff_files(before: Mapping[str, str], now: Mapping[str, str], old: str, new: str) -> str:
    """A unified diff of two sets of files, long lines cut."""
    lines: list[str] = []
    for name in sorted({*before, *now}):
        a, b = before.get(name, "").splitlines(), now.get(name, "").splitlines()
        lines += difflib.unified_diff(a, b, f"{old}/{name}", f"{new}/{name}", n=2, lineterm="")
    return "".join(f"{_cut(line)}\n" for line in lines)


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}… ({len(line)} characters)"


def _write(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    try:
        for name in before.keys() - now.keys():
            (folder / name).unlink()
        for name, text in now.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot be written: {reason}", where=display(Path(error.filename or folder))) from None


def _listed(against: Path) -> list[str]:
    try:
        return (against / INDEX).read_text(encoding="utf-8").split()
    except OSError:
        return []


def _gone(results: Sequence[Result], against: Path, update: bool) -> list[Result]:
    """Renderings of cases that are no more."""
    known = {result.case.name for result in results}
    gone = [name for name in _listed(against) if name not in known and (against / name).is_dir()]
    if update:
        for name in gone:
            shutil.rmtree(against / name)
        return []
    text = "nothing compiles to this rendering any more; --update removes it\n"
    step = results[0].case.step
    return [Result(Case(step, Path(name), "-"), diff=f"{display(against / name)}: {text}") for name in gone]


def _write_index(results: Sequence[Result], against: Path, whole: bool) -> None:
    names = {result.case.name for result in results if not result.problems}
    if not whole:
        names |= set(_listed(against))
    _write(against, {}, {INDEX: "".join(f"{name}\n" for name in sorted(names))})


# Reports -----------------------------------------------------------------------------------------------------------


def as_data(results: Iterable[Result]) -> list[dict[str, object]]:
    """Plain data for `--json`."""
    return [
        {
            "step": result.case.step.id,
            "config": result.case.config.stem,
            "profile": result.case.profile,
            "ok": result.ok,
            "problems": list(result.problems),
            "warnings": list(result.warnings),
            "diff": result.diff,
        }
        for result in results
    ]


def junit(results: Sequence[Result]) -> str:
    """JUnit's XML, as CI systems read it."""
    from xml.sax.saxutils import escape, quoteattr

    failed = sum(not result.ok for result in results)
    lines = [
        '<?xml version="1.0" encoding="utf-8"?>',
        f'<testsuite name="nemotron steps check" tests="{len(results)}" failures="{failed}" errors="0">',
    ]
    for result in results:
        names = f"classname={quoteattr(_printable(result.case.step.id))} name={quoteattr(_printable(result.case.name))}"
        if result.ok:
            lines.append(f"  <testcase {names}/>")
            continue
        text = "\n".join([*result.problems, result.diff]).strip()
        first = quoteattr(_printable(text.partition("\n")[0]))
        lines.append(f"  <testcase {names}><failure message={first}>{escape(_printable(text))}</failure></testcase>")
    return "\n".join([*lines, "</testsuite>", ""])


def _printable(text: str) -> str:
    """XML has no control characters."""
    return "".join(char if char in "\n\t" or char.isprintable() else "?" for char in text)
