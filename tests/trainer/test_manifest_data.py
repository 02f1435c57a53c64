"""Training rows by data.manifest_path: the same as by data paths, and one clear message for what cannot be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from runs import STEPS, Run, refuse

from nemotron_launch.artifacts.chain import check_link
from nemotron_launch.catalog import load_step
from nemotron_launch.config.checks import check
from nemotron_launch.config.compose import Composed, compose
from nemotron_launch.errors import UserError
from nemotron_launch.inputs import check_inputs
from nemotron_launch.trainer import pairs, sft
from nemotron_launch.trainer.data.manifest import check_data, read_manifest, shards_of
from nemotron_launch.trainer.data.sources import Row, data_section, read_rows
from nemotron_launch.trainer.tokenizer import load_tokenizer


def prepare(folder: Path, *, target: str = "sft", **splits: Sequence[str]) -> Path:
    """A manifest as data_prep/rl_prep writes it; each split's lines in a plain shard and a compressed one."""
    manifest: dict[str, Any] = {"format": 1, "target": target}
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        manifest[split] = []
        half = len(lines) // 2
        for name, some in ((f"{split}-0.jsonl", lines[:half]), (f"{split}-1.jsonl.zst", lines[half:])):
            data = "".join(line.rstrip("\n") + "\n" for line in some).encode()
            data = zstandard.compress(data) if name.endswith(".zst") else data
            (folder / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            manifest[split].append({"path": name, "rows": len(some), "bytes": len(data), "sha256": digest})
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest))
    return path


def lines_of(step: str, name: str) -> list[str]:
    return (STEPS[step] / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)


def rows(data: dict[str, Any], split: str) -> list[Row]:
    return list(read_rows(data_section(data, {}, split=split), step_dir=None, key=f"data.{split}"))


def composed(step: str, *overrides: str, config: str = "tiny", env: dict[str, str] | None = None) -> Composed:
    path = STEPS[step] / f"config/{config}.yaml"
    return compose(path, overrides, schema=STEPS[step] / "schema.json", env=env or {})


def refused(do: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        do(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Reading -------------------------------------------------------------------------------------------------------------


def test_shards_are_read_in_order_plain_and_compressed_each_row_with_its_place(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{i}", "response": "é" * i}) for i in range(9)]
    path = prepare(tmp_path / "prepared", train=lines, validation=lines[:2])
    read = rows({"manifest_path": str(path)}, "train")
    assert [row.data for row in read] == [json.loads(line) for line in lines]
    assert read[4].place == f"{tmp_path}/prepared/train-1.jsonl.zst:1"
    assert len(rows({"manifest_path": str(path)}, "validation")) == 2


@pytest.mark.parametrize("frames", [1, 3])
def test_compressed_rows_may_span_frames_and_lack_a_last_newline(tmp_path: Path, frames: int) -> None:
    data = b"\n".join(json.dumps({"prompt": "x" * 3000, "n": i}).encode() for i in range(500))
    cut = [data[i * len(data) // frames : (i + 1) * len(data) // frames] for i in range(frames)]
    file = tmp_path / "rows.jsonl.zst"
    file.write_bytes(b"".join(zstandard.compress(piece) for piece in cut))
    read = list(read_rows({"data_path": str(file)}, step_dir=None, key="data.train"))
    assert [row.data and row.data["n"] for row in read] == list(range(500))
    file.write_bytes(file.read_bytes()[:-9])
    said = refused(lambda: list(read_rows({"data_path": str(file)}, step_dir=None, key="data.train")))
    assert "data.train.data_path" in said and "is no whole Zstandard file" in said


@pytest.mark.parametrize("name", ["validation", "val"])
@pytest.mark.parametrize("listed", [False, True])
def test_the_shape_of_nemo_rl_is_read_too(tmp_path: Path, name: str, listed: bool) -> None:
    for file in ("a", "b"):
        (tmp_path / f"{file}.jsonl").write_text(f'{{"prompt": "{file}"}}\n')
    path = tmp_path / "manifest.json"
    entries = {"train": "a.jsonl", name: "b.jsonl"}
    path.write_text(json.dumps({key: [file] for key, file in entries.items()} if listed else entries))
    for split, prompt in (("train", "a"), ("validation", "b")):
        assert [row.data for row in rows({"manifest_path": str(path)}, split)] == [{"prompt": prompt}]


def test_train_stands_in_for_validation_only_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    path = tmp_path / "manifest.json"
    for manifest in ({"train": "a.jsonl"}, {"train": "a.jsonl", "val": "a.jsonl"}):
        path.write_text(json.dumps(manifest))
        allowed = {"manifest_path": str(path), "allow_train_as_validation": True}
        assert rows(allowed, "validation") == rows(allowed, "train")
        said = refused(rows, {"manifest_path": str(path)}, "validation")
        assert "data.manifest_path" in said and "data.validation=null" in said


# What cannot be used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("{", "is not JSON"),
        ("[]", "it has no train"),
        ('{"rows": 3}', "it has no train"),
        ('{"train": [{"rows": 3}]}', "names no file"),
        ('{"train": [3]}', "names no file"),
        ('{"train": []}', "has no train rows"),
    ],
)
def test_what_is_no_manifest_is_one_message(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "manifest.json"
    if text is not None:
        path.write_text(text)
    said = refused(lambda: shards_of(read_manifest(path), "train"))
    assert said.startswith("error: data.manifest_path: ")
    assert says in said and str(path) in said


def test_a_changed_or_lost_shard_is_named(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{i}"}) for i in range(8)]
    data = {"manifest_path": str(prepare(tmp_path, train=lines, validation=lines[:2]))}
    check_data(data, "sft/megatron", None)
    shard = tmp_path / "train-0.jsonl"
    right = shard.read_bytes()
    shard.write_bytes(right.replace(b"p0", b"p9"))
    assert f"{shard} has other rows than when {tmp_path}/manifest.json was written" in refused(
        check_data, data, "sft/megatron", None
    )
    shard.write_bytes(right + b"\n")
    said = refused(check_data, data, "sft/megatron", None)
    assert f"{shard} has {len(right) + 1} bytes, and {len(right)} when" in said
    shard.unlink()
    assert f"{shard}: no such file" in refused(check_data, data, "sft/megatron", None)


@pytest.mark.parametrize(
    ("target", "fits"),
    [
        ("sft", {"sft/megatron"}),
        ("dpo", {"rl/nemo_rl/dpo", "rm/hf"}),
        ("rlvr", {"rl/nemo_rl/rlvr", "rl/nemo_rl/rlhf"}),
        ("gym", {"rl/nemo_rl/rlvr", "rl/nemo_rl/rlhf"}),
        ("rlhf", {"rl/nemo_rl/rlhf"}),
    ],
)
def test_rows_of_another_target_are_refused_by_the_launcher_and_by_the_job(
    tmp_path: Path, target: str, fits: set[str]
) -> None:
    path = prepare(tmp_path, target=target, train=['{"prompt": "a"}'] * 2, validation=['{"prompt": "b"}'] * 2)
    for folder in (*STEPS.values(), STEPS["grpo"].parent / "rlhf"):
        step = load_step(folder)
        config = compose(
            folder / "config/default.yaml", [f"data.manifest_path={path}"], schema=folder / "schema.json", env={}
        )
        # What is consumed beside the rows is there, or is made first.
        made = [port.key for port in step.consumes if port.key != "data.manifest_path"]
        if step.id in fits:
            check_inputs(step, config, made=made)
            check_data(config.data["data"], step.id, None)
            continue
        for said in (
            refused(check_inputs, step, config, made=made),
            refused(check_data, config.data["data"], step.id, None),
        ):
            assert f"holds rows for {target}; {step.id} trains on" in said
            assert "nemotron steps run data_prep/rl_prep target=" in said


def test_a_stage_that_prepares_rows_for_another_step_is_refused_before_anything_runs() -> None:
    folder = STEPS["sft"].parents[1] / "data_prep/rl_prep"

    def link(target: str) -> None:
        made = compose(folder / "config/tiny.yaml", [f"target={target}"], schema=folder / "schema.json", env={})
        used = composed("sft", "data.manifest_path=manifest.json")
        check_link(load_step(folder), made, "prepared_jsonl", load_step(STEPS["sft"]), used, "data.manifest_path")

    link("sft")
    said = refused(link, "dpo")
    assert "what data_prep/rl_prep -c tiny makes are rows for dpo; sft/megatron trains on sft" in said


def test_a_manifest_that_is_not_there_names_the_step_that_makes_it(tmp_path: Path) -> None:
    config = composed("sft", f"data.manifest_path={tmp_path}/manifest.json")
    said = refused(check_inputs, load_step(STEPS["sft"]), config)
    assert f"make it:  nemotron steps run data_prep/rl_prep manifest_path={tmp_path}/manifest.json" in said


# In a config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_manifest_stands_in_place_of_what_the_config_below_says_of_its_source(step: str) -> None:
    for name in ("tiny", "default"):
        config = composed(step, "data.manifest_path=manifest.json", config=name)
        data = config.data["data"]
        for section in ("train", "validation"):
            filled = data_section(data, data[section], split=section)
            assert filled["manifest"]["rows"] == section
            told = ("data_path", "dataset_name", "subset", "input_key", "chat_key")
            assert not any(filled.get(key) for key in told)
        assert [problem.key for problem in check(load_step(STEPS[step]).id, config.data)] == []
    # What scores the rows stays.
    if step == "grpo":
        assert data["default"]["env_name"] == "math"


def test_a_manifest_and_a_data_path_in_one_place_are_refused_with_both_places(tmp_path: Path) -> None:
    said = refused(composed, "sft", "data.manifest_path=m.json", "data.validation.data_path=v.jsonl")
    assert said.startswith("error: command line: data.manifest_path and data.validation.data_path (command line) both")
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: {STEPS['sft']}/config/tiny\ndata:\n  manifest_path: m.json\n")
    both = compose(file, [], schema=STEPS["sft"] / "schema.json", env={})
    assert both.get("data.train.data_path") is None
    file.write_text(file.read_text() + "  train:\n    data_path: mine.jsonl\n")
    said = refused(compose, file, [], schema=STEPS["sft"] / "schema.json", env={})
    assert f"{file}:3: data.manifest_path and data.train.data_path ({file}:5) both name the rows" in said
    assert "data.train.data_path=null" in said


def test_a_data_path_over_a_manifest_asks_which_of_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: {STEPS['sft']}/config/tiny\ndata:\n  manifest_path: m.json\n")
    schema = STEPS["sft"] / "schema.json"
    said = refused(compose, file, ["data.train.data_path=x.jsonl"], schema=schema, env={})
    assert "data.manifest_path=null" in said
    done = compose(file, ["data.train.data_path=x.jsonl", "data.manifest_path=null"], schema=schema, env={})
    assert done.get("data.train.data_path") == "x.jsonl"


def test_the_environment_names_the_manifest_of_the_default_configs() -> None:
    for step in STEPS:
        config = composed(step, config="default", env={"RL_PREP_MANIFEST": "/data/manifest.json"})
        assert config.get("data.manifest_path") == "/data/manifest.json"
        assert config.get("data.train.data_path") is None
        assert config.get("data.train.dataset_name") is None
        assert composed(step, config="default").get("data.manifest_path") is None


def test_validation_that_nobody_wrote_is_the_manifests_and_null_turns_it_off(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("policy:\n  model_name: x\ndata:\n  manifest_path: m.json\n")
    schema = STEPS["sft"] / "schema.json"
    assert compose(file, [], schema=schema, env={}).data["data"]["validation"] == {}
    assert compose(file, ["data.validation=null"], schema=schema, env={}).data["data"]["validation"] is None


@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_a_validation_section_that_says_nothing_validates_on_the_manifests_rows(tmp_path: Path, step: str) -> None:
    path = prepare(
        tmp_path, target=step, train=lines_of(step, "train")[:8], validation=lines_of(step, "validation")[:6]
    )
    config = composed(step, f"data.manifest_path={path}").data
    config["data"]["validation"] = {}
    tokenizer = load_tokenizer({"name": "bytes"}, None)
    session: Any = SimpleNamespace(config=config, tokenizer=tokenizer, step_dir=STEPS[step], main_rank=True)
    training, validation = (sft if step == "sft" else pairs).load_data(session)
    assert (len(training), {name: len(found) for name, found in validation.items()}) == (8, {"default": 6})


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_of_a_manifest_train_as_those_of_data_paths_do_and_a_run_may_change_between_them(tmp_path: Path) -> None:
    # A schedule that does not look at how long the run is.
    options = {"policy.megatron_cfg.scheduler.lr_decay_style": "constant"}
    whole = Run("sft", tmp_path / "paths", options)
    finished = whole.go()
    assert finished.code == 0, finished.said
    manifest = prepare(
        tmp_path / "prepared", train=lines_of("sft", "train")[:48], validation=lines_of("sft", "validation")[:12]
    )
    run = Run("sft", tmp_path / "both", options)
    assert run.with_(sft__max_num_steps=4).go().code == 0
    run = run.with_(data__manifest_path=str(manifest), data__train__data_path=None, data__validation__data_path=None)
    finished = run.go()
    assert finished.code == 0, finished.said
    lines, expected = run.numbers(), whole.numbers()
    assert sorted(lines) == list(range(1, 8))
    assert [lines[step]["train/loss"] for step in lines] == [expected[step]["train/loss"] for step in lines]
    assert "validation-default/loss" in lines[7]
    assert all(lines[step] == expected[step] for step in (5, 6, 7))


@pytest.mark.slow
def test_jobs_refuse_a_manifest_that_they_cannot_train_on(tmp_path: Path) -> None:
    preferences = prepare(
        tmp_path / "dpo", target="dpo", train=lines_of("dpo", "train")[:16], validation=lines_of("dpo", "validation")
    )
    torn = prepare(tmp_path / "torn", train=lines_of("sft", "train")[:16], validation=lines_of("sft", "validation"))
    (torn.parent / "train-1.jsonl.zst").write_bytes(b"")

    def run(step: str, path: Path, name: str) -> Run:
        made = Run(step, tmp_path / name).with_(data__manifest_path=str(path))
        return made.with_(data__train__data_path=None, data__validation__data_path=None)

    ended = refuse({"grpo": run("grpo", preferences, "a"), "sft": run("sft", torn, "b")})
    assert {name: finished.code for name, finished in ended.items()} == {"grpo": 2, "sft": 2}
    assert "holds rows for dpo; rl/nemo_rl/rlvr trains on rlvr or gym" in ended["grpo"].said
    assert "train-1.jsonl.zst has 0 bytes" in ended["sft"].said
