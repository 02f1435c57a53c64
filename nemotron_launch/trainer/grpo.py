"""Group relative policy optimization: the steps rl/nemo_rl/rlvr and rlhf, which differ in what scores the rollouts.

A step is, in NeMo-RL's order: rollouts, rewards (scaled, shaped), baselines, dynamic sampling, log-probabilities of
the policy before the step and of the reference, sequence error mask, advantages, then one or more optimizer steps.

Legend: B rollouts of the step (those of one prompt in a row), N rollouts of a micro-batch, R their tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from nemotron_launch.trainer import probe_run, warm_start
from nemotron_launch.trainer.agreement import together
from nemotron_launch.trainer.environments import open_environments
from nemotron_launch.trainer.environments.router import Environments
from nemotron_launch.trainer.grpo_data import load_data
from nemotron_launch.trainer.grpo_generator import open_generator, sampling_of
from nemotron_launch.trainer.grpo_rollouts import Roller
from nemotron_launch.trainer.grpo_samples import SampleLog
from nemotron_launch.trainer.grpo_settings import Settings
from nemotron_launch.trainer.grpo_step import RolloutTask
from nemotron_launch.trainer.grpo_validation import Validation
from nemotron_launch.trainer.loop import LoopConfig, Progress, Run, resume, train
from nemotron_launch.trainer.reference import frozen_logps
from nemotron_launch.trainer.setup import (
    Session,
    checkpoint_to_resume,
    find_start,
    new_policy,
    open_metrics,
    run_step,
    say_finished,
)

log = logging.getLogger(__name__)


def main(step_dir: Path, argv: list[str] | None = None) -> int:
    """Entry point of the step's train.py; returns an exit code of `exit_codes`."""
    return run_step(step_dir, run, argv)


def run(session: Session) -> int:
    """Load, warm-start or resume, train, and leave an aligned checkpoint_megatron."""
    with scoring(session) as environments:
        if session.config["grpo"]["probe"] is not None:
            return probe_run.run(session, environments)
        return _run(session, environments)


@contextlib.contextmanager
def scoring(session: Session) -> Iterator[Environments | None]:
    """The environments on rank 0, closed in the end; None on the other ranks."""
    environments = together(
        lambda: open_environments(session.config, step_dir=session.step_dir) if session.main_rank else None
    )
    try:
        yield environments
    finally:
        if environments is not None:
            environments.close()


def _run(session: Session, environments: Environments | None) -> int:
    config = session.config
    prompts = load_data(session, environments)
    loop = LoopConfig.of(config, "grpo", len(prompts.training))
    found = checkpoint_to_resume(session, data=prompts.fingerprint)
    progress = Progress.from_info(found[1]) if found else Progress()
    settings = Settings.of(session)
    start = find_start(session, found[1]["warm_start"] if found else None, again=settings.needs_reference)
    with open_metrics(session, progress.step) as metrics:
        if found and loop.over(progress):
            return say_finished(session, found[0], progress.step, loop.total_steps, limit="grpo.max_num_steps")
        group = config["grpo"]["num_generations_per_prompt"]
        log.info(
            "%d training prompts, %d steps of %d × %d rollouts",
            len(prompts.training), loop.total_steps, config["grpo"]["num_prompts_per_step"], group,
        )  # fmt: skip
        policy = new_policy(session)
        warm_start.load(policy, start)
        kind = config["grpo"]["reference"]
        reference = frozen_logps(session, policy, start, kind=kind) if settings.needs_reference else None
        policy.make_trainable(config["policy"]["megatron_cfg"], total_steps=loop.total_steps)
        if found:
            resume(policy, *found)
            log.info("resumed from %s", found[0])
        sampling = sampling_of(config["policy"]["generation"], session.tokenizer)
        with contextlib.closing(open_generator(session, policy)) as generator:
            roller = Roller(
                generator=generator,
                environments=environments,
                tokenizer=session.tokenizer,
                layout=session.layout,
                seed=loop.seed,
                max_failed=config["env"]["max_failed_rollouts"],
            )
            task = RolloutTask(
                settings=settings,
                prompts=prompts.training,
                sampling=sampling,
                roller=roller,
                reference=reference,
                validation=Validation.of(config, prompts.held_out, sampling),
                samples=SampleLog(session.output_dir, resume_step=progress.step, enabled=session.main_rank),
            )
            setup = Run(
                config=loop,
                policy=policy,
                task=task,
                store=session.store,
                metrics=metrics,
                stop=session.stop,
                tokenizer=session.tokenizer,
                composed=config,
                recorded={"warm_start": start.recorded(), "data": prompts.fingerprint},
                started=session.started,
            )
            return train(setup, progress)
