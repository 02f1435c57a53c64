"""Hostile values in a Slurm job: they arrive as the same bytes, nothing else runs, or they are refused by name.

The rendered scripts run under bash with stand-ins for scontrol and srun; the latter runs its command here.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nemotron_launch.backends.slurm import secrets_text
from nemotron_launch.errors import UserError
from nemotron_launch.job import Bundle, Container, File, Job, Mount, Restart, Secret, Service
from nemotron_launch.quoting import FILTERS, sbatch
from nemotron_launch.render import Rendered, render

PIECES = [
    " ", "\t", "'", '"', "\\", "$(touch PWNED)", "`touch PWNED`", "; touch PWNED;", "\ntouch PWNED\n", "\n", "\r\n",
    "\r", "{{ job }}", "{% raw %}", "{#", "%", "%j", "%%", "ü", "漢", "\u2028", "\x85", "\x1b[31m", "-", "--",
    "--nodes=9", "=",
    "#", "!", "*", "?", "~", "&", "|", ">", "<", "$HOME", "${x", "$'", "EOF", "#SBATCH --hold", ",", ":", "/", "a",
    "Z9", "\x00", "\ud800",
]  # fmt: skip
hostile = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
option = st.one_of(st.none(), hostile)
relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck))

SRUN = """#!/bin/bash
# Stand-in: records its options, then runs the command as a node of Slurm would.
while [[ $1 == --* ]]; do printf '%s\\0' "$1" >> "$RECORD/options"; shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ $2 == hostnames ]] && echo node1 || echo "JobId=1 JobState=RUNNING Restarts=0 "
"""
RECORDER = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORD/arguments"
env -0 > "$RECORD/environment"
printf '%s' "$PWD" > "$RECORD/pwd"
"""


OPTIONS = [
    "account", "partition", "qos", "reservation", "constraint", "nodelist", "exclude", "comment", "network", "mpi",
    "interface", "mem", "signal",
]  # fmt: skip
FIELDS = [
    *OPTIONS, "step", "config", "profile", "output_dir", "home", "command", "file", "env", "env name", "secret",
    "image", "source", "target", "python", "service", "service command", "health", "service env", "mail", "sbatch_args",
    "srun_args", "bundle", "image_dir", "build_partition", "setup",
]  # fmt: skip


@st.composite
def jobs(draw: Any) -> Job:
    """A job with something hostile in one to three of the strings that a user can set."""
    chosen = draw(st.sets(st.sampled_from(FIELDS), min_size=1, max_size=3))

    def given_by_user(field: str, usual: str, start: str = "") -> str:
        return start + draw(hostile) if field in chosen else usual

    u = given_by_user
    runtime = draw(st.sampled_from(["pyxis", "charliecloud", "none"]))
    usual_image = "/images/x.sqsh" if runtime == "charliecloud" else "nvcr.io/nvidia/nemo-rl:v0.6.0"
    options: dict[str, Any] = {key: u(key, "") for key in OPTIONS}
    options |= {"signal": u("signal", "USR1@300"), "mail": {"user": u("mail", "a@b.org")}}
    options |= {"image_dir": u("image_dir", "")}
    options |= {key: [u(key, "--licenses=x", "--licenses=")] for key in ("sbatch_args", "srun_args")}
    options |= {"build_partition": u("build_partition", "cpu")}
    home = u("home", "/jobs", "/")
    return Job(
        run_id="run-1", name="x", step=u("step", "a/b"), config=u("config", "c"), executor="slurm",
        profile=u("profile", "p"), run_dir=home + "/run-1", workdir=home, output_dir=u("output_dir", "out"), nodes=2,
        procs=1, gpus_per_node=2, command=("python3", u("command", "x")), files=(File("config.yaml", u("file", "")),),
        env={u("env name", "NAME"): u("env", "")}, secrets=(Secret(u("secret", "TOKEN")),),
        container=Container(runtime, u("image", usual_image, draw(st.sampled_from(["", "/"]))),
                            (Mount(u("source", "/data", "/"), u("target", "/data", "/")),), u("python", "python3")),
        services=(Service(u("service", "judge"), (u("service command", "serve"),), 8000, gpus=1,
                          health=u("health", "/health"), env={"NAME": u("service env", "")}),),
        setup=(u("setup", "true"),), restart=Restart(1), bundle=Bundle(u("bundle", "code.tar.gz"), "0" * 64, 1),
        options=options,
    )  # fmt: skip


@given(jobs())
@settings(relaxed, max_examples=150)
def test_whatever_renders_is_bash_and_the_rest_is_refused_by_name(job: Job) -> None:
    try:
        rendered = render(job)
    except UserError as error:
        assert error.where, error
        event("refused")
        return
    event("rendered")
    for file in rendered.files:
        if file.path not in ("config.yaml", "setup.sh"):  # the user's own
            checked = subprocess.run(["bash", "-n"], input=file.text.encode(), capture_output=True)
            assert checked.returncode == 0, (file.path, checked.stderr, file.text)
    assert_directives_stand_alone(rendered)


def assert_directives_stand_alone(rendered: Rendered) -> None:
    """Directives end where the script says so: no value has opened another line."""
    lines = rendered.text.split("\n")
    directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives[0] == 1 and directives == list(range(1, len(directives) + 1))


# Names of files and folders, without what a path cannot have and what the refusals are tested for.
folder_names = hostile.map(lambda text: "".join(c for c in text if c.isprintable() and c not in "/%\\:,") + "x")
REFUSED = ("\x00", "\ud800", "\r\n")
carried = (
    st.lists(st.sampled_from([piece for piece in PIECES if piece not in REFUSED]), max_size=8)
    .map("".join)
    .filter(lambda text: "\r\n" not in text)
)


@given(
    name=folder_names,
    arguments=st.lists(carried, max_size=4),
    value=carried,
    secret=carried,
    target=folder_names,
    about=hostile,
    metrics=folder_names,
)
@settings(relaxed, max_examples=40)
def test_command_environment_and_secrets_arrive_as_the_same_bytes(
    name: str, arguments: list[str], value: str, secret: str, target: str, about: str, metrics: str
) -> None:
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        bin_dir, record, run_dir = top / "bin", top / "record", top / name / "jobs" / "run-1"
        for folder in (bin_dir, record, run_dir):
            folder.mkdir(parents=True)
        for tool, text in {"srun": SRUN, "scontrol": SCONTROL, "recorder": RECORDER}.items():
            (bin_dir / tool).write_text(text)
            (bin_dir / tool).chmod(0o755)
        job = Job(
            run_id="run-1", name="x", step=about, config=about, executor="slurm", profile=about, run_dir=str(run_dir),
            workdir=str(run_dir.parent), output_dir=metrics, nodes=1, procs=1, gpus_per_node=0,
            command=(str(bin_dir / "recorder"), *arguments), files=(), env={"VALUE": value},
            secrets=(Secret("SECRET"),),
            container=Container("pyxis", f"/{target}.sqsh", (Mount(f"/{target}", f"/{target}"),)),
            setup=('export FROM_SETUP="$VALUE"',), options={"interface": target, "mpi": "none"},
        )  # fmt: skip
        rendered = render(job)
        # The image is looked for on the cluster's file system, which is this one here.
        rendered = replace_text(rendered, "[[ -e $image ]]", "true")
        rendered = replace_text(rendered, "[[ -d $image ]]", "true")
        for file in rendered.files:
            (run_dir / file.path).write_bytes(file.text.encode())
        (run_dir / "secrets.env").write_bytes(secrets_text({"SECRET": secret}).encode())
        env = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "RECORD": str(record), "SLURM_JOB_ID": "1", "HOME": made,
               "SLURM_JOB_NODELIST": "node1", "TMPDIR": made}  # fmt: skip
        done = subprocess.run(["bash", run_dir / "job.sbatch"], env=env, capture_output=True, cwd=top)
        assert done.returncode == 0, done
        assert (record / "arguments").read_bytes() == b"".join(a.encode() + b"\0" for a in arguments or [""])
        found = dict(item.split(b"=", 1) for item in (record / "environment").read_bytes().split(b"\0") if item)
        assert found[b"VALUE"] == found[b"FROM_SETUP"] == value.encode()
        assert found[b"SECRET"] == secret.encode()
        assert found[b"NCCL_SOCKET_IFNAME"] == target.encode()
        assert (record / "pwd").read_text() == str(run_dir.parent)
        options = (record / "options").read_bytes().decode().split("\0")
        assert f"--container-image=/{target}.sqsh" in options
        assert f"--container-mounts=/{target}:/{target},{run_dir.parent}:{run_dir.parent}" in options
        assert not [path for path in top.rglob("*PWNED*") if path.is_file()]
        assert sorted(path.name for path in top.iterdir() if not path.name.startswith("nemotron-")) == sorted(
            {"bin", "record", name}
        )


def replace_text(rendered: Rendered, old: str, new: str) -> Rendered:
    return Rendered(rendered.main, tuple(replace(file, text=file.text.replace(old, new)) for file in rendered.files))


@given(hostile)
@settings(relaxed, max_examples=300)
def test_what_stands_behind_a_directive_is_read_back_by_slurms_rules(text: str) -> None:
    try:
        quoted = sbatch(text, "account")
    except UserError as error:
        assert error.where == "account" and any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text)
        return
    assert directive_arguments(f"--account={quoted} ") == ([f"--account={text}"] if text else ["--account="])


def directive_arguments(line: str) -> list[str]:
    """The options of an `#SBATCH` line as sbatch reads them: quotes, backslashes, and `#` outside of quotes ends it."""
    found: list[str] = []
    word: str | None = None
    quote = ""
    characters = iter(line)
    for character in characters:
        if character == "\\":
            word = (word or "") + next(characters)
        elif quote:
            quote, word = ("", word) if character == quote else (quote, (word or "") + character)
        elif character in "'\"":
            quote, word = character, word or ""
        elif character == "#":
            break
        elif character in " \t":
            found, word = (found if word is None else [*found, word]), None
        else:
            word = (word or "") + character
    assert not quote
    return found if word is None else [*found, word]


@given(hostile)
@settings(relaxed, max_examples=100)
def test_every_filter_carries_a_value_or_names_its_key(text: str) -> None:
    for filter_ in (FILTERS["sh"], FILTERS["sbatch"], FILTERS["mount"], FILTERS["json"]):
        try:
            filter_(text, "the.key")
        except UserError as error:
            assert error.where == "the.key"
