"""Hostile strings from the command line to the process that runs: the same bytes arrive, and nothing is executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.config.overrides import dump_value
from nemotron_launch.errors import UserError
from nemotron_launch.plan import compose_for, plan_job
from nemotron_launch.render import render
from tests.sites import LEPTON, SLURM, profile

NASTY = ["$(touch pwned)", "`touch pwned`", "${HOME}", "{{ 1 }}", "{% raw %}", "%s%%", "'", '"', "\\", "\n", "\t", "!"]
NASTY += ["-rf", "--", ";", "&", "|", ">", "<", "*", "?", "[", "]", "~", "#", "=", ":", ",", " ", "é", "\u2028", "😀"]
texts = st.lists(st.sampled_from(NASTY) | st.text("ab 1", max_size=3), min_size=1, max_size=6).map("".join)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(text=texts)
@example(text="a\nb: c")
@example(text="'; touch pwned; '")
@example(text="")
def test_an_override_arrives_in_the_config_as_it_was_typed(tree: Path, text: str) -> None:
    import yaml

    step = find_step("small")
    override = f"+env_vars.A={dump_value(text)}"
    if "${" in text:  # an interpolation on purpose
        override = "+env_vars.A=" + dump_value(text.replace("${", "\\${"))
    job = plan_job(step, compose_for(step, find_config(step, None), [override]))
    assert yaml.safe_load(job.files[0].text)["env_vars"] == {"A": text}


@quick
@given(words=st.lists(texts, max_size=3), value=texts)
def test_a_script_for_this_machine_hands_on_the_same_bytes(tree: Path, words: list[str], value: str) -> None:
    words = ["--flag", *(word for word in words if not word.startswith("-"))]
    step = find_step("small")
    composed = compose_for(step, find_config(step, None), ["+run.env.VALUE=" + dump_value(value.replace("${", "\\${"))])
    job = plan_job(step, composed, None, words)
    rendered = render(job)
    script = rendered.text.replace(f"{tree}/sft/small/train.py", str(seen_script()))
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    argv, env, config = json.loads(done.stdout)
    assert argv == ["--config", f"{job.run_dir}/config.yaml", *words]
    assert env["VALUE"] == value
    assert config == job.files[0].text
    assert not list(Path.cwd().glob("pwned*"))


def seen_script() -> Path:
    """A script that prints its arguments, its environment and the config that it was given."""
    path = Path("seen.py")
    path.write_text(
        "import json, os, sys\n"
        "config = open(sys.argv[sys.argv.index('--config') + 1]).read()\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ), config]))\n"
    )
    return path


@quick
@given(words=st.lists(texts, min_size=1, max_size=3))
def test_arguments_run_here_are_the_same_bytes(tree: Path, words: list[str]) -> None:
    words = ["--flag", *(word for word in words if not word.startswith("-"))]
    step = find_step("small")
    job = plan_job(step, compose_for(step, find_config(step, None)), None, words)
    assert list(job.command[-len(words) :]) == words
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *job.command[4:]]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert json.loads(done.stdout) == words


@pytest.mark.parametrize("base", [SLURM, {**SLURM, "runtime": "pyxis"}, LEPTON])
@quick
@given(value=texts, line=texts, key=st.sampled_from(["comment", "account", "qos", "image", "mount", "path"]))
def test_whatever_a_profile_says_compiles_to_a_sound_script_or_is_refused(
    tmp_path: Path, base: dict[str, object], value: str, line: str, key: str
) -> None:
    value = value.replace("${", "\\${")
    more: dict[str, object] = {"env": {"A": value}, "description": line.replace("${", "\\${")}
    if key == "mount" and base is LEPTON:
        more["mounts"] = [{"path": f"/x{value}", "mount_path": "/mnt", "from": "node-nfs:x"}]
    elif key == "mount":
        more["mounts"] = [f"/x{value}:/mnt"]
    elif key == "path":
        more["remote_job_dir"] = f"/mnt/shared/{value}"
    elif key == "image" or base is not LEPTON:
        more[key] = value
    step = find_step("dpo")
    try:
        where = profile(tmp_path, base, **more)  # type: ignore[arg-type]
        rendered = render(plan_job(step, compose_for(step, find_config(step, "default"), (), where), where))
    except UserError as error:
        assert error.message
        return
    for file in rendered.files:
        if file.path.endswith((".sh", ".sbatch")):
            checked = subprocess.run(["bash", "-n"], input=file.text, text=True, capture_output=True)
            assert checked.returncode == 0, checked.stderr
    if rendered.main.endswith(".json"):
        json.loads(rendered.text)
