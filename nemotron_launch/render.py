"""From a job to the text of its files: the backends' `render_job`, and Jinja as all of them use it.

Shipped templates are ours and trusted; a profile's own runs in Jinja's sandbox. It may extend or include the shipped
ones by their names (`{% extends "slurm/job.sbatch.j2" %}`) and what lies beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jinja2

from nemotron_launch.cache import folder as cache_folder
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.job import File, Job
from nemotron_launch.quoting import FILTERS, sh
from nemotron_launch.resources import display, templates_dir


@frozen
class Rendered:
    """What a job becomes. main: the file that is submitted; files: all text files of the run's folder, main first."""

    main: str
    files: tuple[File, ...]

    @property
    def text(self) -> str:
        """The text of `main`: what a dry run prints."""
        return next(file.text for file in self.files if file.path == self.main)


def render(job: Job) -> Rendered:
    """All text files of the job's folder, as its executor wants them. UserError: what the executor cannot carry."""
    rendered: Rendered = import_module(f"nemotron_launch.backends.{job.executor}").render_job(job)
    return rendered


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The shipped template of this name ("slurm/job.sbatch.j2"), filled."""
    return _run(_shipped(), template, values)


def fill_own(template: Path, values: Mapping[str, Any]) -> str:
    """A template of the user's, filled in Jinja's sandbox. UserError: with its file and line."""
    if not template.is_file():
        raise UserError("no such template", where=display(template))
    return _run(_sandbox(template.parent.absolute()), template.name, values)


def setup_file(job: Job) -> File:
    """The profile's setup commands as a file that a shell sources, so that no quote left open reaches further."""
    for n, line in enumerate(job.setup):
        sh(line, f"setup[{n}]")  # only for what no file can carry
    return File("setup.sh", "# The profile's setup commands.\n" + "".join(f"{line}\n" for line in job.setup))


@cache
def _shipped() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(templates_dir())
    return _with_filters(jinja2.Environment(loader=loader, bytecode_cache=_compiled_templates(), **_STYLE))


def _compiled_templates() -> jinja2.BytecodeCache | None:
    """Compiling the templates costs more than all the rest of a dry run: what Jinja made of them is kept."""
    version = Path(jinja2.__file__).stat().st_mtime_ns
    folder = cache_folder(f"templates-{sys.version_info[0]}.{sys.version_info[1]}-{version}")
    return _TemplateCache(str(folder)) if folder else None


class _TemplateCache(jinja2.FileSystemBytecodeCache):
    """A full disk or a broken file makes a dry run slower, nothing else."""

    def load_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        try:
            super().load_bytecode(bucket)
        except Exception:  # whatever a broken pickle may raise
            bucket.reset()

    def dump_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        with suppress(OSError):
            super().dump_bytecode(bucket)


def _sandbox(folder: Path) -> jinja2.Environment:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    loaders = [jinja2.FileSystemLoader(folder), jinja2.FileSystemLoader(templates_dir())]
    return _with_filters(ImmutableSandboxedEnvironment(loader=jinja2.ChoiceLoader(loaders), **_STYLE))


# A line that holds only a {% … %} leaves nothing behind; text stays as it is, never HTML.
_STYLE: dict[str, Any] = {
    "undefined": jinja2.StrictUndefined,
    "trim_blocks": True,
    "lstrip_blocks": True,
    "keep_trailing_newline": True,
    "autoescape": False,
}


def _with_filters(environment: jinja2.Environment) -> jinja2.Environment:
    environment.filters.update(FILTERS)
    return environment


def _run(environment: jinja2.Environment, name: str, values: Mapping[str, Any]) -> str:
    try:
        return environment.get_template(name).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(error.message or "syntax error", where=_place(error.filename or name, error.lineno)) from None
    except jinja2.TemplateNotFound as error:
        raise UserError(f"no such template: {error.name}", where=_line(error, environment, name)) from None
    except UserError as error:
        if error.where is None:
            raise UserError(error.message, where=_line(error, environment, name), hint=error.hint) from None
        raise
    except RecursionError:
        raise UserError("extends or includes itself without end", where=name) from None
    except jinja2.TemplateError as error:
        raise UserError(error.message or type(error).__name__, where=_line(error, environment, name)) from None
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        # An expression of the template that does not work out: {{ 1 / 0 }}, {{ job.nodes + "x" }}.
        raise UserError(f"{type(error).__name__}: {error}", where=_line(error, environment, name)) from None


def _line(error: Exception, environment: jinja2.Environment, name: str) -> str:
    """The innermost line of a template that the error passed through: Jinja puts them into the traceback."""
    import traceback

    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.endswith(".j2") or Path(frame.filename).name == name:
            return _place(frame.filename, frame.lineno)
    return name


def _place(file: str, line: int | None) -> str:
    return f"{display(Path(file))}:{line}" if line else display(Path(file))
