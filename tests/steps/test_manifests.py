"""The manifests: valid, true to the schemas and configs beside them, and told in full by SKILL.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from nemotron_launch.config.compose import compose
from nemotron_launch.config.schema import known_paths, knows, load_schema
from nemotron_launch.resources import steps_dir

STEPS = steps_dir()
FOLDERS = sorted(path.parent for path in STEPS.glob("**/step.yaml"))
ARTIFACTS: dict[str, Any] = yaml.safe_load((STEPS / "artifacts.yaml").read_text())["artifacts"]
LANGUAGE_SERVER = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")


def name(folder: Path) -> str:
    return str(folder.relative_to(STEPS))


def manifest(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((folder / "step.yaml").read_text())
    return data


def parts(folder: Path) -> dict[str, dict[str, Any]]:
    return {".".join(key): part for key, part in known_paths(load_schema(folder / "schema.json"))}


@pytest.mark.parametrize("path", [folder / "step.yaml" for folder in FOLDERS] + [STEPS / "artifacts.yaml"], ids=name)
def test_file_is_what_its_schema_says(path: Path) -> None:
    text = path.read_text()
    line = LANGUAGE_SERVER.match(text)
    assert line, "the first line names the schema"
    schema = json.loads((path.parent / line.group(1)).read_text())
    Draft202012Validator(schema).validate(yaml.safe_load(text))


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_id_is_the_folder(folder: Path) -> None:
    assert manifest(folder)["id"] == folder.relative_to(STEPS).as_posix()
    assert manifest(folder)["category"] == folder.relative_to(STEPS).parts[0]


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_script_of_the_entry_is_there(folder: Path) -> None:
    assert (folder / manifest(folder)["entry"]["script"]).is_file()


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_resources_are_those_of_the_default_config(folder: Path) -> None:
    cluster = compose(folder / "config/default.yaml", schema=folder / "schema.json", env={}).data["cluster"]
    expected = {"nodes": cluster["num_nodes"], "gpus_per_node": cluster["gpus_per_node"]}
    assert manifest(folder)["resources"] == expected


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_artifact_binds_to_a_key_of_the_config_that_holds_a_path(folder: Path) -> None:
    known = parts(folder)
    for port in manifest(folder)["consumes"] + manifest(folder)["produces"]:
        assert port["type"] in ARTIFACTS
        assert "string" in known[port["key"]]["type"]


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_parameter_has_the_default_and_the_choices_that_it_really_has(folder: Path) -> None:
    known = parts(folder)
    data = compose(folder / "config/default.yaml", schema=folder / "schema.json", env={}).data
    for parameter in manifest(folder)["parameters"]:
        value: Any = data
        for segment in parameter["name"].split("."):
            value = (value or {}).get(segment)
        if value is None and parameter["name"].startswith(("data.train.", "data.validation.")):
            value = data["data"]["default"].get(parameter["name"].rpartition(".")[2])
        assert (parameter["name"], parameter.get("default")) == (parameter["name"], value)
        choices = known[parameter["name"]].get("enum")
        assert (parameter["name"], set(parameter.get("choices") or ())) == (parameter["name"], set(choices or ()))


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_text_names_only_keys_that_exist(folder: Path) -> None:
    sections = "dpo|sft|grpo|loss_fn|env|policy|data|checkpointing|logger|cluster|run"
    schema = load_schema(folder / "schema.json")
    for text in ((folder / "step.yaml").read_text(), (folder / "SKILL.md").read_text()):
        for key in re.findall(rf"(?<![\w./-])((?:{sections})(?:\.[a-z_0-9]+)+)(?![\w*/]|\.\w)", text):
            if not (folder / key).is_file():  # run.py
                assert knows(schema, tuple(key.split("."))) != "unknown", key


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_skill_tells_every_parameter_strategy_error_artifact_and_config(folder: Path) -> None:
    step, skill = manifest(folder), (folder / "SKILL.md").read_text()
    assert skill.startswith(f"# {step['id']}: ")
    rows = re.findall(r"^\| `([^`]+)` \|", skill, re.M)
    named = [parameter["name"] for parameter in step["parameters"]] + [error["name"] for error in step["errors"]]
    assert rows == named, "the tables have the manifest's rows, in its order"
    told = re.findall(r"^- \*\*(.+?)\*\* (.+)$", skill, re.M)
    assert told == [(strategy["when"], strategy["then"]) for strategy in step["strategies"]]
    for port in step["consumes"] + step["produces"]:
        assert f"`{port['type']}` | `{port['key']}`" in skill
    for config in (folder / "config").glob("*.yaml"):
        assert f"- `{config.stem}`: " in skill


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_commands_of_the_skill_compose(folder: Path) -> None:
    step = manifest(folder)["id"]
    blocks = re.findall(r"^```\n(.*?)^```", (folder / "SKILL.md").read_text(), re.M | re.S)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert commands
    for command in commands:
        words = command.partition("#")[0].split()
        assert words[:4] == ["nemotron", "steps", "run", step]
        config = words[words.index("-c") + 1] if "-c" in words else "default"
        overrides = [word for word in words if "=" in word]
        compose(folder / f"config/{config}.yaml", overrides, schema=folder / "schema.json", env={})


def test_artifact_types_end_in_one_that_is_no_subtype() -> None:
    for kind in ARTIFACTS:
        seen = []
        while kind:
            assert kind in ARTIFACTS and kind not in seen
            seen.append(kind)
            kind = ARTIFACTS[kind].get("is_a")


def test_artifacts_convert_to_types_that_exist() -> None:
    assert all(target in ARTIFACTS for one in ARTIFACTS.values() for target in one.get("convert_to", {}))
