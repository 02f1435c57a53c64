"""Profiles as text: the first one that `nemotron profiles init` writes, and a loaded one as YAML again."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.config.tree import to_plain
from nemotron_launch.config.yaml_files import dump
from nemotron_launch.errors import UserError
from nemotron_launch.job import Secret
from nemotron_launch.profiles import Profile, load_profile
from nemotron_launch.resources import display

_PLACEHOLDERS = ("your_", "your-", "login.example.com")  # what the shipped examples say for what only the user knows
NEMO_RL_PYTHON = "python-MegatronPolicyWorker"


@dataclass(frozen=True)
class Line:
    """A key of a draft.

    remark: stands beside it. example: shown as a comment where nothing was said. question: asked for on a terminal.
    """

    key: str
    remark: str = ""
    example: Any = None
    question: str = ""
    required: bool = False


@dataclass(frozen=True)
class Heading:
    """A comment on a line of its own, after an empty one."""

    text: str


Draft = tuple[Line | Heading, ...]

_HERE: Draft = (
    Line("description", example="On this machine."),
    Heading("Environment variables of every run, and lines of the shell before it."),
    Line("env", example={"OMP_NUM_THREADS": 4}),
    Line("setup", example=["source ~/.bashrc"]),
    Heading("The Python that has torch and megatron-core, where it is not this one."),
    Line("python", example="/path/to/venv/bin/python", question="Python of the trainer (empty: this one)"),
    Line("procs_per_node", "processes; the config's cluster.procs_per_node unless set", 2),
)
_CONTAINER: Draft = (
    Heading(
        "The container. image: the step's own unless set here, nvcr.io/nvidia/nemo-rl:v0.6.0 for the training steps."
    ),
    Line("image", example="nvcr.io/nvidia/nemo-rl:v0.6.0"),
    Line("python", "of that image the one with megatron-core; python3 in most others", NEMO_RL_PYTHON),
)
_SIZE: Draft = (
    Heading("The config's cluster.* unless set here."),
    Line("nodes", example=1),
    Line("gpus_per_node", example=8),
)
DRAFTS: dict[str, Draft] = {
    "local": _HERE,
    "slurm": (
        Line("description", example="A Slurm cluster."),
        Heading("The site."),
        Line("account", "account to charge", "your_account", "Account to charge (empty: your default one)"),
        Line("partition", "several with commas", "your_partition", "Partition (empty: the default one)"),
        Line(
            "remote_job_dir",
            "where every node sees it; a folder for each run",
            "/lustre/you/nemotron",
            "Folder for runs that every node sees",
            required=True,
        ),
        Line(
            "tunnel",
            "~/.ssh/config counts",
            {"type": "ssh", "host": "login.example.com"},
            "Login node (empty: this machine)",
        ),
        *_CONTAINER,
        Line("runtime", "or charliecloud, or none for the node's own Python", "pyxis"),
        Line("mounts", "what else the container sees; remote_job_dir is there by itself", ["/lustre:/lustre"]),
        *_SIZE,
        Heading("Time. The trainer saves before the limit, and the job goes on by itself."),
        Line("time", example="04:00:00"),
        Line("max_restarts", example=3),
        Heading("Values come from your environment when the job is submitted. optional: it runs without them too."),
        Line("secrets", example={"HF_TOKEN": {"optional": True}, "WANDB_API_KEY": {"optional": True}}),
        Heading("Where it applies."),
        Line("exclusive", "no other job on the nodes", True),
        Line("qos", example="normal"),
        Line("gpu_directive", "--gres=gpu:8; none on clusters without GRES", "gres"),
        Line("interface", "network interface of NCCL and gloo", "ib0"),
        Line("run_partition", "for -r; batch_partition for -b", "interactive"),
        Line("build_partition", "where container images are imported", "cpu"),
        Line("sbatch_args", example=["--licenses=lustre"]),
        Line("setup", example=["module load cuda"]),
    ),
    "lepton": (
        Line("description", example="DGX Cloud Lepton."),
        Heading("The site. LEPTON_WORKSPACE_TOKEN, or the Lepton client's login, gives access."),
        Line("workspace", "its id; LEPTON_WORKSPACE_ID unless set", "your-workspace"),
        Line("node_group", example="your-node-group", question="Node group (empty: shared capacity)"),
        Line("resource_shape", "of each node", "gpu.8xh100-80gb", "Resource shape of each node", required=True),
        Line(
            "mounts",
            "a volume that every node sees",
            [{"path": "/", "mount_path": "/mnt/shared", "from": "node-nfs:your-volume"}],
            "Volume, as PATH:MOUNT_PATH:FROM (/:/mnt/shared:node-nfs:NAME)",
            required=True,
        ),
        Line(
            "remote_job_dir", "in that volume", "/mnt/shared/nemotron", "Folder for runs in that volume", required=True
        ),
        *_CONTAINER,
        Line("image_pull_secrets", "where the image needs a login", ["ngc"]),
        *_SIZE,
        Heading("Restarts of the whole job, and the seconds that a finished one is kept."),
        Line("max_restarts", example=3),
        Line("ttl", example=86400),
        Heading("Secrets of the workspace, created there: variable → secret."),
        Line("secrets", example={"HF_TOKEN": {"reference": "HF_TOKEN"}}),
        Heading("Where it applies."),
        Line("reservation", example="your-reservation"),
        Line("priority", example="mid-4"),
        Line("preemption", example={"can_be_preempted": True}),
    ),
}
# What a draft says without being asked.
_GIVEN: dict[str, dict[str, Any]] = {
    "local": {"description": "On this machine."},
    "slurm": {
        "description": "A Slurm cluster.",
        "runtime": "pyxis",
        "time": "04:00:00",
        "max_restarts": 3,
        "exclusive": True,
        "secrets": {"HF_TOKEN": {"optional": True}, "WANDB_API_KEY": {"optional": True}},
    },
    "lepton": {"description": "DGX Cloud Lepton.", "max_restarts": 3, "ttl": 86400},
}


def draft(executor: str, said: Mapping[str, Any]) -> str:
    """The text of a profile: what was said as values, the rest as commented examples. Every value is quoted as YAML."""
    values = {**_GIVEN[executor], **{key: value for key, value in said.items() if value not in (None, "", [], ())}}
    if executor != "local" and "image" not in values and values.get("runtime") != "none":
        values.setdefault("python", NEMO_RL_PYTHON)
    lines = [f"executor: {executor}"]
    for line in DRAFTS[executor]:
        if isinstance(line, Heading):
            lines += ["", f"# {line.text}"]
            continue
        set_here = line.key in values
        text = _lines(line.key, values[line.key] if set_here else line.example)
        if line.remark:
            text[0] += f"  # {line.remark}"
        lines += text if set_here else [f"# {one}" for one in text]
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any) -> list[str]:
    if isinstance(value, str) and value.splitlines() != [value]:  # a block would run into what follows it
        escaped = (f"\\U{ord(char):08x}" if char in '"\\' or not " " <= char <= "~" else char for char in value)
        return [f'{key}: "{"".join(escaped)}"']
    return dump({key: value}).rstrip("\n").splitlines()


def write(path: Path, text: str, *, force: bool) -> Profile:
    """Write a draft once it has been seen to load. UserError: it does not, the file is there, it cannot be written."""
    if path.exists() and not force:
        raise UserError("is there already", where=display(path), hint="--force writes over it, --output elsewhere")
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        trial.write_text(text, encoding="utf-8")
        try:
            profile = load_profile(str(trial))
        except UserError as error:
            error.where, error.hint = None, (error.hint or "").replace(str(trial), path.name) or None
            raise
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot be written: {(error.strerror or str(error)).lower()}", where=display(path)) from None
    return profile


def as_yaml(profile: Profile) -> str:
    """What a profile says with all that it extends, as the YAML of a profile that extends nothing."""
    said = {key: value for key, value in profile.data.items() if value not in (None, "", [], {})}
    data = {"executor": profile.executor, **_escaped(said)}
    if "mounts" in data:
        data["mounts"] = [_mount(mount) for mount in data["mounts"]]
    secrets = {secret.name: _secret(secret) for secret in profile.secrets}
    if secrets or profile.public:
        data["secrets"] = {**secrets, **dict.fromkeys(sorted(profile.public), False)}
    config = to_plain(profile.layer)
    if config:
        data["config"] = config
    return f"# {profile.name}, from {', '.join(display(path) for path in reversed(profile.files))}\n{dump(data)}"


def _escaped(value: Any) -> Any:
    """The value with every `${` as text, which it is now."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _mount(mount: Mapping[str, Any]) -> dict[str, Any]:
    read_only = {"read_only": True} if mount["read_only"] else {}
    volume = {"from": mount["volume"]} if mount["volume"] else {}
    return {"path": mount["source"], "mount_path": mount["target"], **volume, **read_only}


def _secret(secret: Secret) -> dict[str, Any]:
    named = {"env": secret.source, "reference": secret.reference, "optional": secret.optional}
    return {key: value for key, value in named.items() if value}


def placeholders(profile: Profile) -> list[str]:
    """Keys that still hold an example's value in place of the user's own."""

    def holds(value: Any) -> bool:
        return any(mark in str(value) for mark in _PLACEHOLDERS)

    written = {key: to_plain(node) for key, node in profile.root.value.items()}
    return [key for key, value in profile.data.items() if holds(value) and holds(written.get(key))]
