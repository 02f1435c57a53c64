"""Artifacts named in a config: paths of the right run and type, or one message with where and what to do."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import yaml

from nemotron_launch.artifacts import registry
from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.cli.job_view import facts_of
from nemotron_launch.compiler import compile_job
from nemotron_launch.config.compose import Composed
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import open_host
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.submission import new_run
from nemotron_launch.plan import compose_for, plan_job
from nemotron_launch.profiles import load_profile
from tests.artifacts.made import START, composed, finished, ledger
from tests.jobs.rows import row

__all__ = ["ledger"]

DPO = "rl/nemo_rl/dpo"
SLURM = """\
executor: slurm
account: me
partition: batch
remote_job_dir: /lustre/me
runtime: none
tunnel: {type: ssh, host: login.example.org, user: me}
"""


def refused(*overrides: str, step: str = DPO) -> UserError:
    with pytest.raises(UserError) as raised:
        composed(step, *overrides)
    return raised.value


@pytest.mark.parametrize("name", ["run:sft-1", "run:sft", "run:last", "run:last:sft/megatron", "run:last:megatron",
                                  "artifact:sft-tiny@1", "artifact:sft-tiny@latest", "artifact:sft-tiny"])  # fmt: skip
def test_a_name_becomes_the_path_of_what_was_made(ledger: Ledger, name: str) -> None:
    run = finished(ledger, run_id="sft-1")
    _, config = composed(DPO, f"{START}={name}")
    assert config.get(START) == f"{run.output_dir}/checkpoints/step_3"
    (use,) = config.uses
    assert (use.key, use.text, use.name, use.version, use.run_id) == (START, name, "sft-tiny", 1, "sft-1")


def test_a_dry_run_shows_the_path_and_keeps_its_place_in_messages(ledger: Ledger, tmp_path: Path) -> None:
    run = finished(ledger, run_id="sft-1")
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "defaults: step://config/tiny\noutput_dir: out\ncheckpointing:\n  pretrained_checkpoint:\n    path: run:last\n"
    )
    config = compose_for(find_step(DPO), mine)
    assert config.get(START) == f"{run.output_dir}/checkpoints/step_3"
    assert config.sources.where(START) == f"{mine}:5"
    mine.write_text(mine.read_text().replace("run:last", "run:nobody"))
    with pytest.raises(UserError) as raised:
        compose_for(find_step(DPO), mine)
    assert raised.value.where == f"{mine}:5"


def test_a_name_may_come_from_the_environment_or_a_profile(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(ledger, run_id="sft-1")
    monkeypatch.setenv("RL_SFT_CHECKPOINT", "artifact:sft-tiny@1")
    _, config = composed(DPO, f"{START}=${{oc.env:RL_SFT_CHECKPOINT}}")
    assert str(config.get(START)).endswith("/step_3")
    where = {"checkpointing": {"pretrained_checkpoint": {"path": "run:sft-1"}}}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump({"executor": "local", "config": where}))
    step = find_step(DPO)
    profile = load_profile(str(tmp_path / "here.yaml"))
    config = compose_for(step, find_config(step, "tiny"), (), profile)
    assert str(config.get(START)).endswith("/step_3") and config.uses[0].text == "run:sft-1"


def test_what_is_meant_of_a_run_follows_from_the_port(ledger: Ledger) -> None:
    finished(ledger, "data_prep/rl_prep", run_id="prep-1")
    _, config = composed(DPO, "data.manifest_path=run:prep-1")
    assert str(config.get("data.manifest_path")).endswith("/manifest.json")
    error = refused("data.train.data_path=run:prep-1")
    assert error.message.startswith("data.train.data_path takes a training_jsonl; ")
    assert error.message.endswith("is a prepared_jsonl") and error.hint == "data.manifest_path=run:prep-1 takes it"


def test_the_newest_of_a_step_is_one_that_has_finished(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1", ago=500)
    ledger.add([row("sft-2", step="sft/megatron", state="failed"), row("dpo-1", step=DPO, state="finished", ended=1.0)])
    _, config = composed(DPO, f"{START}=run:last:sft/megatron")
    assert config.get(START) == f"{run.output_dir}/checkpoints/step_3"


def test_a_job_is_named_alike_however_its_input_was_named(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    step, named = composed(DPO, f"{START}=run:last")
    _, plain = composed(DPO, f"{START}={run.output_dir}/checkpoints/step_3")
    assert plan_job(step, named).run_id == plan_job(step, plain).run_id


def test_the_ledger_keeps_what_was_named_and_the_paths_beside_it(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    step, config = composed(DPO, f"{START}=run:last")
    row_of = new_run(plan_job(step, config, run_id="dpo-1"))
    ledger.add([row_of])
    kept = ledger.get("dpo-1")
    assert kept and kept.artifact == "dpo-tiny"
    data, start = kept.uses
    assert (data["key"], data["text"]) == ("data.train.data_path", "step://data/train.jsonl")
    assert (start["name"], start["version"], start["run_id"]) == ("sft-tiny", 1, "sft-1")
    assert start["place"] == f"{run.output_dir}/checkpoints/step_3"


# What cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("run:", "names nothing", "run:last:STEP"),
        ("artifact:", "names nothing", "artifact:NAME@VERSION"),
        ("run:last:", "names nothing", "run:last:STEP"),
        ("artifact:@1", "names nothing", "artifact:NAME@VERSION"),
        ("run:nobody", "there is no run 'nobody'", "jobs list"),
        ("run:last:dpo", "no run of rl/nemo_rl/dpo has finished", "nemotron steps run rl/nemo_rl/dpo"),
        ("run:last:dpp", "there is no step dpp", "did you mean rl/nemo_rl/dpo"),
        ("artifact:sft-tiny@2", "sft-tiny has no version 2", "there are: 1"),
        ("artifact:sft", "there is no artifact sft", "did you mean sft-tiny?"),
        ("run:going", "going is pending", "nemotron jobs wait going"),
        ("run:broken", "broken has not finished: it failed, exit code 1", "nemotron jobs resubmit broken"),
        ("run:ended", "ended has not finished: it was cancelled", "nemotron jobs resubmit ended"),
        ("run:silent", "silent has left no record of what it made", "name the path"),
        ("run:s", "s is the start of", "silent"),
    ],
)
def test_a_run_that_is_of_no_use_is_one_message(ledger: Ledger, name: str, message: str, hint: str) -> None:
    finished(ledger, run_id="sft-1")
    here = Path.cwd()
    ledger.add([
        row("going", here, state="pending", host="elsewhere"),
        row("broken", here, state="failed", exit_code=1, checkpoints="/there/checkpoints"),
        row("ended", here, state="cancelled"),
        row("silent", here, state="finished", ended=time.time() - 500),
    ])  # fmt: skip
    error = refused(f"{START}={name}")
    assert error.message == f"{START}={name}: {message}" or error.message.startswith(f"{START}={name}: {message}")
    assert hint in (error.hint or "") and error.where == "command line"


def test_points_of_a_sweep_are_named_one_by_one(ledger: Ledger) -> None:
    ledger.add([row(f"sw.{n}", sweep="sw", point=n, state="finished", ended=1.0) for n in range(3)])
    error = refused(f"{START}=run:sw")
    assert error.message.endswith("sw is a sweep of 3 points") and error.hint == "one of  run:sw.0  run:sw.1  run:sw.2"


def test_a_type_that_does_not_fit_comes_with_the_step_that_converts_it(ledger: Ledger) -> None:
    finished(ledger, run_id="sft-1")
    error = refused("env.reward_model.model_name=run:sft-1", step="rl/nemo_rl/rlhf")
    assert error.message == (
        "env.reward_model.model_name takes a checkpoint_hf; sft-tiny@1 (run sft-1) is a checkpoint_megatron"
    )
    assert error.hint == "convert it first:  nemotron steps run convert/megatron_to_hf megatron_path=run:sft-1"
    error = refused("data.train.data_path=[run:sft-1]")
    assert "data.train.data_path takes a training_jsonl" in error.message


def test_a_deleted_folder_is_one_message(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    shutil.rmtree(run.output_dir)
    error = refused(f"{START}=run:sft-1")
    assert error.message == (
        f"{START}=run:sft-1: sft-tiny@1 (run sft-1) is gone: there is no {run.output_dir}/checkpoints/step_3"
    )
    assert "nemotron artifacts list --step sft/megatron" in (error.hint or "")


def test_a_version_whose_folder_holds_another_by_now_is_one_message(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1", ago=500)
    finished(ledger, run_id="sft-2", loss=0.2)
    error = refused(f"{START}=artifact:sft-tiny@1")
    assert error.message.endswith(f"is gone: {run.output_dir}/checkpoints/step_3 holds something else by now")
    assert error.hint == "the newest is artifact:sft-tiny@2"


def test_a_run_that_was_forgotten_still_names_what_it_made(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    ledger.remove([run.run_id])
    _, config = composed(DPO, f"{START}=run:sft-1")
    assert config.uses[0].name == "sft-tiny"


def test_what_lies_on_another_machine_is_said_with_where(ledger: Ledger, tmp_path: Path) -> None:
    here = finished(ledger, run_id="here", ago=500)
    contact = {"type": "ssh", "host": "login.example.org", "user": "me"}
    far = replace(here, run_id="far", executor="slurm", contact=contact, host="login.example.org", artifact="far")
    ledger.add([far])
    registry.register(ledger, open_host({}), [far])
    (entry,) = [one for one in registry.entries(ledger) if one.run_id == "here"]
    registry._enter(ledger, [])
    with ledger.transaction() as execute:  # the same folder cannot lie on both: give it a record of its own there
        execute("DELETE FROM registered WHERE run_id = 'far'")
    registry._enter(ledger, [(far, replace(entry.record, digest="other"))])
    error = refused(f"{START}=run:far")
    place = f"{here.output_dir}/checkpoints/step_3"
    assert error.message == (
        f"{START}=run:far: far@1 (run far) lies on login.example.org:{place}; this run is for this machine"
    )
    assert "nemotron jobs fetch far --checkpoints" in (error.hint or "")
    (tmp_path / "slurm.yaml").write_text(SLURM)
    step, profile = find_step(DPO), load_profile(str(tmp_path / "slurm.yaml"))
    config = compose_for(step, find_config(step, "tiny"), [f"{START}=run:far"], profile)
    assert config.get(START) == place  # of the same host: as it is, whether it is there the submission finds out
    with pytest.raises(UserError, match=rf"lies on .*{os.uname().nodename}|this machine:.*; this run is for login"):
        compose_for(step, find_config(step, "tiny"), [f"{START}=run:here"], profile)


# Tokenizers, templates, shapes -------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_with_both_and_the_ways_out(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    for given in ("run:sft-1", f"{run.output_dir}/checkpoints"):
        error = _refused_job(f"{START}={given}", "policy.tokenizer.name=gpt2")
        assert "policy.tokenizer.name: gpt2 here, but " in error.message and "was trained with bytes" in error.message
        place = f"{run.output_dir}/checkpoints/step_3"
        assert f"policy.tokenizer.name={place}/policy/tokenizer" in (error.hint or "")
        assert "run.allow_other_tokenizer=true" in (error.hint or "")


def test_another_chat_template_is_refused(ledger: Ledger) -> None:
    finished(ledger, run_id="sft-1")
    error = _refused_job(f"{START}=run:sft-1", "policy.tokenizer.chat_template=null")
    assert error.message.startswith("policy.tokenizer.chat_template: null (texts joined as they are) here, but ")
    assert error.message.endswith("was trained with default (the tokenizer has none)")


def test_another_shape_is_refused_field_by_field(ledger: Ledger) -> None:
    finished(ledger, run_id="sft-1")
    error = _refused_job(f"{START}=run:sft-1", "policy.architecture.num_layers=3")
    assert error.message == "policy.architecture: another shape than sft-tiny@1 (run sft-1):"
    assert (error.hint or "").splitlines()[0] == "num_layers: 2 there, 3 here"


def test_the_tokenizer_that_lies_with_the_checkpoint_is_its_own(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    own = f"policy.tokenizer.name={run.output_dir}/checkpoints/step_3/policy/tokenizer"
    _job(f"{START}=run:sft-1", own)
    _job(f"{START}={run.output_dir}/checkpoints/step_3", own)


def test_on_purpose_weights_are_taken_for_another_tokenizer(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    weights = f"{run.output_dir}/checkpoints/step_3/policy/weights/iter_0000000"
    other = "policy.tokenizer.name=gpt2"
    # The trainer compares no tokenizer with weights that are named alone.
    assert _job(f"{START}=run:sft-1", other, "run.allow_other_tokenizer=true").get(START) == weights
    assert _job(f"{START}={weights}", other).get(START) == weights


def test_rows_that_were_measured_with_another_tokenizer_are_refused(ledger: Ledger) -> None:
    finished(ledger, "data_prep/rl_prep", "tokenizer.name=bytes", run_id="prep-1")
    named = "data.manifest_path=run:prep-1"
    error = _refused_job(named, "policy.tokenizer.name=gpt2")
    assert error.message.startswith("policy.tokenizer.name: gpt2 here, but ")
    assert error.message.endswith("was measured with bytes")
    _job(named, "policy.tokenizer.name=gpt2", "run.allow_other_tokenizer=true")
    _job(named, "policy.tokenizer.chat_template=null")


def _job(*overrides: str) -> Composed:
    step, config = composed(DPO, *overrides)
    plan_job(step, config)
    return config


def _refused_job(*overrides: str) -> UserError:
    with pytest.raises(UserError) as raised:
        _job(*overrides)
    return raised.value


def test_what_another_job_will_make_is_not_compared_with_what_lies_there_now(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    step, config = composed(DPO, f"{START}={run.output_dir}/checkpoints", "policy.architecture.num_layers=3")
    plan_job(step, config, made=[START])
    with pytest.raises(UserError, match="another shape"):
        plan_job(step, config)


def test_the_summary_of_a_dry_run_says_which_artifact_a_path_is(ledger: Ledger) -> None:
    run = finished(ledger, run_id="sft-1")
    step = find_step(DPO)
    compiled = compile_job(step, find_config(step, "tiny"), [f"{START}=run:sft-1"])
    inputs = [value for name, value in facts_of(compiled) if name == "input"]
    place = f"{run.output_dir}/checkpoints/step_3"
    assert f"checkpoint_megatron  {START} = {place}  (sft-tiny@1 of run sft-1)" in inputs
