"""Pipeline files and their compilation: what is wrong is said in one message, with its line, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron_launch.errors import UserError
from nemotron_launch.pipelines.compile import Planned, compile_pipeline
from nemotron_launch.pipelines.file import find_pipeline, load_pipeline
from nemotron_launch.resources import pipelines_dir
from tests.pipelines.small_pipeline import THREE
from tests.sites import SLURM, profile_file


def written(text: str, name: str = "p.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def compiled(path: Path, *words: str, **more: Any) -> dict[str, Planned]:
    return {one.name: one for one in compile_pipeline(load_pipeline(path), words=words, **more)}


def refusal(path: Path, *words: str, **more: Any) -> str:
    with pytest.raises(UserError) as refused:
        compiled(path, *words, **more)
    return str(refused.value)


def test_stages_in_any_order_run_in_that_of_their_inputs(three: Path) -> None:
    pipeline = load_pipeline(three)
    assert [stage.name for stage in pipeline.stages] == ["first", "second", "third"]
    assert pipeline.behind(["second"]) == {"second", "third"}
    assert pipeline.before(["second"]) == {"first", "second"}


def test_stages_that_need_nothing_of_each_other_keep_the_written_order(three: Path) -> None:
    text = "stages:\n" + "".join(f"  - {{name: {name}, step: small}}\n" for name in "cab")
    assert [stage.name for stage in load_pipeline(written(text)).stages] == list("cab")


def test_json_reads_as_yaml_does(three: Path) -> None:
    as_json = written(json.dumps(yaml.safe_load(three.read_text())), "three.json")
    one, other = (
        [(stage.name, stage.inputs, stage.overrides) for stage in load_pipeline(path).stages]
        for path in (three, as_json)
    )
    assert one == other


def test_each_stage_has_its_folder_and_takes_what_others_leave_in_theirs(three: Path) -> None:
    stages = compiled(three, "second.exit=3")
    assert [one.compiled.job.output_dir for one in stages.values()] == [f"out/three/{name}" for name in stages]
    assert stages["second"].compiled.composed.get("checkpointing.pretrained") == "out/three/first/checkpoints"
    assert stages["third"].compiled.composed.get("checkpointing.pretrained") == "out/three/second/checkpoints"
    assert stages["second"].compiled.composed.get("exit") == 3


def test_a_stage_may_choose_its_own_folder_and_the_pipeline_another_one(three: Path) -> None:
    stages = {one.name: one for one in compile_pipeline(load_pipeline(three, "x"), words=["first.output_dir=mine"])}
    assert stages["second"].compiled.composed.get("checkpointing.pretrained") == "mine/checkpoints"
    assert stages["second"].compiled.job.output_dir == "x/second"


def test_output_dir_may_be_from_the_environment(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_OUTPUT_DIR", "/there")
    text = THREE.replace("output_dir: out/three\n", "")
    assert load_pipeline(written(text)).output_dir == "/there/three"


def test_a_config_is_found_beside_the_pipelines_file(three: Path) -> None:
    Path("far").mkdir()
    Path("far/own.yaml").write_text("defaults: step://config/tiny\nexit: 4\n")
    path = written(THREE.replace("config: tiny\n    overrides", "config: ./own.yaml\n    overrides"), "far/p.yaml")
    assert compiled(path)["first"].compiled.composed.get("exit") == 4


SECOND = "overrides: [data.path=rows.jsonl]\n  - name: first"  # the second stage's overrides
# What is changed in the file, and the line and words that say so.
BAD = {
    "a circle": ("name: first\n", "name: first\n    after: [third]\n", "6: stages go in a circle: "),
    "a stage that takes from itself": (
        "step: sft/small\n",
        "step: sft/small\n    inputs: {checkpoint_megatron: first}\n",
        "17: stages go in a circle: first → first",
    ),
    "an unknown stage": (
        "checkpoint_megatron: first",
        "checkpoint_megatron: frist",
        "13: stage second: takes checkpoint_megatron from frist, which is no stage\n       did you mean first?",
    ),
    "an unknown stage in after": (
        "step: sft/small\n",
        "step: sft/small\n    after: [thrid]\n",
        "17: stage first: comes after thrid, which is no stage\n       did you mean third?",
    ),
    "two stages of one name": (
        "name: third",
        "name: first",
        "15: two stages have the name first, the first on line 4",
    ),
    "an unknown key": ("config: tiny", "cofnig: tiny", "11: stage 2: unknown key cofnig\n       did you mean config?"),
    "a missing step": ("    step: rl/pairs\n", "", "9: stage 2: step is missing"),
    "an unknown key above": ("output_dir:", "outputdir:", "2: unknown key outputdir\n       did you mean output_dir?"),
    "no stages": (THREE[THREE.index("stages:") :], "stages: []\n", "3: stages"),
    "a name that is none": ("name: third", "name: Third One", "4: stage 1: name"),
    "an unknown step": (
        "step: rl/pairs",
        "step: rl/pears",
        "10: stage second: there is no step rl/pears\n       did you mean rl/pairs?",
    ),
    "an unknown config": (
        "config: tiny\n    inputs",
        "config: tinny\n    inputs",
        "11: stage second: rl/pairs has no config tinny\n       did you mean tiny?",
    ),
    "an input that the step does not take": (
        "checkpoint_megatron: first",
        "eval_results: first",
        "13: stage second: rl/pairs takes no eval_results\n       it takes training_jsonl (data.path), checkpoint_meg",
    ),
    "an input that the earlier stage does not make": (
        "checkpoint_megatron: first",
        "data.path: first",
        "13: stage second: data.path takes a training_jsonl; what first (sft/small) makes is a checkpoint_megatron",
    ),
    "a key bound twice": (
        "checkpoint_megatron: first",
        "checkpoint_megatron: first\n      checkpointing.pretrained: first",
        "14: stage second: checkpointing.pretrained is taken from first already",
    ),
    "an override of an input": (
        SECOND,
        SECOND.replace("data.path=rows.jsonl", "checkpointing.pretrained=x"),
        "14: stage second: checkpointing.pretrained is taken from first, and checkpointing.pretrained=x sets it too",
    ),
    "an unknown key of a config": (
        SECOND,
        SECOND.replace("data.path=rows.jsonl", "exitt=1"),
        "14: stage second: unknown key exitt\n       did you mean exit?",
    ),
    "an override that cannot be read": (
        SECOND,
        SECOND.replace("data.path=rows.jsonl", "exit"),
        "14: stage second: cannot read the override",
    ),
    "two stages with one folder": (
        SECOND,
        SECOND.replace("data.path=rows.jsonl", "output_dir=out/three/first"),
        "14: stage second: has the output_dir of first: out/three/first",
    ),
    "an unknown profile": (
        "step: rl/pairs",
        "step: rl/pairs\n    profile: lokal",
        "11: stage second: there is no profile lokal",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_pipeline_that_cannot_be_is_refused_with_its_line(three: Path, what: str) -> None:
    old, new, message = BAD[what]
    assert old in THREE
    three.write_text(THREE.replace(old, new, 1))
    assert f"three.yaml:{message}" in refusal(three)
    assert not Path("out").exists()


def test_a_circle_names_its_stages_in_the_order_in_which_they_would_run(three: Path) -> None:
    three.write_text(THREE.replace("name: first\n", "name: first\n    after: [third]\n"))
    assert "circle: third → first → second → third" in refusal(three)


def test_an_override_of_the_command_line_says_so(three: Path) -> None:
    assert refusal(three, "second.exitt=1").startswith("error: command line: stage second: unknown key exitt\n")
    assert refusal(three, "secnd.exit=1") == (
        "error: command line: three has no stage secnd\n       did you mean second?"
    )
    assert "names no stage" in refusal(three, "exit=1")
    assert "is taken from first, and checkpointing.pretrained=x sets it too" in refusal(
        three, "second.checkpointing.pretrained=x"
    )


def test_a_chat_template_that_differs_along_the_chain_is_refused(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMOTRON_STEPS")
    path = written(
        "stages:\n"
        "  - {name: sft, step: sft/megatron, config: tiny, overrides: [policy.tokenizer.chat_template=null]}\n"
        "  - {name: dpo, step: dpo, config: tiny, inputs: {checkpoint_megatron: sft}}\n"
    )
    said = refusal(path)
    assert said.startswith("error: p.yaml:3: stage dpo: policy.tokenizer.chat_template: ")
    assert "what sft/megatron -c tiny makes was trained with null" in said


# Where stages run.


def test_paths_are_relative_to_where_the_jobs_are_and_absolute_between_two_such_places(
    three: Path, tmp_path: Path
) -> None:
    base = {**SLURM, "account": "me"}
    for name in ("one", "two"):
        profile_file(tmp_path / "profiles", name, base, remote_job_dir=f"/lustre/{name}")
    here = {"profiles_path": tmp_path / "profiles"}
    stages = compiled(three, profile="one", **here)
    assert stages["second"].compiled.composed.get("checkpointing.pretrained") == "out/three/first/checkpoints"
    assert stages["second"].compiled.job.output_dir == "/lustre/one/out/three/second"
    three.write_text(THREE.replace("step: rl/pairs", "step: rl/pairs\n    profile: two"))
    stages = compiled(three, profile="one", **here)
    pretrained = [one.compiled.composed.get("checkpointing.pretrained") for one in stages.values()]
    assert pretrained == [None, "/lustre/one/out/three/first/checkpoints", "/lustre/two/out/three/second/checkpoints"]


def test_what_lies_on_another_machine_cannot_be_taken(three: Path, tmp_path: Path) -> None:
    base = {**SLURM, "account": "me", "tunnel": {"type": "ssh", "host": "far", "user": "me"}}
    profile_file(tmp_path / "profiles", "far", base, remote_job_dir="/lustre")
    three.write_text(THREE.replace("step: rl/pairs", "step: rl/pairs\n    profile: far"))
    said = refusal(three, profiles_path=tmp_path / "profiles")
    assert "three.yaml:11: stage second: takes what first leaves on this machine, and runs on far: nothing" in said


# Which file.


def test_a_shipped_pipeline_is_found_by_its_name_and_others_by_their_path(three: Path) -> None:
    assert find_pipeline("three.yaml") == Path("three.yaml")
    for shipped in pipelines_dir().glob("*.yaml"):
        assert find_pipeline(shipped.stem) == shipped
    with pytest.raises(UserError, match="there is no pipeline align-tinny"):
        find_pipeline("align-tinny")
    with pytest.raises(UserError, match="there is no such pipeline file"):
        find_pipeline("nowhere/p.yaml")


@pytest.mark.parametrize("file", sorted(pipelines_dir().glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("profile", [None, "local", "slurm", "lepton"])
def test_shipped_pipelines_compile_wherever_they_may_run(file: Path, profile: str | None) -> None:
    shipped = pipelines_dir().parent / "profiles"
    planned = compile_pipeline(load_pipeline(file), profile=profile, profiles_path=shipped)
    assert all(one.compiled.rendered.text for one in planned)
    assert [key for one in planned for key in one.binds]


def test_the_schema_describes_every_key_that_a_stage_has() -> None:
    from nemotron_launch.pipelines.file import _STAGE_KEYS

    schema = json.loads((pipelines_dir() / "schema.json").read_text())
    assert tuple(schema["properties"]["stages"]["items"]["properties"]) == _STAGE_KEYS
