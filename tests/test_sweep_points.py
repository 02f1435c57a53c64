"""Sweeps: how their axes are read, what their points compile to, and what is refused before anything is submitted."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.config.overrides import parse_override
from nemotron_launch.config.sweep_values import parse_axis
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.plan import compose_for, plan_job
from nemotron_launch.profiles import Profile
from nemotron_launch.sweeps import Sweep, compile_sweep, pack, read_points
from tests.conftest import Nemotron
from tests.sites import LEPTON, SLURM, profile, profile_file


def values(text: str) -> list[Any]:
    return [parse_override(override).value for override in parse_axis(text).overrides()]


# Axes.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", [1]),
        ("a=0.05, 0.1,1e-3", [0.05, 0.1, 0.001]),
        ("a=x,'y,z',[1,2],{k: 1},null,true", ["x", "y,z", [1, 2], {"k": 1}, None, True]),
        ("a=choice(adam, 'sgd(1)')", ["adam", "sgd(1)"]),
        # Hydra's own documentation: range(0,10,3) is 0,3,6,9; its end does not belong to it.
        ("a=range(0,10,3)", [0, 3, 6, 9]),
        ("a=range(3)", [0, 1, 2]),
        ("a=range(start=3,stop=0,step=-1)", [3, 2, 1]),
        ("a=range(0,0.4,0.1)", [0.0, 0.1, 0.2, 0.3]),
        ("a=logspace(1e-6,1e-3,4)", [1e-6, 1e-5, 1e-4, 1e-3]),
        ("a=logspace(8,1,count=4)", [8.0, 4.0, 2.0, 1.0]),
    ],
)
def test_an_axis_has_these_values(text: str, expected: list[Any]) -> None:
    assert values(text) == expected


def test_a_value_stays_as_it_was_typed() -> None:
    assert parse_axis("+a.b=1.0e-6, 'x y'").overrides() == ["+a.b=1.0e-6", "+a.b='x y'"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "'=' and values"),
        ("~a=1,2", "a sweep deletes none"),
        ("a=1,", "a value"),
        ("a=choice(1,2", "')'"),
        ("a=choice(1)2", "',' or the end"),
        ("a=interval(0,1)", "endlessly many"),
        ("a=glob(*)", "choice, range, logspace"),
        ("a=range(1,2,0)", "a step that is not 0"),
        ("a=range(2,2)", "at least one value"),
        ("a=range(0,1,1e-9)", "at most 100000 values"),
        ("a=range(x)", "a number for stop, found x"),
        ("a=range(1,stop=inf)", "a number for stop"),
        ("a=range(1,2,3,4)", "at most 3 arguments"),
        ("a=range(end=3)", "found end"),
        ("a=logspace(-6,-3,4)", "not their exponents"),
        ("a=logspace(1,2)", "logspace(first,last,count)"),
        ("a=logspace(1,2,1)", "a count from 2"),
    ],
)
def test_an_axis_that_cannot_be_read_says_what_was_expected(text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_axis(text)
    assert expected in str(caught.value)


def test_points_are_every_combination_in_the_order_of_the_axes() -> None:
    assert read_points(["a=1,2", "b=x,y"]) == [("a=1", "b=x"), ("a=1", "b=y"), ("a=2", "b=x"), ("a=2", "b=y")]


def test_pairs_take_the_axes_side_by_side() -> None:
    assert read_points(["a=1,2", "b=x,y"], pairs=True) == [("a=1", "b=x"), ("a=2", "b=y")]


@pytest.mark.parametrize(
    ("axes", "pairs", "message"),
    [
        (["a=1,2", "b=1"], True, "same length"),
        (["a=1", "+a=2"], False, "a is swept twice"),
        (["a=1,2,1"], False, "a has the value 1 twice"),
        (["a=1,1", "b=2,2"], True, "the points 0 and 1 are the same: a=1 b=2"),
        (["a=range(1000)", "b=range(1000)"], False, "1000000 points are more than 10000"),
    ],
)
def test_axes_that_do_not_go_together_are_refused(axes: list[str], pairs: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_points(axes, pairs=pairs)


# Points.


def sweep(
    axes: list[str], where: Profile | None = None, *overrides: str, config: str = "default", **more: Any
) -> Sweep:
    step = find_step("dpo")
    return compile_sweep(step, find_config(step, "default"), read_points(axes), overrides, where, **more)


@pytest.mark.parametrize("base", [SLURM, None])
def test_a_point_is_the_job_that_it_alone_compiles_to_but_for_its_folders(
    base: dict[str, Any] | None, tmp_path: Path
) -> None:
    where = profile(tmp_path, base) if base else None
    made = sweep(
        ["dpo.seed=1,2", "dpo.max_num_steps=300,400"], where, "policy.train_global_batch_size=64", run_id="mine"
    )
    step = find_step("dpo")
    for n, (job, point) in enumerate(zip(made.jobs, made.points, strict=True)):
        folder = "+".join(text.removeprefix("dpo.") for text in point)
        output = f"output_dir=${{oc.env:RL_OUTPUT_DIR,./output/rl}}/dpo-default/{folder}"
        overrides = ["policy.train_global_batch_size=64", *point, output]
        composed = compose_for(step, find_config(step, "default"), overrides, where)
        alone = plan_job(step, composed, where, run_id="mine", attached=False)
        assert job.output_dir.endswith(f"output/rl/dpo-default/{folder}")
        assert job.files == alone.files
        assert job.artifact == "dpo-default"  # its points are versions of one name
        same = replace(job, command=alone.command, run_dir=alone.run_dir, artifact=alone.artifact)
        assert same == alone
        assert [word for word in job.command if word not in alone.command] == [
            word.replace("mine/", f"mine/point-{n}/") for word in alone.command if word not in job.command
        ]


def test_the_run_id_of_a_dry_run_is_the_contents(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM)
    ids = [sweep([axis], where).run_id for axis in ("dpo.seed=1,2", "dpo.seed=1,2", "dpo.seed=1,3")]
    assert ids[0] == ids[1] != ids[2]
    assert sweep(["dpo.seed=1,2"], where, submits=True).run_id != ids[0]


def test_output_folders_are_named_by_what_the_point_sets_and_never_shared() -> None:
    made = sweep(["+run.env.NOTE=a/b,a:b,'$(x) %j'," + "x" * 300])
    names = [Path(job.output_dir).name for job in made.jobs]
    assert len(set(names)) == 4 and all(len(name) <= 100 for name in names)
    assert all(character.isalnum() or character in "._=+-" for name in names for character in name)


def test_keys_with_the_same_end_keep_what_tells_them_apart() -> None:
    made = sweep(["dpo.seed=1", "+run.env.seed=2"])
    assert Path(made.jobs[0].output_dir).name == "dpo.seed=1+env.seed=2"


def test_an_output_folder_that_is_swept_is_taken_as_it_is() -> None:
    made = sweep(["output_dir=out/a,out/b"])
    assert [job.output_dir for job in made.jobs] == ["out/a", "out/b"]


def test_a_shared_checkpoint_folder_is_refused() -> None:
    with pytest.raises(UserError, match="the points 0 and 1 would both write to /lustre/checkpoints"):
        sweep(["dpo.seed=1,2"], None, "checkpointing.checkpoint_dir=/lustre/checkpoints")
    with pytest.raises(UserError, match="the points 0 and 1 would both write to"):
        sweep(["output_dir=out/a,./out/a"])


def test_every_wrong_point_is_named_at_once_and_what_is_wrong_with_all_is_said_once() -> None:
    with pytest.raises(UserError) as caught:
        sweep(["dpo.seed=1,x,3", "dpo.max_num_steps=100,-5"])
    text = str(caught.value)
    assert "4 of 6 points are wrong; nothing was submitted" in text
    assert "point 2 (dpo.seed=x dpo.max_num_steps=100):" in text and "points 1,5:" in text
    with pytest.raises(UserError) as caught:
        sweep(["dpo.seed=1,2"], None, "dpo.sed=1")
    assert "unknown key dpo.sed" in caught.value.message and "points" not in str(caught.value)


# One array.


def test_an_array_holds_every_point_and_one_script(tmp_path: Path) -> None:
    made = sweep(["dpo.seed=range(1,6)"], profile(tmp_path, SLURM), max_parallel=2, run_id="mine")
    assert made.array and made.rendered
    text = made.rendered.text
    assert "#SBATCH --array=0-4%2\n" in text and "/slurm-%A_%a.out\n" in text
    assert 'local folder="$output_dir"/checkpoints' in text
    assert '--output-dir "$output_dir"' in text and '--config "$state_dir"/config.yaml' in text
    assert [file.path for file in made.rendered.files] == ["job.sbatch", "node.sh", "shell.sh"]
    with tarfile.open(fileobj=io.BytesIO(pack(made.array))) as packed:
        for n, job in enumerate(made.jobs):
            config = packed.extractfile(f"point-{n}/config.yaml")
            folder = packed.extractfile(f"point-{n}/output_dir")
            assert config and yaml.safe_load(config.read())["dpo"]["seed"] == n + 1
            assert folder and folder.read().decode() == f"{job.output_dir}\n"
    assert pack(made.array) == pack(made.array)


def test_the_script_of_an_array_passes_shellcheck(tmp_path: Path) -> None:
    where = profile(tmp_path, SLURM, max_restarts=2, hang_timeout=60, secrets=["HF_TOKEN"])
    made = sweep(["dpo.seed=1,2"], where)
    assert made.rendered
    script = tmp_path / "job.sbatch"
    script.write_text(made.rendered.text)
    done = subprocess.run(["shellcheck", "--exclude=SC2317,SC1091", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("axis", "key"),
    [("cluster.num_nodes=1,2", "cluster.num_nodes"), ("+run.env.A=1,2", "run.env"), ("run.time=1,2", "run.time")],
)
def test_points_that_one_script_cannot_carry_are_refused(axis: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"1 differs from 0 in {key}"):
        sweep([axis], profile(tmp_path, SLURM))


def test_lepton_has_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Lepton has no arrays"):
        sweep(["dpo.seed=1,2"], profile(tmp_path, LEPTON))


# The command.


def test_a_dry_run_prints_the_array_and_its_points(tree: Path, nemotron: Nemotron) -> None:
    profile_file(Path("profiles"), "site", SLURM)
    ask = ("steps", "run", "small", "-b", "site", "-d", "--sweep", "exit=0,3", "--max-parallel", "2")
    done = nemotron(*ask)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-1%2\n" in done.stdout
    assert done.stdout.endswith(
        "# 2 points:\n#   0: exit=0 → /lustre/jobs/out/sft/exit=0\n#   1: exit=3 → /lustre/jobs/out/sft/exit=3\n"
    )
    script = nemotron(*ask, "--output", "script").stdout
    assert done.stdout.startswith(script) and "points:" not in script
    assert nemotron(*ask, "--output", "dir=written").returncode == 0
    assert {"job.sbatch", "node.sh", "points.tar.gz"} <= {path.name for path in Path("written").iterdir()}
    assert Path("written/job.sbatch").read_text() == script
    data = json.loads(nemotron(*ask, "--output", "json").stdout)
    assert [point["overrides"] for point in data["points"]] == [["exit=0"], ["exit=3"]]
    assert data["files"]["job.sbatch"] == script


def test_a_dry_run_here_prints_the_script_of_each_point(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "small", "-d", "--sweep", "exit=0,3")
    assert done.returncode == 0, done.stderr
    assert "# Point 0: exit=0 → out/sft/exit=0\n#!/bin/bash" in done.stdout and "# Point 1: exit=3" in done.stdout


@pytest.mark.parametrize("option", [["--zip"], ["--max-parallel", "2"]])
def test_options_of_a_sweep_go_with_one(option: list[str], tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "small", "-d", *option)
    assert (done.returncode, done.stderr) == (2, f"error: {option[0]} goes with --sweep\n")
