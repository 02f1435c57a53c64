"""A whole path through a real container: the trainer on a real Slurm in an image that Charliecloud runs.

The image is built here, offline: folders to bind to, and a few files of its own. Python, its packages and the system's
libraries are this machine's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import planned_run

STEPS = 3
OVERRIDES = [
    "cluster.num_nodes=2", "cluster.procs_per_node=1", f"sft.max_num_steps={STEPS}", "sft.val_period=0",
    "sft.val_at_end=false", "sft.val_global_batch_size=40", "sft.val_generation.num_prompts=0",
    "policy.architecture.num_layers=1", "policy.architecture.hidden_size=32",
    "policy.architecture.num_attention_heads=2",
    "policy.architecture.intermediate_size=32", "policy.train_global_batch_size=8", "policy.train_micro_batch_size=2",
    "policy.megatron_cfg.scheduler.lr_warmup_iters=0", "checkpointing.metric_name=null", "output_dir=out",
]  # fmt: skip
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64")


def unpacked_image(tree: Path, binds: list[str]) -> Path:
    """The folder that becomes the image: what is bound must be there already, a squash file takes no more."""
    for folder in (*binds, "/dev", "/etc", "/proc", "/root", "/sys", "/tmp", "/ch"):
        (tree / folder[1:]).mkdir(parents=True, exist_ok=True)
    for file in ("passwd", "group", "hosts", "resolv.conf", "nsswitch.conf"):
        (tree / "etc" / file).touch()
    (tree / "etc" / "nsswitch.conf").write_text("hosts: files dns\n")
    (tree / "ch" / "environment").write_text("IMAGE_SAYS=hello\nOMP_NUM_THREADS=7\n")
    (tree / "etc" / "image").write_text("ours\n")
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("form", ["squash", "folder"])
def test_the_trainer_runs_in_a_real_container(form: str, cluster: Cluster, tmp_path: Path) -> None:
    pythons = [str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)]
    binds = [path for path in SYSTEM if Path(path).is_dir()]
    binds += [path for path in dict.fromkeys(pythons) if not path.startswith("/usr")]
    image = unpacked_image(tmp_path / "tree", [*binds, str(tmp_path)])
    if form == "squash":
        image = tmp_path / "image.sqsh"
        command = ["mksquashfs", str(tmp_path / "tree"), str(image), "-quiet", "-no-progress", "-all-root"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = planned_run(
        cluster,
        tmp_path,
        "sft/megatron",
        "tiny",
        OVERRIDES if form == "squash" else [one for one in OVERRIDES if not one.startswith("cluster.")],
        runtime="charliecloud",
        image=str(image),
        mounts=[f"{path}:{path}" for path in binds],
        env={"OMP_NUM_THREADS": "1"},
        setup=['echo "in the image: $(cat /etc/image), $IMAGE_SAYS, $OMP_NUM_THREADS thread"'],
    )
    try:
        run.submit()
        ended = run.end(240)
    finally:
        cluster.run("scancel", run.jobs[-1], check=False)
    assert (ended["JobState"], run.exit_code()) == ("COMPLETED", "0"), run.all()
    for node in range(run.job.nodes):
        assert "in the image: ours, hello, 1 thread" in run.log(node)
    output = Path(run.job.output_dir)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == STEPS and (output / "checkpoints" / f"step_{STEPS}").is_dir()


def test_an_image_that_is_only_a_part_of_one_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    tree = unpacked_image(tmp_path / "tree", [])
    (tree / "filler").write_bytes(bytes(range(256)) * 4096)
    subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 4096)
    run = planned_run(cluster, tmp_path, "sft/megatron", "tiny", [], runtime="charliecloud", image=str(image))
    run.submit()
    assert run.end()["ExitCode"] == "2:0", run.all()
    assert f"{image} is no squash file, or only a part of one" in run.out()
