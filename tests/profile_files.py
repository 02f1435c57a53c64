"""Files of profiles for the tests: an env.toml as the public tool's generator writes it, and small YAML ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

USER = "${oc.env:USER}"
CPU = {
    "partition": "${oc.env:SLURM_CPU_PARTITION,cpu}",
    "build_partition": "${oc.env:SLURM_CPU_PARTITION,cpu}",
    "build_include_gpus": False,
    "build_gpus_per_node": 0,
    "ntasks_per_node": 1,
    "cpus_per_task": 4,
    "gpus_per_node": 0,
    "time": "01:00:00",
}
GPU = {
    "partition": "${oc.env:SLURM_GPU_PARTITION,${oc.env:SLURM_PARTITION,batch}}",
    "build_include_gpus": True,
    "build_gpus_per_node": 1,
    "ntasks_per_node": 1,
    "cpus_per_task": 8,
    "gpus_per_node": 1,
}
PIP = "python -m pip install --quiet --break-system-packages"
RAY_PATH = {"RAY_RUNTIME_ENV_PYTHONPATH": "/nemo_run/code/src", "RAY_MAX_LIMIT_FROM_API_SERVER": "100000"}
NVIDIA_KEYS = {"NVIDIA_API_KEY": "${oc.env:NVIDIA_API_KEY,''}", "NGC_API_KEY": "${oc.env:NGC_API_KEY,''}"}


def _child(parent: str, env: dict[str, str] | None = None, **keys: Any) -> dict[str, Any]:
    return {"extends": parent, **keys, **({"env_vars": env} if env else {})}


def _output(kind: str, name: str) -> dict[str, str]:
    return {f"{kind}_OUTPUT_DIR": f"/lustre/{USER}/output/{name}"}


# Its 29 profiles, `[wandb]` first: the shapes and keys of the public generator's Slurm file and of its Lepton base.
SLURM: dict[str, dict[str, Any]] = {
    "wandb": {"project": "nemotron", "entity": "${oc.env:WANDB_ENTITY,nvidia}"},
    "slurm_base": {
        "executor": "slurm",
        "tunnel": "ssh",
        "host": "${oc.env:SLURM_HOST,login.example.com}",
        "user": USER,
        "identity": "~/.ssh/id_ed25519",
        "account": "${oc.env:SLURM_ACCOUNT,nemotron}",
        "partition": "${oc.env:SLURM_PARTITION,batch}",
        "container_image": "nvcr.io/nvidia/nemo:25.11.nemotron_3_nano",
        "remote_job_dir": f"${{oc.env:NEMO_RUN_DIR,/lustre/{USER}/nemo-run}}",
        "mounts": ["/lustre:/lustre"],
        "lustre_mount": "",
        "nodes": 1,
        "ntasks_per_node": 8,
        "gpus_per_node": 8,
        "time": "02:00:00",
        "env_vars": {
            "HF_TOKEN": "${oc.env:HF_TOKEN,''}",
            "HF_HOME": f"${{oc.env:HF_HOME,/lustre/{USER}/hf}}",
            "WANDB_API_KEY": "${oc.env:WANDB_API_KEY,''}",
            "WANDB_PROJECT": "nemotron",
            "PYTHONPATH": "/nemo_run/code/src",
            "RAY_DEDUP_LOGS": "0",
        },
    },
    "slurm_prep_base": _child(
        "slurm_base", RAY_PATH, **CPU, startup_commands=["uv pip install --python /opt/venv/bin/python protobuf"]
    ),
    "slurm_prep_sft_packing": _child("slurm_prep_base", _output("SFT", "data_prep/sft_packing")),
    "slurm_prep_pretrain_prep": _child("slurm_prep_base", _output("PRETRAIN", "data_prep/pretrain_prep")),
    "slurm_prep_rl_prep": _child("slurm_prep_base", _output("RL", "data_prep/rl_prep")),
    "slurm_curator_base": _child("slurm_base", container_image="nvcr.io/nvidia/nemo-curator:26.02", **CPU),
    "slurm_byob_cpu": _child(
        "slurm_curator_base",
        NVIDIA_KEYS,
        run_command="python -m bootstrap --profile byob -- python -m step --config {config}",
    ),
    "slurm_byob_full": _child(
        "slurm_byob_cpu",
        **GPU,
        startup_commands=["export PYTHONPATH=/opt/Curator:$PYTHONPATH", "uv pip install 'transformers<5' \"x==1\""],
    ),
    "slurm_curate": _child("slurm_curator_base", {"NEMOTRON_CURATOR_RAY_NUM_CPUS": "4"}),
    "slurm_translate": _child("slurm_curator_base", NVIDIA_KEYS, **GPU),
    "slurm_sdg_data_designer": _child("slurm_base", _output("SDG", "sdg"), **CPU, startup_commands=[f"{PIP} designer"]),
    **{
        f"slurm_sdg_data_designer_{name}": _child("slurm_sdg_data_designer", _output("SDG", f"sdg/{name}"))
        for name in ("tiny", "default", "customer_support_tools", "rl_pref", "blend")
    },
    "slurm_pretrain_megatron_bridge": _child("slurm_base", _output("PRETRAIN", "pretrain"), nodes=2, time="04:00:00"),
    "slurm_pretrain_automodel": _child(
        "slurm_base", nodes=2, container_image="nvcr.io/nvidia/nemo-automodel:26.04", startup_commands=[f"{PIP} x"]
    ),
    "slurm_sft_megatron_bridge": _child(
        "slurm_base", {"SFT_PACKED_DIR": f"/lustre/{USER}/splits/train/*.parquet"}, nodes=2, time="04:00:00"
    ),
    "slurm_sft_automodel": _child("slurm_sft_megatron_bridge", _output("SFT", "sft/automodel")),
    "slurm_peft_megatron_bridge": _child("slurm_sft_megatron_bridge", _output("SFT", "peft/megatron_bridge")),
    "slurm_peft_automodel": _child("slurm_sft_automodel", _output("SFT", "peft/automodel")),
    "slurm_rl_nemo_rl_dpo": _child(
        "slurm_base",
        _output("RL", "rl/dpo"),
        container_image="nvcr.io/nvidia/nemo-rl:v0.6.0",
        nodes=2,
        time="04:00:00",
        startup_commands=[f"{PIP} omegaconf"],
    ),
    "slurm_rl_nemo_rl_rlvr": _child("slurm_rl_nemo_rl_dpo", _output("RL", "rl/rlvr")),
    "slurm_rl_nemo_rl_rlhf": _child(
        "slurm_rl_nemo_rl_dpo",
        {**_output("RL", "rl/rlhf"), "RL_PREP_MANIFEST": f"/lustre/{USER}/output/data_prep/rl_prep/manifest.json"},
        nodes=4,
    ),
    "slurm_optimize_modelopt_quantize": _child("slurm_base", _output("OPTIM", "optimize"), nodes=2),
    "slurm_optimize_modelopt_distill": _child("slurm_optimize_modelopt_quantize", _output("OPTIM", "optimize/distill")),
    "slurm_optimize_modelopt_prune": _child("slurm_base", nodes=1, ntasks_per_node=2, gpus_per_node=2),
    "slurm_eval_model_eval": _child("slurm_base", _output("EVAL", "eval/model_eval"), nodes=1, time="02:00:00"),
}
LEPTON: dict[str, dict[str, Any]] = {
    "wandb": SLURM["wandb"],
    "lepton_base": {
        "executor": "lepton",
        "container_image": "nvcr.io/nvidia/nemo:25.11.nemotron_3_nano",
        "node_group": "lepton-node-group",
        "resource_shape": "${oc.env:LEPTON_GPU_SHAPE,gpu.8xa100-80gb}",
        "nemo_run_dir": "${oc.env:NEMO_RUN_DIR,/mnt/lustre-shared/nemo-run}",
        "remote_job_dir": "${oc.env:NEMOTRON_REMOTE_JOB_DIR,/mnt/lustre-shared/output}",
        "workspace": "${oc.env:NEMOTRON_WORKSPACE,/mnt/lustre-shared}",
        "ray_version": "2.48.0",
        "nodes": 1,
        "gpus_per_node": 8,
        "nprocs_per_node": 8,
        "shared_memory_size": 65536,
        "pip_extras": ["typer", "rich", "pydantic-settings"],
        "mounts": [
            {
                "path": "${oc.env:NEMOTRON_HOST_MOUNT,/path/to/shared/workspace}",
                "mount_path": "${oc.env:NEMOTRON_WORKSPACE,/mnt/lustre-shared}",
                "from": "${oc.env:NEMOTRON_MOUNT_FROM,node-nfs:amlfs}",
            }
        ],
        "env_vars": {
            "HF_TOKEN": "${oc.env:HF_TOKEN,''}",
            "HF_HOME": "${oc.env:HF_HOME,/mnt/lustre-shared/hf}",
            "WANDB_API_KEY": "${oc.env:WANDB_API_KEY,''}",
            "RAY_DEDUP_LOGS": "0",
            "RAY_GRAFANA_IFRAME_HOST": "",
        },
    },
    "lepton_prep_sft_packing": _child(
        "lepton_base",
        {"SFT_OUTPUT_DIR": "/mnt/lustre-shared/output/sft/packed"},
        resource_shape="${oc.env:LEPTON_CPU_SHAPE,cpu.medium}",
        gpus_per_node=0,
        nprocs_per_node=1,
    ),
    "lepton_rl_nemo_rl_dpo": _child(
        "lepton_base",
        {"RL_OUTPUT_DIR": "/mnt/lustre-shared/output/rl/dpo"},
        container_image="nvcr.io/nvidia/nemo-rl:v0.6.0",
        nodes=2,
        startup_commands=[f"{PIP} omegaconf"],
    ),
    "lepton_rl_nemo_rl_rlhf": _child(
        "lepton_rl_nemo_rl_dpo", {"RL_OUTPUT_DIR": "/mnt/lustre-shared/output/rl/rlhf"}, nodes=4
    ),
}


def env_toml(tables: dict[str, dict[str, Any]]) -> str:
    """The tables as the public generator writes them: nested values as inline tables."""
    lines: list[str] = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + "".join(f"    {_toml(item)},\n" for item in value) + "]"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def write(folder: Path, **profiles: str) -> Path:
    """YAML profiles by name in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in profiles.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder
