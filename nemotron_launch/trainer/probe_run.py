"""Rollouts of the current policy, scored and looked at, without training: what `nemotron steps probe` starts."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.trainer import exit_codes, warm_start
from nemotron_launch.trainer.agreement import on_rank_0
from nemotron_launch.trainer.checkpoints import WEIGHTS, newest_complete
from nemotron_launch.trainer.environments.router import Environments
from nemotron_launch.trainer.grpo_data import load_data
from nemotron_launch.trainer.grpo_generator import open_generator, sampling_of
from nemotron_launch.trainer.grpo_rollouts import Roller
from nemotron_launch.trainer.megatron import checkpoint
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.probe import Finding, Limits, findings, summarise
from nemotron_launch.trainer.probe_page import page, table
from nemotron_launch.trainer.setup import Session, find_start, new_policy

log = logging.getLogger(__name__)
# Training steps count from 1, validations draw as step 0 does.
PROBE_STEP = 0


def run(session: Session, environments: Environments | None) -> int:
    """Probe as `grpo.probe` says; probe.json and probe.html in output_dir, the table on stdout.

    Returns FINISHED, or FAILED where a finding says that training would be in vain.
    """
    config, asked = session.config, session.config["grpo"]["probe"]
    samples = asked["samples"] or config["grpo"]["num_generations_per_prompt"]
    prompts = load_data(session, environments).training
    chosen = np.random.default_rng(config["grpo"]["seed"]).permutation(len(prompts))[: asked["prompts"]]
    policy = new_policy(session)
    source = _load(session, policy, asked["checkpoint_dir"])
    log.info("%d prompts × %d rollouts, policy from %s", len(chosen), samples, source)
    with contextlib.closing(open_generator(session, policy)) as generator:
        generator.refresh()
        roller = Roller(
            generator=generator,
            environments=environments,
            tokenizer=session.tokenizer,
            layout=session.layout,
            seed=config["grpo"]["seed"],
            max_failed=1.0,  # to be told, not to end with
        )
        rollouts = roller.roll(
            [prompts[i] for i in chosen],
            [int(i) for i in chosen],
            step=PROBE_STEP,
            samples=samples,
            sampling=sampling_of(config["policy"]["generation"], session.tokenizer),
        )
    limits = Limits(**{name: asked[name] for name in asdict(Limits())})

    def tell() -> bool:
        summary = summarise(rollouts, samples)
        found = findings(summary, limits)
        data = {"policy": source, **summary, "findings": [asdict(finding) for finding in found]}
        _write(session.output_dir, data, found)
        print(json.dumps(_plain(data), indent=2) if asked["json"] else table(data), flush=True)
        log.info("to look at:  %s", session.output_dir / "probe.html")
        return any(finding.fatal for finding in found)

    return exit_codes.FAILED if on_rank_0(tell) else exit_codes.FINISHED


def _load(session: Session, policy: Policy, checkpoint_dir: str | None) -> str:
    """The newest checkpoint of the run that is probed, else what it would start from; said in words."""
    newest = on_rank_0(lambda: newest_complete(Path(checkpoint_dir)) if checkpoint_dir else None)
    if newest is not None:
        checkpoint.load_weights(newest / WEIGHTS, policy.gpt)
        return str(newest)
    start = find_start(session, None, again=False)
    warm_start.load(policy, start)
    return str(start.path or start.fingerprint)


def _write(folder: Path, data: dict[str, Any], found: list[Finding]) -> None:
    (folder / "probe.json").write_text(json.dumps(_plain(data), indent=2) + "\n", encoding="utf-8")
    (folder / "probe.html").write_text(page(data, found), encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
