"""What a step consumes: there, made first, or named with the command that makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Nemotron
from tests.step_trees import add_step

MISSING = "checkpoint_megatron out/sft-tiny/checkpoints"


def test_a_missing_warm_start_is_made_first_and_reused(tree: Path, nemotron: Nemotron) -> None:
    first = nemotron("steps", "run", "pairs", "-c", "tiny")
    assert first.returncode == 0, first.stderr
    assert first.stderr.splitlines() == [
        f"nemotron: {MISSING} is not there yet: running sft/small -c tiny first (run.make_missing)",
        "nemotron: now rl/pairs -c tiny",
    ]
    assert Path("out/sft-tiny/checkpoints/step_1/training_info.json").exists()
    assert json.loads(Path("out/pairs-tiny/seen.json").read_text())["config"]["checkpointing"]["pretrained"] == (
        "out/sft-tiny/checkpoints"
    )
    made = Path("out/sft-tiny/seen.json").stat().st_mtime_ns
    second = nemotron("steps", "run", "pairs", "-c", "tiny")
    assert (second.returncode, second.stderr) == (0, "")
    assert Path("out/sft-tiny/seen.json").stat().st_mtime_ns == made


def test_an_unfinished_warm_start_is_finished_first(tree: Path, nemotron: Nemotron) -> None:
    nemotron("steps", "run", "pairs", "-c", "tiny")
    Path("out/sft-tiny/exit_code").unlink()  # as a kill leaves it
    done = nemotron("steps", "run", "pairs", "-c", "tiny")
    assert f"{MISSING} is not finished: running sft/small -c tiny first" in done.stderr
    assert nemotron("steps", "run", "pairs", "-c", "tiny").stderr == ""


def test_a_copied_checkpoint_without_its_run_counts_as_finished(tree: Path, nemotron: Nemotron) -> None:
    nemotron("steps", "run", "pairs", "-c", "tiny")
    for name in ("exit_code", "metrics.jsonl", "seen.json"):
        Path(f"out/sft-tiny/{name}").unlink()
    assert nemotron("steps", "run", "pairs", "-c", "tiny").stderr == ""


def test_a_step_n_of_the_made_checkpoint_may_be_named(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "pairs", "-c", "tiny", "checkpointing.pretrained=out/sft-tiny/checkpoints/step_1")
    assert done.returncode == 0, done.stderr
    assert "running sft/small -c tiny first" in done.stderr


def test_when_making_fails_the_step_does_not_start(tree: Path, nemotron: Nemotron) -> None:
    with (tree / "sft/small/config/tiny.yaml").open("a") as config:
        config.write("exit: 3\n")
    done = nemotron("steps", "run", "pairs", "-c", "tiny")
    assert done.returncode == 3
    assert done.stderr.endswith("sft/small -c tiny ended with exit code 3: rl/pairs was not started\n")
    assert not Path("out/pairs-tiny").exists()


def test_a_maker_that_would_leave_it_elsewhere_is_refused(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "pairs", "-c", "tiny", "checkpointing.pretrained=elsewhere")
    assert done.returncode == 2
    assert done.stderr == (
        "error: command line: checkpointing.pretrained: elsewhere is not there, and sft/small -c tiny leaves its "
        "checkpoint_megatron in out/sft-tiny/checkpoints\n"
        "       set checkpointing.pretrained=out/sft-tiny/checkpoints, or make it yourself\n"
    )
    assert not Path("out").exists()


def test_a_missing_checkpoint_that_nobody_makes_names_the_command(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "pairs", "checkpointing.pretrained=nope")
    assert done.returncode == 2
    assert done.stderr.startswith("error: command line: checkpointing.pretrained: there is no checkpoint nope\n")
    assert "make it:  nemotron steps run sft/small checkpointing.checkpoint_dir=nope" in done.stderr


def test_a_folder_that_is_no_checkpoint_is_refused(tree: Path, nemotron: Nemotron) -> None:
    Path("folder").mkdir()
    done = nemotron("steps", "run", "pairs", "checkpointing.pretrained=folder")
    assert done.returncode == 2
    assert "checkpointing.pretrained: folder is not a checkpoint" in done.stderr


def test_a_model_of_the_other_kind_is_refused_with_the_step_that_converts_it(
    nemotron: Nemotron, tmp_path: Path
) -> None:
    """Also where a maker is named (tiny): what is there would not be made again. In the shipped steps."""
    model, step = tmp_path / "model", tmp_path / "checkpoints/step_3"
    (step / "policy/weights").mkdir(parents=True)
    (step / "training_info.json").write_text("{}")
    model.mkdir()
    (model / "config.json").write_text("{}")
    for config in ("tiny", "default"):
        done = nemotron("steps", "run", "dpo", "-c", config, f"checkpointing.pretrained_checkpoint.path={model}")
        assert done.returncode == 2
        assert done.stderr == (
            f"error: command line: checkpointing.pretrained_checkpoint.path: {model} is a Hugging Face model, "
            "not a checkpoint_megatron\n"
            f"       convert it first:  nemotron steps run convert/hf_to_megatron hf_path={model}\n"
        )
    for checkpoint in (step, step.parent):
        done = nemotron("steps", "run", "hf_to_megatron", f"hf_path={checkpoint}")
        assert done.returncode == 2
        assert done.stderr == (
            f"error: command line: hf_path: {checkpoint} is a Megatron checkpoint, not a checkpoint_hf\n"
            f"       convert it first:  nemotron steps run convert/megatron_to_hf megatron_path={checkpoint}\n"
        )


def test_makers_in_a_circle_are_refused(tree: Path, nemotron: Nemotron) -> None:
    back = "run: {make_missing: {checkpoint_megatron: {step: rl/pairs, config: tiny}}}\n"
    with (tree / "sft/small/config/tiny.yaml").open("a") as config:
        config.write(back + "checkpointing: {pretrained: out/pairs-tiny/checkpoints}\n")
    done = nemotron("steps", "run", "pairs", "-c", "tiny")
    assert done.returncode == 2
    assert "run.make_missing goes in a circle: " in done.stderr


def test_what_is_missing_is_said_before_anything_is_made(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "pairs", "-c", "tiny", "data.path=nope.jsonl")
    assert done.returncode == 2
    assert done.stderr == "error: command line: data.path: there is no file nope.jsonl\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "value", ["rows.jsonl", "row*.jsonl", "[rows.jsonl,rows.jsonl]", "owner/name", "step://own.jsonl"]
)
def test_data_may_be_a_file_a_pattern_a_list_a_hub_id_or_the_steps_own(
    tree: Path, nemotron: Nemotron, value: str
) -> None:
    Path("rows.jsonl").write_text("{}\n")
    (tree / "sft/small/own.jsonl").write_text("{}\n")
    done = nemotron("steps", "run", "small", f"data.path={value}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["no.jsonl", "no*.jsonl", "[no.jsonl]", "owner/name.jsonl", "step://no.jsonl", "./x"])
def test_data_that_is_not_there_is_refused(tree: Path, nemotron: Nemotron, value: str) -> None:
    done = nemotron("steps", "run", "small", f"data.path={value}")
    assert done.returncode == 2
    assert "data.path: " in done.stderr


def test_a_hub_id_is_no_missing_folder(tree: Path, nemotron: Nemotron) -> None:
    port = {"type": "checkpoint_hf", "required": True, "key": "checkpointing.pretrained", "description": "Model."}
    add_step(tree, "rl/hub", consumes=[port])
    assert nemotron("steps", "run", "hub", "checkpointing.pretrained=owner/name").returncode == 0
    done = nemotron("steps", "run", "hub", "checkpointing.pretrained=./nope")
    assert done.returncode == 2
    assert "there is no checkpoint_hf ./nope" in done.stderr
