"""`nemotron steps probe`: rollouts of a step's policy, scored and summed up, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.cli.steps import RunCommand, asks_for_job, dry_run_of, is_override, load_profile_of
from nemotron_launch.errors import UserError


@click.command(cls=RunCommand)
@asks_for_job
@click.option("--prompts", type=click.IntRange(min=1), metavar="N", help="Prompts (default: 32).")
@click.option("--samples", type=click.IntRange(min=1), metavar="G", help="Rollouts of each (default: the config's).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def probe(
    ctx: click.Context,
    step_id: str,
    arguments: tuple[str, ...],
    config: str | None,
    attached: str | None,
    detached: str | None,
    dry_run: bool,
    profiles: Path | None,
    prompts: int | None,
    samples: int | None,
    as_json: bool,
) -> None:
    """Look at a reward before a policy learns from it: N prompts × G rollouts, scored, without training.

    ID, CONFIG, PROFILE and overrides are as in steps run; the policy is the newest checkpoint of that run, or what it
    would start from. Tells mean and spread of the rewards, groups without variance, lengths, verifier errors, the best
    and worst answers, and what speaks against training. probe.json and probe.html go to <output_dir>/probe.

    The exit code can gate a pipeline: 0, or 1 where nothing could be learned (all rewards of every group equal, the
    verifier fails on most rollouts, every answer is cut off).
    """
    from nemotron_launch.plan import compose_for

    if attached is not None and detached is not None:
        raise UserError("-r and -b exclude each other", hint="-r runs and follows, -b submits and returns")
    passthrough = (*(a for a in arguments if not is_override(a)), *ctx.meta["nemotron.passthrough"])
    if passthrough:
        raise UserError(f"{passthrough[0]}: probe takes overrides only", hint="KEY=VALUE")
    step = find_step(step_id)
    path = find_config(step, config)
    profile = load_profile_of(attached or detached, profiles, False)
    overrides = [argument for argument in arguments if is_override(argument)]
    composed = compose_for(step, path, overrides, profile)
    if composed.get("grpo") is None:
        raise UserError(
            f"{step.id} makes no rollouts: there is nothing to probe", hint="rl/nemo_rl/rlvr, rl/nemo_rl/rlhf"
        )
    asked = {"prompts": prompts, "samples": samples, "json": as_json or None}
    asked["checkpoint_dir"] = composed.get("grpo.probe.checkpoint_dir") or composed.get("checkpointing.checkpoint_dir")
    output = str(composed.get("output_dir")).rstrip("/") + "/probe"
    overrides.append(f"output_dir={json.dumps(output)}")
    if composed.get("grpo.probe") is None:
        overrides.append("grpo.probe={}")
    overrides += [f"grpo.probe.{key}={json.dumps(value)}" for key, value in asked.items() if value is not None]
    if dry_run:
        dry_run_of(step, path, overrides, profile, (), detached is None, None, None)
    elif profile is not None and (detached is not None or profile.executor != "local"):
        from nemotron_launch.cli.submit import Asked, submit_run

        ctx.exit(submit_run(step, path, overrides, (), profile, Asked(detached is None)))
    else:
        from nemotron_launch.backends.local import run_stages

        ctx.exit(run_stages(step, path, overrides, (), profile))
