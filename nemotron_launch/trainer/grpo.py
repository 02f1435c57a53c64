"""Group relative policy optimization: the steps rl/nemo_rl/rlvr and rlhf, which differ in what scores the rollouts.

A step is, in NeMo-RL's order: rollouts, rewards (scaled, shaped), baselines, dynamic sampling, log-probabilities of
the policy before the step and of the reference, sequence error mask, advantages, then one or more optimizer steps.

Legend: B rollouts of the step (those of one prompt in a row), N rollouts of a micro-batch, R their tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nemotron_launch.trainer import probe_run
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
from nemotron_launch.trainer.reference import frozen_logps
from nemotron_launch.trainer.setup import Session, run_step
from nemotron_launch.trainer.start import Rows, Start, start_training


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
    settings = Settings.of(session)

    def train_from(begun: Start) -> int:
        policy = begun.policy()
        kind = config["grpo"]["reference"]
        reference = frozen_logps(session, policy, begun.weights, kind=kind) if settings.needs_reference else None
        begun.make_trainable(policy)
        sampling = sampling_of(config["policy"]["generation"], session.tokenizer)
        with contextlib.closing(open_generator(session, policy)) as generator:
            roller = Roller(
                generator=generator,
                environments=environments,
                tokenizer=session.tokenizer,
                layout=session.layout,
                seed=begun.loop.seed,
                max_failed=config["env"]["max_failed_rollouts"],
            )
            task = RolloutTask(
                settings=settings,
                prompts=prompts.training,
                sampling=sampling,
                roller=roller,
                reference=reference,
                validation=Validation.of(config, prompts.held_out, sampling),
                samples=SampleLog(session.output_dir, resume_step=begun.progress.step, enabled=session.main_rank),
            )
            return begun.train(policy, task)

    step = f"{config['grpo']['num_prompts_per_step']} × {config['grpo']['num_generations_per_prompt']} rollouts"
    rows = Rows("grpo", len(prompts.training), prompts.fingerprint, "prompts", step)
    return start_training(session, rows, train_from, reference=settings.needs_reference)
