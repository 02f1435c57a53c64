"""Where what is shipped lies (steps, templates, profiles, pipelines): beside the package, inside it in a wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The folder that holds `steps/`, `templates/`, `profiles/` and `pipelines/`."""
    bundled = _PACKAGE / "_bundled"
    return bundled if bundled.is_dir() else _PACKAGE.parent


def steps_dir() -> Path:
    """The folder of the steps: `NEMOTRON_STEPS` where it is set, else the shipped one."""
    chosen = os.environ.get("NEMOTRON_STEPS")
    return Path(chosen).expanduser().absolute() if chosen else root() / "steps"


def templates_dir() -> Path:
    """The folder of the shipped job templates."""
    return root() / "templates"


def profiles_dir() -> Path:
    """The folder of the shipped example profiles."""
    return root() / "profiles"


def pipelines_dir() -> Path:
    """The folder of the shipped pipelines."""
    return root() / "pipelines"


def display(path: Path) -> str:
    """A path as a person would write it here: relative to the working directory when below it, else absolute."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
    except FileNotFoundError:  # the working directory is gone
        return str(path)
