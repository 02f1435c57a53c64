"""Small trees of steps for the launcher's tests: real manifests, schemas and scripts that need no trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent

# Writes what it was given, leaves a checkpoint as a trainer does, and ends as its config says.
SCRIPT = """\
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--config", type=pathlib.Path)
known, rest = parser.parse_known_args()
import yaml
config = yaml.safe_load(known.config.read_text())
output = pathlib.Path(config["output_dir"])
output.mkdir(parents=True, exist_ok=True)
(output / "seen.json").write_text(json.dumps({"argv": rest, "config": config, "env": dict(os.environ)}))
if config.get("wait"):
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, f: asked.append(n))
    (output / "ready").touch()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.2)
    (output / "asked.json").write_text(json.dumps(asked))
    sys.exit(85)
step = pathlib.Path(config["checkpointing"]["checkpoint_dir"]) / "step_1"
(step / "policy" / "weights" / "iter_0000000").mkdir(parents=True, exist_ok=True)
(step / "training_info.json").write_text('{"step": 1}')
(output / "metrics.jsonl").write_text("{}")
(output / "exit_code").write_text(str(config.get("exit", 0)))
sys.exit(config.get("exit", 0))
"""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "defaults": {},
        "output_dir": {"type": "string"},
        "run": {"type": "object"},
        "wait": {"type": "boolean"},
        "exit": {"type": "integer"},
        "env_vars": {"type": "object"},
        "cluster": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"num_nodes": {"type": "integer", "default": 1}, "procs_per_node": {"type": "integer"}},
        },
        "data": {"type": "object", "properties": {"path": {"type": ["string", "null", "array"]}}},
        "checkpointing": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "checkpoint_dir": {"type": "string", "default": "${output_dir}/checkpoints"},
                "pretrained": {"type": ["string", "null"], "default": None},
            },
        },
    },
}


def manifest(step_id: str, **changes: Any) -> dict[str, Any]:
    """A complete manifest that keeps to steps/schemas/manifest.json."""
    whole = {
        "id": step_id,
        "name": step_id.title(),
        "category": step_id.split("/")[0],
        "description": f"Does {step_id}.\nAt length.",
        "tags": ["small"],
        "consumes": [
            {"type": "training_jsonl", "required": True, "key": "data.path", "description": "Rows."},
            {
                "type": "checkpoint_megatron",
                "required": False,
                "key": "checkpointing.pretrained",
                "description": "Start.",
            },
        ],
        "produces": [
            {
                "type": "checkpoint_megatron",
                "required": True,
                "key": "checkpointing.checkpoint_dir",
                "description": "End.",
            }
        ],
        "parameters": [{"name": "exit", "description": "Exit code.", "default": 0, "choices": [0, 1]}],
        "strategies": [{"when": "It rains.", "then": "Stay in."}],
        "errors": [{"name": "wet", "meaning": "It rained.", "recovery": "Dry it."}],
        "image": "example.org/image:1",
        "resources": {"nodes": 1, "gpus_per_node": 8},
        "entry": {"script": "train.py", "launch": "python", "passthrough": ["--flag"]},
    }
    return {**whole, **changes}


def add_step(
    root: Path,
    step_id: str,
    configs: dict[str, str] | None = None,
    schema: dict[str, Any] | None = SCHEMA,
    **changes: Any,
) -> Path:
    """Put a step with its configs (name → YAML), schema and script below `root`; its folder."""
    folder = root / step_id
    (folder / "config").mkdir(parents=True)
    (folder / "step.yaml").write_text(yaml.safe_dump(manifest(step_id, **changes), sort_keys=False))
    (folder / "train.py").write_text(SCRIPT)
    if schema is not None:
        (folder / "schema.json").write_text(json.dumps(schema))
    for name, text in (configs or {"default": f"output_dir: out/{step_id}\n"}).items():
        (folder / "config" / f"{name}.yaml").write_text(text)
    return folder


def small_tree(root: Path) -> Path:
    """`sft/small`, and `rl/pairs` whose warm start `sft/small -c tiny` makes."""
    (root / "schemas").mkdir(parents=True)
    for name in ("manifest.json", "artifacts.json"):
        (root / "schemas" / name).write_text((REPOSITORY / "steps" / "schemas" / name).read_text())
    (root / "artifacts.yaml").write_text((REPOSITORY / "steps" / "artifacts.yaml").read_text())
    add_step(root, "sft/small", {"default": "output_dir: out/sft\n", "tiny": "output_dir: out/sft-tiny\n"})
    made = "run: {make_missing: {checkpoint_megatron: {step: sft/small, config: tiny}}}\n"
    tiny = f"output_dir: out/pairs-tiny\n{made}checkpointing:\n  pretrained: out/sft-tiny/checkpoints\n"
    add_step(root, "rl/pairs", {"default": "output_dir: out/pairs\n", "tiny": tiny}, tags=["rl", "small"])
    return root
