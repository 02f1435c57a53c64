"""Conversions for tests: composed configs, models of every supported shape, and the tensors of folders."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from nemotron_launch.config.compose import compose

STEPS = Path(__file__).parents[2] / "steps/convert"
SHAPES = {
    f"{family}-{'tied' if tied else 'untied'}": (family, tied)
    for family in ("llama", "qwen2", "qwen3")  # without, with QKV bias, with QK-norm
    for tied in (False, True)
}
VOCAB = 321  # odd, so that two tensor-parallel ranks must pad it


def config_of(step: str, folder: Path, **options: Any) -> dict[str, Any]:
    """A composed config of convert/<step> whose run leaves its files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"output_dir": str(folder), "device": "cpu", **options}
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]
    composed = compose(STEPS / step / "config/default.yaml", overrides, schema=STEPS / step / "schema.json")
    return {key: value for key, value in composed.data.items() if key != "run"}


def to_megatron(folder: Path, model: Path, **options: Any) -> Path:
    """step_0 of a Hugging Face folder."""
    from nemotron_launch.trainer import convert

    config = config_of("hf_to_megatron", folder, hf_path=str(model), **options)
    assert convert.to_megatron(config, STEPS / "hf_to_megatron") == 0
    return Path(config["megatron_path"]) / "step_0"


def to_hf(folder: Path, checkpoint: Path, **options: Any) -> Path:
    """The Hugging Face folder of a checkpoint."""
    from nemotron_launch.trainer import convert

    config = config_of("megatron_to_hf", folder, megatron_path=str(checkpoint), **options)
    assert convert.to_hf(config, STEPS / "megatron_to_hf") == 0
    return Path(config["hf_path"])


def main() -> None:
    """One rank of a layout: some of the folder `models` there and back, and the checkpoints of one process."""
    import torch

    from nemotron_launch.trainer.megatron import parallel

    folder, tensor, pipeline = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    size: dict[str, Any] = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    size["cluster__procs_per_node"] = int(os.environ["WORLD_SIZE"])
    for model in (folder / "models" / name for name in sys.argv[4:]):
        out = folder / f"tp{tensor}-pp{pipeline}" / model.name
        made = to_megatron(out, model, **size)
        to_hf(out, made, **size)
        to_hf(out / "other", folder / "alone" / model.name / "checkpoints", **size)
    parallel.stop()


if __name__ == "__main__":
    main()
