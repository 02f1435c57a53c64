"""Whatever a user writes reaches the processes of a Lepton job as the same bytes, or is refused; none of it is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_launch.errors import UserError
from nemotron_launch.job import Container, File, Job, Mount, Secret, Service
from nemotron_launch.render import render
from tests.backends.lepton_jobs import VOLUME, lepton_job
from tests.backends.lepton_replicas import _as_started

NASTY = [
    "", " ", "-n", "--", "-rf /", "'", '"', "\\", "it's", "$HOME", "$(touch RAN)", "`touch RAN`", "$((1+1))", "$$",
    "$$$$",
    "$(A)", "$(LEPTON_JOB_NAME)", "$$(A)", "a\nb", "\n", "a\n#SBATCH --x", "\t", "\r\n", "!!", "*", "?", "[a]", "{a,b}",
    "~", "#", ";touch RAN;", "&& touch RAN", "| touch RAN", "> RAN", "<<EOF", "EOF", "END", "{{ job }}", "{% raw %}",
    "{# x #}", "%s%n", "%j", "ü", "日本", "🙂", "\u2028", "\x1b[31m", "\x7f", "=", "a=b", "'\"'\"'", "$'\\n'", "a\\",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(NASTY) | st.text(max_size=8), max_size=4).map("".join)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
DUMP = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['DUMP'], 'w'))"


def is_carried(text: str) -> bool:
    """No NUL and no lone surrogate: neither is text that a program can be given."""
    return "\0" not in text and text.encode("utf-8", "replace").decode() == text


def start(job: Job, folder: Path, *, rewrites: bool) -> subprocess.CompletedProcess[bytes]:
    """Run the command of a one-replica job, in a folder of its own, with the spec's variables."""
    spec = json.loads(render(job).text)["spec"]
    command, env = _as_started(spec, {"LEPTON_JOB_NAME": "job"}, {}, rewrites)
    assert subprocess.run(["bash", "-n"], input=command[2].encode()).returncode == 0
    env |= {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, timeout=60)


@FEW
@given(
    values=st.lists(TEXT, min_size=1, max_size=8),
    arguments=st.lists(TEXT, max_size=6),
    rewrites=st.booleans(),
)
def test_values_and_arguments_arrive_as_the_same_bytes(values: list[str], arguments: list[str], rewrites: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        remote = Path(folder) / "it's $(touch RAN) $$ remote"
        env = {f"V{n}": value for n, value in enumerate(values)}
        command = (sys.executable, "-c", DUMP, *arguments)
        job = lepton_job(remote, env={**env, "DUMP": f"{folder}/dump"}, command=command)
        if not all(is_carried(text) for text in (*values, *arguments)):
            with pytest.raises(UserError):
                render(job)
            return
        done = start(job, Path(folder), rewrites=rewrites)
        assert done.returncode == 0, done.stdout
        got_arguments, got_env = json.loads((Path(folder) / "dump").read_text())
        assert got_arguments == arguments
        assert {name: got_env.get(name) for name in env} == env
        assert not list(Path(folder).rglob("RAN"))


@FEW
@given(config=TEXT, value=TEXT, argument=TEXT, rewrites=st.booleans())
def test_configs_and_services_get_the_same_bytes(config: str, value: str, argument: str, rewrites: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The service ends as soon as it has said what it got, and the attempt with it.
        env = {"V": value, "DUMP": f"{folder}/dump"}
        service = Service("judge", (sys.executable, "-c", DUMP, argument), 1, env=env)
        job = lepton_job(Path(folder) / "remote", files=(File("config.yaml", config),), services=(service,))
        if not all(is_carried(text) for text in (config, value, argument)):
            with pytest.raises(UserError):
                render(job)
            return
        start(job, Path(folder), rewrites=rewrites)
        got_arguments, got_env = json.loads((Path(folder) / "dump").read_text())
        assert (got_arguments, got_env["V"]) == ([argument], value)
        assert (Path(folder) / "remote/r1/config.yaml").read_bytes() == config.encode()
        assert not list(Path(folder).rglob("RAN"))


@settings(max_examples=200, deadline=None)
@given(text=TEXT, data=st.data())
def test_every_other_text_is_carried_as_it_is_or_refused(text: str, data: st.DataObject) -> None:
    """The parts of a spec that no shell sees, and the names that one does."""
    field = data.draw(st.sampled_from(sorted(FIELDS)))
    change, read = FIELDS[field]
    try:
        rendered = render(change(text))
    except UserError as error:
        assert str(error)
        return
    spec = json.loads(rendered.text)["spec"]
    assert read(spec) == text
    assert subprocess.run(["bash", "-n"], input=spec["container"]["command"][2].encode()).returncode == 0


def _with(**options: Any) -> Job:
    return lepton_job(options={"node_group": "g", **options})


FIELDS: dict[str, Any] = {
    "image": (lambda t: lepton_job(container=Container("lepton", t)), lambda s: s["container"]["image"]),
    "node_group": (lambda t: _with(node_group=t), lambda s: s["affinity"]["allowed_dedicated_node_groups"][0]),
    "reservation": (lambda t: _with(reservation=t), lambda s: s["reservation_config"]["reservation_id"]),
    "resource_shape": (lambda t: _with(resource_shape=t), lambda s: s["resource_shape"]),
    "pull secret": (lambda t: _with(image_pull_secrets=[t]), lambda s: s["image_pull_secrets"][0]),
    "mount path": (
        lambda t: lepton_job(container=Container("lepton", "i", (Mount("/" + t, "/d", volume=VOLUME),))),
        lambda s: s["mounts"][0]["path"][1:],
    ),
    "mount target": (
        lambda t: lepton_job(container=Container("lepton", "i", (Mount("/d", "/" + t, volume=VOLUME),))),
        lambda s: s["mounts"][0]["mount_path"][1:],
    ),
    "mount volume": (
        lambda t: lepton_job(container=Container("lepton", "i", (Mount("/d", "/d", volume="node-nfs:" + t),))),
        lambda s: s["mounts"][0]["from"].removeprefix("node-nfs:"),
    ),
    "secret reference": (
        lambda t: lepton_job(secrets=(Secret("S", reference=t),)),
        lambda s: next(e for e in s["envs"] if e["name"] == "S")["value_from"]["secret_name_ref"],
    ),
    "env name": (
        lambda t: lepton_job(env={t: "1"}),
        lambda s: next(e["name"] for e in s["envs"] if e.get("value") == "1"),
    ),
    "secret name": (
        lambda t: lepton_job(secrets=(Secret(t, reference="r"),)),
        lambda s: next(e["name"] for e in s["envs"] if "value_from" in e),
    ),
}


@settings(max_examples=100, deadline=None)
@given(config=TEXT, profile=TEXT)
def test_names_in_comments_cannot_leave_them(config: str, profile: str) -> None:
    command = json.loads(render(lepton_job(config=config, profile=profile)).text)["spec"]["container"]["command"][2]
    known = json.loads(render(lepton_job()).text)["spec"]["container"]["command"][2]
    assert command.splitlines()[2:] == known.splitlines()[2:]
    assert "$" not in command.split("\n")[1]
