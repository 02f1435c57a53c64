"""`nemotron doctor`: what the trainer finds on this machine, asked of the trainer's own Python."""

from __future__ import annotations

import subprocess
import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show the versions and abilities of Python, torch, megatron-core, CUDA, NCCL and the devices, and what is missing.

    Exit code 0 when training can start here, 1 when not.
    """
    command = [sys.executable, "-m", "nemotron_launch.trainer.doctor", *(["--json"] if as_json else [])]
    ctx.exit(subprocess.run(command).returncode)
