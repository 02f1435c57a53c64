"""A Lepton job to change at will, and small bundles to go with it."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemotron_launch import bundle
from nemotron_launch.job import Bundle, Container, File, Job, Mount, Restart

VOLUME = "node-nfs:lustre"


def lepton_job(remote: Path | str = "/lustre/runs", *, mounted: bool = True, **changes: Any) -> Job:
    """A job of one replica that runs `true`; its folder lies on a mount unless mounted is False."""
    mounts = (Mount("/runs", str(remote), volume=VOLUME),) if mounted else ()
    job = Job(
        run_id="20261121-101500-dpo-tiny-3fa9c1",
        name="dpo-tiny",
        step="rl/nemo_rl/dpo",
        config="tiny",
        executor="lepton",
        profile="lepton_rl_nemo_rl_dpo",
        run_dir=f"{remote}/r1",
        workdir=str(remote),
        output_dir=f"{remote}/out",
        nodes=1,
        procs=1,
        gpus_per_node=0,
        command=("true",),
        files=(File("config.yaml", "a: 1\n"),),
        env={},
        container=Container("lepton", "nvcr.io/nvidia/nemo-rl:v0.6.0", mounts, sys.executable),
        restart=Restart(3),
        options={"resource_shape": "gpu.8xh100-80gb", "time": "04:00:00", "remote_job_dir": str(remote)},
    )
    options = {**job.options, **changes.pop("options", {})}
    return replace(job, options=options, **changes)


def small_bundle(files: Mapping[str, bytes]) -> Bundle:
    """A bundle of these files, known to `bundle.read` in this process."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = packed.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    name = f"code-{digest[:12]}.tar.gz"
    bundle._unstored[name] = data
    return Bundle(name, digest, len(data))
