"""Manifests, artifact types, and finding a step by what was typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from nemotron_launch.catalog import find_config, find_step, load_artifacts, load_steps, select
from nemotron_launch.errors import UserError
from tests.step_trees import REPOSITORY, add_step, manifest


def ids(steps: Any) -> list[str]:
    return [step.id for step in steps]


def test_every_shipped_manifest_keeps_to_the_schema_and_loads() -> None:
    schema = json.loads((REPOSITORY / "steps" / "schemas" / "manifest.json").read_text())
    steps = load_steps(REPOSITORY / "steps")
    assert {"sft/megatron", "rl/nemo_rl/dpo"} <= set(ids(steps))
    for step in steps:
        Draft202012Validator(schema).validate(yaml.safe_load((step.folder / "step.yaml").read_text()))
        assert step.folder == REPOSITORY / "steps" / step.id
        assert (step.folder / step.entry.script).is_file()
        assert "default" in step.configs()


def test_the_manifest_of_these_tests_keeps_to_the_schema() -> None:
    schema = json.loads((REPOSITORY / "steps" / "schemas" / "manifest.json").read_text())
    Draft202012Validator(schema).validate(manifest("a/b"))


@pytest.mark.parametrize("text", ["rl/pairs", "pairs", "/rl/pairs/"])
def test_a_step_is_found_by_its_id_or_a_unique_end(tree: Path, text: str) -> None:
    assert find_step(text).id == "rl/pairs"


def test_an_end_that_fits_several_steps_names_them(tree: Path) -> None:
    add_step(tree, "rl/small")
    with pytest.raises(UserError, match="small could be several steps") as caught:
        find_step("small")
    assert caught.value.hint == "one of: rl/small, sft/small"


@pytest.mark.parametrize(("text", "near"), [("pair", "rl/pairs"), ("sft/smal", "sft/small"), ("rl/piars", "rl/pairs")])
def test_an_unknown_step_gets_a_suggestion(tree: Path, text: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        find_step(text)
    assert caught.value.message == f"there is no step {text}"
    assert caught.value.hint == f"did you mean {near}?"


def test_a_step_like_no_other_gets_the_list(tree: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_step("xyzzy")
    assert caught.value.hint == "steps: rl/pairs, sft/small"


def test_filters_find_what_can_be_given_to_a_step_and_what_can_serve(tree: Path) -> None:
    jsonl = {"type": "synthetic_jsonl", "required": True, "key": "output_dir", "description": "Rows."}
    add_step(tree, "sdg/writer", consumes=[], produces=[jsonl], tags=["sdg"])
    steps, types = load_steps(), load_artifacts()
    # synthetic_jsonl is_a training_jsonl: a step that asks for the general takes the special, never the other way.
    assert ids(select(steps, types, consumes="synthetic_jsonl")) == ["rl/pairs", "sft/small"]
    assert ids(select(steps, types, consumes="training_jsonl")) == ["rl/pairs", "sft/small"]
    assert ids(select(steps, types, produces="training_jsonl")) == ["sdg/writer"]
    assert ids(select(steps, types, produces="synthetic_jsonl")) == ["sdg/writer"]
    assert ids(select(steps, types, produces="raw_jsonl")) == []
    assert ids(select(steps, types, category="rl")) == ["rl/pairs"]
    assert ids(select(steps, types, tag="small", produces="checkpoint_megatron")) == ["rl/pairs", "sft/small"]


def test_a_filter_that_nothing_can_match_is_an_error(tree: Path) -> None:
    steps, types = load_steps(), load_artifacts()
    with pytest.raises(UserError, match="no artifact type training_json") as caught:
        select(steps, types, consumes="training_json")
    assert "training_jsonl" in (caught.value.hint or "")
    with pytest.raises(UserError, match="no step has the category rll"):
        select(steps, types, category="rll")
    with pytest.raises(UserError, match="no step has the tag smal"):
        select(steps, types, tag="smal")


def test_configs_are_found_by_name_and_by_path(tree: Path) -> None:
    step = find_step("pairs")
    assert find_config(step, None) == step.folder / "config" / "default.yaml"
    assert find_config(step, "tiny") == step.folder / "config" / "tiny.yaml"
    Path("mine.yaml").write_text("")
    Path("bare").write_text("")
    Path("tiny").write_text("")
    Path("sub").mkdir()
    Path("sub/x.yml").write_text("")
    for text in ("mine.yaml", "./mine.yaml", "sub/x.yml", "bare"):
        assert find_config(step, text) == Path.cwd() / text
    assert find_config(step, "tiny").parent == step.folder / "config", "a step's config goes before a file"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("tny", "rl/pairs has no config tny", "did you mean tiny?"),
        ("zzz", "rl/pairs has no config zzz", "configs: default, tiny"),
        ("nope.yaml", "nope.yaml: there is no such config file", "did you mean nop.yaml?"),
        ("no/such.yaml", "no/such.yaml: there is no such config file", "there is no folder no"),
        ("./", "./: is a folder; a config is a YAML file", ""),
    ],
)
def test_an_unknown_config_is_one_message(tree: Path, text: str, message: str, hint: str) -> None:
    Path("nop.yaml").write_text("")
    with pytest.raises(UserError) as caught:
        find_config(find_step("pairs"), text)
    assert str(caught.value) == f"error: {message}" + (f"\n       {hint}" if hint else "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "id must be text, got null"),
        ({"entry": {"script": "x.py", "launch": "torchrun"}}, None),
        ({"entry": {"scrpt": "x.py", "launch": "python"}}, "unknown key entry.scrpt"),
        ({"consumes": "x"}, "consumes must be a list, got the text 'x'"),
        ({"consumes": [{"type": "x"}]}, "consumes.0.required is missing"),
        ({"resources": 8}, "resources must be a mapping, got the number 8"),
    ],
)
def test_a_broken_manifest_is_said_with_file_and_line(tree: Path, change: dict[str, Any], message: str | None) -> None:
    folder = tree / "sft" / "small"
    (folder / "step.yaml").write_text(yaml.safe_dump(manifest("sft/small", **change), sort_keys=False))
    if message is None:
        load_steps()  # that a launch exists is for `steps check` and tests to say; listing stays fast
        return
    with pytest.raises(UserError) as caught:
        load_steps()
    assert f"{folder / 'step.yaml'}:" in str(caught.value)
    assert message in str(caught.value)


def test_two_steps_with_one_id_are_refused(tree: Path) -> None:
    folder = add_step(tree, "rl/other")
    (folder / "step.yaml").write_text(yaml.safe_dump(manifest("rl/pairs")))
    with pytest.raises(UserError, match="the id rl/pairs belongs to"):
        load_steps()


def test_a_circle_of_types_is_refused(tree: Path) -> None:
    (tree / "artifacts.yaml").write_text("artifacts:\n  a: {description: x, is_a: b}\n  b: {description: y, is_a: a}\n")
    with pytest.raises(UserError, match="is_a goes in a circle: a → b → a"):
        load_artifacts()


def test_a_missing_folder_of_steps_says_what_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON_STEPS", str(tmp_path / "nope"))
    with pytest.raises(UserError, match="no such folder of steps") as caught:
        load_steps()
    assert "NEMOTRON_STEPS" in (caught.value.hint or "")
