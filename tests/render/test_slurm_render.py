"""The Slurm scripts as text: an example read by a person, templates of one's own, shellcheck, the image's import."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.job import Bundle, Container, File, Job, Mount, Restart, Secret, Service
from nemotron_launch.render import render
from tests.enroot import Enroot

HERE = Path(__file__).parent

EXAMPLE = Job(
    run_id="dpo-llama-20260101-1a2b3c",
    name="dpo-llama",
    step="rl/nemo_rl/dpo",
    config="default",
    executor="slurm",
    profile="cluster",
    run_dir="/lustre/team/jobs/dpo-llama-20260101-1a2b3c",
    workdir="/lustre/team/jobs",
    output_dir="/lustre/team/jobs/output/rl/dpo",
    nodes=2,
    procs=8,
    gpus_per_node=8,
    command=(
        "python3", "-m", "nemotron_launch.trainer.spawn", "--procs", "8", "--output-dir",
        "/lustre/team/jobs/output/rl/dpo", "--",
        "/lustre/team/jobs/dpo-llama-20260101-1a2b3c/code/steps/rl/nemo_rl/dpo/train.py", "--config",
        "/lustre/team/jobs/dpo-llama-20260101-1a2b3c/config.yaml",
    ),
    files=(File("config.yaml", "checkpointing:\n  checkpoint_dir: /lustre/team/jobs/output/rl/dpo/checkpoints\n"),),
    env={"NCCL_DEBUG": "WARN", "NOTE": "it's ours"},
    secrets=(Secret("HF_TOKEN", source="HF_TOKEN"),),
    container=Container(
        "pyxis", "nvcr.io/nvidia/nemo-rl:v0.6.0", (Mount("/lustre", "/lustre"), Mount("/data", "/data", True))
    ),
    services=(
        Service("judge", ("vllm", "serve", "/lustre/judge", "--port", "8000"), 8000, nodes=1, gpus=8, health="/health"),
    ),
    setup=("pip install --quiet omegaconf",),
    restart=Restart(3),
    bundle=Bundle("code-0123456789ab.tar.gz", "0123456789abcdef" * 4, 400_000),
    options={
        "account": "team", "partition": "batch", "cpus_per_task": 64, "mem": 0, "exclusive": True, "time": "04:00:00",
        "signal": "USR1@300", "interface": "ib0", "hang_timeout": 1800, "comment": "sweep 3",
        "mail": {"user": "me@example.org", "type": ["END", "FAIL"]}, "build_partition": "cpu",
        "sbatch_args": ["--licenses=fs:1"], "srun_args": ["--cpu-bind=none"],
    },
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["job.sbatch", "node.sh", "service-judge.sh", "setup.sh", "shell.sh", "import_image.sbatch"]
)
def test_the_example_is_rendered_as_it_was_read_and_approved(name: str) -> None:
    """NEMOTRON_UPDATE=1 writes the files anew: then read them."""
    text = {file.path: file.text for file in render(EXAMPLE).files}[name]
    stored = HERE / "example" / name
    if os.environ.get("NEMOTRON_UPDATE"):
        stored.parent.mkdir(exist_ok=True)
        stored.write_text(text)
    assert text == stored.read_text()


def bare(job: Job) -> Job:
    less = replace(job, container=Container(), services=(), secrets=(), setup=(), bundle=None)
    return replace(less, options={}, restart=Restart())


@pytest.mark.parametrize(
    "job",
    [
        EXAMPLE,
        bare(EXAMPLE),
        replace(EXAMPLE, container=Container("charliecloud", "/images/x.sqsh")),
        replace(EXAMPLE, services=(), gpus_per_node=0),
    ],
)
def test_the_scripts_are_clean_in_shellchecks_eyes(job: Job, tmp_path: Path) -> None:
    scripts = []
    for file in render(job).files:
        if file.path.endswith((".sh", ".sbatch")) and file.path != "setup.sh":
            scripts.append(tmp_path / file.path)
            scripts[-1].write_text(file.text)
    # 2317: what a trap calls looks unreachable. 1091: files that lie on the cluster.
    command = ["shellcheck", "--shell=bash", "--exclude=SC2317,SC1091", *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_same_job_gives_the_same_bytes() -> None:
    assert render(EXAMPLE) == render(replace(EXAMPLE))


def test_rendering_takes_a_few_milliseconds() -> None:
    render(EXAMPLE)
    start = time.perf_counter()
    for _ in range(10):
        render(EXAMPLE)
    # 0.4 ms on an idle core; a 1,000-point sweep may take 3 s in all.
    assert (time.perf_counter() - start) / 10 < 0.010


# What sbatch, srun and the runtimes cannot do.


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ({"run_dir": "/a%b/run"}, "remote_job_dir", "cannot carry '%'"),
        ({"workdir": "jobs"}, "remote_job_dir", "not an absolute path"),
        ({"container": Container("pyxis", "x", (Mount("/a:b", "/c"),))}, "mounts[0]", "cannot carry ':'"),
        ({"container": Container("charliecloud", "nvcr.io/x:1")}, "image", "charliecloud runs a squash file"),
        ({"options": {"account": "a\nb"}}, "account", "control character"),
        ({"options": {"signal": "KILL@60"}}, "signal", "does not listen"),
        ({"options": {"sbatch_args": ["--output=x"]}}, "sbatch_args[0]", "--output cannot be set here"),
        ({"options": {"sbatch_args": ["-A team"]}}, "sbatch_args[0]", "-A cannot be set here"),
        ({"options": {"sbatch_args": ["--wrap"]}}, "sbatch_args[0]", "cannot be set here"),
        ({"command": ("python3", "a\r\nb")}, "command[1]", "carriage return"),
        ({"command": ("python3", "a\0b")}, "command[1]", "NUL"),
        ({"env": {"A": "\ud800"}}, "env.A", "UTF-8"),
        ({"env": {"A B": "x"}}, "env", "no name for an environment variable"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_its_key(change: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[")) as caught:
        render(replace(EXAMPLE, services=(), **change))
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("directive", "line"),
    [("gpus-per-node", "#SBATCH --gpus-per-node=8"), ("gres", "#SBATCH --gres=gpu:8"), ("none", "")],
)
def test_gpus_are_asked_for_as_the_cluster_wants_it(directive: str, line: str) -> None:
    text = render(replace(EXAMPLE, options={"gpu_directive": directive})).text
    directives = [found for found in text.splitlines() if found.startswith("#SBATCH")]
    assert [found for found in directives if "gpu" in found] == [line] * bool(line)


def test_the_folder_of_all_runs_is_mounted_unless_a_mount_shows_it() -> None:
    elsewhere = Container("pyxis", "x", (Mount("/scratch", "/lustre"),))
    assert "/scratch:/lustre,/lustre/team/jobs:/lustre/team/jobs" in render(replace(EXAMPLE, container=elsewhere)).text


# Templates of one's own.


def with_template(folder: Path, text: str) -> Job:
    (folder / "mine.sbatch.j2").write_text(text)
    return replace(EXAMPLE, template=str(folder / "mine.sbatch.j2"))


def test_a_template_of_ones_own_may_change_one_block_of_the_shipped_one(tmp_path: Path) -> None:
    text = '{% extends "slurm/job.sbatch.j2" %}\n{% block peers %}\nmodule load ours\n{{ super() }}{%- endblock %}'
    mine = render(with_template(tmp_path, text)).text
    assert mine.replace("module load ours\n", "", 1) == render(EXAMPLE).text


def test_a_template_of_ones_own_may_be_written_from_nothing(tmp_path: Path) -> None:
    text = (
        "#!/bin/bash\n#SBATCH --account={{ job.options.account | sbatch }}\n"
        "cd {{ job.workdir | sh }}\n{{ job.command | sh_words }}\n"
    )
    lines = render(with_template(tmp_path, text)).text.splitlines()
    assert lines[1:3] == ["#SBATCH --account=team", "cd /lustre/team/jobs"] and lines[3].startswith("python3 -m")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a\n{{ job.nodes }}\n{{ nowhere }}\n", 3, "'nowhere' is undefined"),
        ("a\n{{ job.nowhere }}\n", 2, "no attribute 'nowhere'"),
        ("a\n{% if %}\n", 2, "Expected an expression"),
        ("a\n\n{{ 1 / 0 }}\n", 3, "division by zero"),
        ("{{ job.__class__.__mro__ }}\n", 1, "unsafe"),
        ("a\n{{ 'x\\ny' | sbatch }}\n", 2, "control character"),
        ("\n{% include '/etc/passwd' %}\n", 2, "no such template"),
    ],
)
def test_a_mistake_in_a_template_is_told_with_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        render(with_template(tmp_path, text))
    assert str(caught.value.where).endswith(f"mine.sbatch.j2:{line}")


def test_a_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such template"):
        render(replace(EXAMPLE, template=str(tmp_path / "none.j2")))


# The import of the image, with a stand-in for enroot.


@pytest.fixture
def enroot(tmp_path: Path) -> Enroot:
    return Enroot(tmp_path / "bin")


@pytest.fixture
def import_image(tmp_path: Path, enroot: Enroot) -> Any:
    images = tmp_path / "images"
    job = replace(EXAMPLE, options={"image_dir": str(images)})
    script = next(file.text for file in render(job).files if file.path == "import_image.sbatch")

    def run(**env: str) -> Any:
        environ = {"PATH": f"{enroot.folder}:{os.environ['PATH']}", **env}
        before = len(enroot.imports)
        done = subprocess.run(["bash"], input=script, env=environ, capture_output=True, text=True, timeout=60)
        return done, enroot.imports[before:], images

    return run


SQUASH = "nvcr.io+nvidia+nemo-rl+v0.6.0.sqsh"


def test_an_import_makes_a_whole_squash_file_and_notes_its_digest(import_image: Any) -> None:
    done, asked, images = import_image()
    assert done.returncode == 0, done
    assert asked[0][:2] == ["import", "--output"] and asked[0][3:] == ["docker://nvcr.io#nvidia/nemo-rl:v0.6.0"]
    assert subprocess.run(["unsquashfs", "-stat", images / SQUASH], capture_output=True).returncode == 0
    noted = json.loads((images / f"{SQUASH}.json").read_text())
    assert noted["uri"] == asked[0][3] and noted["digest"] == "sha256:" + "1" * 64
    assert noted["sha256"] == hashlib.sha256((images / SQUASH).read_bytes()).hexdigest()
    assert sorted(path.name for path in images.iterdir()) == [".enroot", SQUASH, f"{SQUASH}.json"]


def test_an_image_that_is_there_is_not_imported_again_unless_forced(import_image: Any) -> None:
    import_image()
    done, asked, _ = import_image()
    assert done.returncode == 0 and asked == []
    _, asked, _ = import_image(NEMOTRON_FORCE_SQUASH="1")
    assert asked[0][0] == "import"


@pytest.mark.parametrize("size", [0, 4000])
def test_half_a_file_is_imported_again(size: int, import_image: Any) -> None:
    _, _, images = import_image()
    with (images / SQUASH).open("r+b") as file:
        file.truncate(min(size, (images / SQUASH).stat().st_size - 4096))
    _, asked, _ = import_image()
    assert asked[0][0] == "import"


def test_an_enroot_that_knows_no_digests_will_do(import_image: Any, enroot: Enroot) -> None:
    enroot.means("Usage: enroot COMMAND [ARG...]")
    done, _, images = import_image()
    assert done.returncode == 0 and json.loads((images / f"{SQUASH}.json").read_text())["digest"] == ""


def test_a_refused_login_names_the_registry_and_the_file_of_credentials(import_image: Any, enroot: Enroot) -> None:
    enroot.refuses()
    done, _, images = import_image()
    assert done.returncode == 1
    assert "nvcr.io refuses the login" in done.stderr and "~/.config/enroot/.credentials" in done.stderr
    assert not (images / SQUASH).exists() and not list(images.glob("*.lock"))


def test_an_image_folder_that_cannot_be_made_is_named(tmp_path: Path, import_image: Any) -> None:
    (tmp_path / "images").write_text("in the way")
    done, asked, images = import_image()
    assert done.returncode == 1 and asked == []
    assert f"error: {images} cannot be made: image_dir of the profile names another folder" in done.stderr


def test_a_service_with_an_image_of_its_own_has_an_import_of_its_own() -> None:
    own, same = "vllm/vllm-openai:v1", "nvcr.io/nvidia/nemo-rl:v0.6.0"
    services = Service("a", ("serve",), 8000, image=own), Service("b", ("serve",), 8001, image=same)
    files = {file.path: file.text for file in render(replace(EXAMPLE, services=services)).files}
    assert sorted(name for name in files if name.startswith("import_")) == [
        "import_image.sbatch", "import_image_2.sbatch"
    ]  # fmt: skip
    assert "uri=docker://vllm/vllm-openai:v1\n" in files["import_image_2.sbatch"]
    script = files["job.sbatch"]
    assert "image_2=/lustre/team/jobs/images/vllm+vllm-openai+v1.sqsh" in script
    assert script.count('--container-image="$image_2"') == 1 and script.count('--container-image="$image"') == 2
