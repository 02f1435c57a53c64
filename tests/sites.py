"""Profiles for the compiler's tests, each a small file with what a test is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemotron_launch.profiles import Profile, load_profile

SLURM: dict[str, Any] = {
    "executor": "slurm",
    "account": "physics",
    "partition": "batch",
    "remote_job_dir": "/lustre/jobs",
    "runtime": "none",
    "time": "01:00:00",
}
LEPTON: dict[str, Any] = {
    "executor": "lepton",
    "resource_shape": "gpu.8xh100-80gb",
    "remote_job_dir": "/mnt/shared/jobs",
    "mounts": [{"path": "/", "mount_path": "/mnt/shared", "from": "node-nfs:x"}],
}


def profile_file(folder: Path, name: str, base: dict[str, Any] | None = None, **keys: Any) -> Path:
    """Write the profile `name` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**(base or {}), **keys}))
    return path


def profile(folder: Path, base: dict[str, Any] | None = None, **keys: Any) -> Profile:
    """The profile `site` with these keys."""
    return load_profile("site", profiles_path=profile_file(folder, "site", base, **keys))
