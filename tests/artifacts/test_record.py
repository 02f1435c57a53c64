"""artifacts.json: written whole when a run has finished, read again wherever it lies, and never wrong in silence."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from nemotron_launch.artifacts import identity, record
from nemotron_launch.catalog import find_step
from nemotron_launch.errors import UserError
from nemotron_launch.jobs.ledger import Ledger
from tests.artifacts.made import START, byte_tokenizer, checkpoint, composed, finished, ledger

__all__ = ["ledger"]


def test_a_record_says_what_was_made_and_of_what(ledger: Ledger) -> None:
    sft = finished(ledger, run_id="sft-1")
    dpo = finished(ledger, "rl/nemo_rl/dpo", f"{START}=output/rl/sft-tiny/checkpoints", run_id="dpo-1")
    made = record.read(Path(dpo.output_dir))
    assert made and (made.step, made.config_sha256) == ("rl/nemo_rl/dpo", dpo.config_sha256)
    (policy,) = made.artifacts
    assert policy.place == f"{dpo.output_dir}/checkpoints/step_3"
    assert (policy.type, policy.key) == ("checkpoint_megatron", "checkpointing.checkpoint_dir")
    assert policy.tokens and policy.tokens.tokenizer == identity.bytes_hash()
    assert policy.architecture and policy.architecture["num_layers"] == 2  # as the tiny config has it
    data, start = made.inputs
    assert data.value == "step://data/train.jsonl" and data.path.endswith("rl/nemo_rl/dpo/data/train.jsonl")
    parent = record.read(Path(sft.output_dir))
    assert parent and start.record == parent.digest and start.path == f"{sft.output_dir}/checkpoints"
    assert made.metrics == {"train/loss": 0.5}


def test_metrics_are_the_last_of_the_run_s_own(tmp_path: Path) -> None:
    lines = [{"step": 1, "train/loss": 3.0, "validation/loss": 2.5}, {"step": 2, "train/loss": 1.0, "time": 17.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "train/lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert record.last_metrics(tmp_path) == {"step": 2, "train/loss": 1.0, "validation/loss": 2.5}


def test_a_finished_run_that_is_run_again_keeps_its_record(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    before = Path(run.output_dir, record.FILE).read_bytes()
    finished(ledger, run_id="sft-2")
    assert Path(run.output_dir, record.FILE).read_bytes() == before


def test_other_content_in_the_same_place_is_another_record(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    first = record.read(Path(run.output_dir))
    finished(ledger, run_id="sft-2", loss=0.25)
    second = record.read(Path(run.output_dir))
    assert first and second and first.digest != second.digest
    assert record.is_there(first.artifacts[0]) == "replaced" and record.is_there(second.artifacts[0]) == ""


def test_a_folder_that_was_moved_takes_its_record_along(ledger: Ledger, tmp_path: Path) -> None:
    run = finished(ledger, run_id="sft-1")
    shutil.move(run.output_dir, tmp_path / "moved")
    made = record.read(tmp_path / "moved")
    assert made and made.artifacts[0].place == str(tmp_path / "moved/checkpoints/step_3")
    assert record.is_there(made.artifacts[0]) == ""


@pytest.mark.parametrize(
    "below", ["", "checkpoints", "checkpoints/step_3", "checkpoints/step_3/policy/weights/iter_0000000"]
)
def test_a_record_is_found_from_every_path_that_a_config_may_name(ledger: Ledger, below: str) -> None:
    run = finished(ledger, run_id="sft-1")
    found = record.find(Path(run.output_dir, below))
    assert found and [one.type for one in found[1]] == ["checkpoint_megatron"]
    assert record.find(Path(run.output_dir, "logs")) is None


def test_a_full_disk_is_one_message_and_leaves_no_record_of_older_content(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(ledger, run_id="sft-1")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(UserError) as raised:
        finished(ledger, run_id="sft-2", loss=0.25)
    assert raised.value.message == "cannot be written: no space left on device"
    assert "run again, records them" in str(raised.value)
    assert record.read(Path(run.output_dir)) is None
    assert not list(Path(run.output_dir).glob(".artifacts*"))


def test_a_run_whose_record_cannot_be_written_has_finished_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step, config = composed("sft/megatron", f"output_dir={tmp_path / 'file'}")
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        record.register_finished(step.folder, config.data, config_path=tmp_path / "config.yaml")
    assert "what this run made is not recorded" in caplog.text and "cannot be written" in caplog.text


def test_a_checkpoint_that_was_never_written_is_not_registered(ledger: Ledger) -> None:
    step, config = composed("sft/megatron")
    Path(str(config.get("output_dir"))).mkdir(parents=True)
    path = record.register(step.folder, config.data, config_path=Path("config.yaml"))
    made = record.read(path)
    assert made and made.artifacts == ()


def test_a_reward_model_is_the_hugging_face_folder_in_its_newest_checkpoint(ledger: Ledger) -> None:
    step, config = composed("rm/hf")
    model = Path(str(config.get("checkpointing.checkpoint_dir"))) / "step_7" / "hf"
    byte_tokenizer(model)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model.parent / "training_info.json").write_text('{"step": 7}')
    made = record.read(record.register(step.folder, config.data, config_path=Path("config.yaml")))
    assert made and made.artifacts[0].place == str(model.absolute())
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    assert record.is_there(made.artifacts[0]) == "replaced"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a record of artifacts"),
        ("[]", "is not a record of artifacts"),
        ('{"format": 1}', "is not a record of artifacts"),
        ('{"format": 99}', "was written by a newer nemotron"),
    ],
)
def test_a_file_that_is_no_record_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / record.FILE).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        record.read(tmp_path)
    assert raised.value.where == str(tmp_path / record.FILE)


def test_the_launcher_tells_the_trainer_s_byte_level_tokenizer_from_its_files(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from nemotron_launch.trainer.tokenizer import load_tokenizer

    load_tokenizer({"name": "bytes"}, None).save(tmp_path / "plain")
    assert identity.of_folder(tmp_path / "plain").tokenizer == identity.bytes_hash()
    load_tokenizer({"name": "bytes", "chat_template": None}, None).save(tmp_path / "joined")
    config = {"policy": {"tokenizer": {"name": "bytes", "chat_template": None}}}
    named = identity.of_config(config)
    assert named and named.chat_template == identity.of_folder(tmp_path / "joined").chat_template


def test_a_tokenizer_in_the_hub_s_cache_is_read_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "models--some--model"
    byte_tokenizer(home / "snapshots" / "abc", template="{{ x }}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = identity.of_config({"policy": {"model_name": "some/model", "tokenizer": {"name": None}}})
    assert found and found.tokenizer == identity.bytes_hash()
    assert found.chat_template == identity.text_hash("{{ x }}")
    unknown = identity.of_config({"policy": {"model_name": "other/model", "tokenizer": {"name": None}}})
    assert unknown and (unknown.name, unknown.tokenizer) == ("other/model", "")


def test_every_shipped_step_can_register(ledger: Ledger) -> None:
    for step_id in ("sft/megatron", "rl/nemo_rl/dpo", "rl/nemo_rl/rlvr", "data_prep/rl_prep"):
        run = finished(ledger, step_id, run_id=f"{step_id.rpartition('/')[2].replace('_', '-')}-1")
        made = record.read(Path(run.output_dir))
        assert made and [one.type for one in made.artifacts] == [port.type for port in find_step(step_id).produces]


def test_the_checkpoint_that_counts_is_the_newest(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    _, config = composed("sft/megatron")
    checkpoint(Path(run.checkpoints), config.data, step=12)
    step = find_step("sft/megatron")
    made = record.read(record.register(step.folder, config.data, config_path=Path(run.run_dir, "config.yaml")))
    assert made and made.artifacts[0].checkpoint == "step_12"


def test_the_sources_of_prepared_rows_are_their_inputs(ledger: Ledger) -> None:
    first = finished(ledger, "data_prep/rl_prep", run_id="prep-1")
    Path("mine.jsonl").write_text("{}\n")
    step, config = composed("data_prep/rl_prep", "output_dir=second")
    entries = [["file", str(Path("mine.jsonl").absolute())], ["file", f"{first.output_dir}/manifest.json"]]
    Path("second").mkdir()
    sources = [{"name": "mine", "entries": entries}, {"name": "theirs", "entries": [["hub", "some/rows"]]}]
    Path("second/manifest.json").write_text(json.dumps({"sources": sources}))
    made = record.read(record.register(step.folder, config.data, config_path=Path("config.yaml")))
    assert made
    own, prepared, hub = [used for used in made.inputs if used.type == "raw_jsonl"]
    assert (own.key, own.path, bool(own.content)) == ("blend: mine", entries[0][1], True)
    earlier = record.read(Path(first.output_dir))
    assert earlier and prepared.record == earlier.digest
    assert (hub.value, hub.path) == ("some/rows", "")
