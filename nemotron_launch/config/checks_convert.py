"""Checks of the steps of convert/: what is converted is named, and the processes hold whole copies of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemotron_launch.config.checks_policy import Problem, processes

#: What each step reads.
SOURCES = {"convert/hf_to_megatron": "hf_path", "convert/megatron_to_hf": "megatron_path"}


def check_conversion(step_id: str, data: dict[str, Any]) -> Iterator[Problem]:
    """Problems of a composed config of one of SOURCES."""
    source = SOURCES[step_id]
    if data[source] is None:
        what = "a Hugging Face folder or hub id" if source == "hf_path" else "a Megatron checkpoint"
        yield Problem(source, "is not set: there is nothing to convert", f"name {what}:  {source}=…")
    tensor, pipeline = data["tensor_model_parallel_size"], data["pipeline_model_parallel_size"]
    count = processes(data) or 1
    if count % (tensor * pipeline):
        yield Problem(
            "tensor_model_parallel_size" if tensor > 1 else "pipeline_model_parallel_size",
            f"tensor {tensor} × pipeline {pipeline} does not divide the {count} processes",
            f"set cluster.procs_per_node={tensor * pipeline}, or change the sizes",
        )
