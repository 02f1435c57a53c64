"""Reads the config that a step's process is given; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.file_errors import file_error


def read_config(path: Path) -> dict[str, Any]:
    """The composed config that a step's process is given. UserError: it is none."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise file_error(error) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("is not YAML", where=str(path), hint=str(error)) from error
    if not isinstance(config, dict) or "output_dir" not in config:
        raise UserError("is not a composed config", where=str(path), hint="nemotron steps run composes one")
    return config
