"""A pipeline of three small steps, and what makes their script record what it leaves."""

from __future__ import annotations

ENDING = '(output / "exit_code").write_text'
RECORDING = """\
if not config.get("exit", 0):
    from nemotron_launch.artifacts.record import register
    register(pathlib.Path(__file__).parent, config, config_path=known.config)
"""
# Written backwards: order follows from what stages need.
THREE = """\
name: three
output_dir: out/three
stages:
  - name: third
    step: small
    inputs:
      checkpointing.pretrained: second
    overrides: [data.path=rows.jsonl]
  - name: second
    step: rl/pairs
    config: tiny
    inputs:
      checkpoint_megatron: first
    overrides: [data.path=rows.jsonl]
  - name: first
    step: sft/small
    config: tiny
    overrides: [data.path=rows.jsonl]
"""
