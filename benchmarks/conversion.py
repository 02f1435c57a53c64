"""What conversion takes: seconds, and memory on top of the imported libraries, next to the model's size.

    python benchmarks/conversion.py [--layers 12] [--json] [--check]

A Llama of random bfloat16 weights (12 layers: 332 MiB in 4 files) becomes a Megatron checkpoint and a Hugging Face
folder again, each in a process of its own, without and with the comparison of logits. Peaks are sampled every 2 ms:
"own" is memory that only the process has, "all" counts what it has mapped of the model's files too. --check ends with 1
where a conversion without comparison takes more than half of the model's size, or the weights are not the same bits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MIB = 2**20
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def make_model(folder: Path, layers: int) -> int:
    """Bytes of the weights of a new model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def convert(step: str, overrides: list[str]) -> dict[str, float]:
    """One conversion in this process: seconds and peaks in MiB above what the libraries take."""
    import torch
    import transformers  # noqa: F401

    from nemotron_launch.config.compose import compose
    from nemotron_launch.trainer import convert

    torch.set_num_threads(1)
    folder = REPOSITORY / "steps/convert" / step
    config = compose(folder / "config/default.yaml", overrides, schema=folder / "schema.json").data
    Path(config["output_dir"]).mkdir(parents=True, exist_ok=True)
    before, peaks, over = memory(), memory(), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for name, value in memory().items():
                peaks[name] = max(peaks[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    code = {"hf_to_megatron": convert.to_megatron, "megatron_to_hf": convert.to_hf}[step](config, folder)
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    assert code == 0
    return {"seconds": seconds, **{name: peaks[name] - before[name] for name in peaks}}


def memory() -> dict[str, float]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("all", "VmRSS"))}


def in_a_process(step: str, *overrides: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", step, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def same_bits(one: Path, other: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    first, second = (
        {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        for folder in (one, other)
    )
    return first.keys() == second.keys() and all(torch.equal(first[name], value) for name, value in second.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(convert(options.one[0], options.one[1:])))
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_model(folder / "model", options.layers) / MIB
        for compared in ("never", "always"):
            there, back = folder / f"{compared}-megatron", folder / f"{compared}-hf"
            runs = (
                ("hf_to_megatron", f"hf_path={folder / 'model'}", f"output_dir={there}"),
                ("megatron_to_hf", f"megatron_path={there / 'checkpoints'}", f"output_dir={back}"),
            )
            for step, *overrides in runs:
                found = in_a_process(step, *overrides, f"compare_logits={compared}")
                rows.append({"step": step, "compare_logits": compared, **found})
        same = same_bits(folder / "model", back / "hf")
    if options.json:
        print(json.dumps({"model_mib": size, "same_bits": same, "runs": rows}, indent=1))
    else:
        print(f"model of {size:.0f} MiB, the same bits after both ways: {same}")
        for row in rows:
            print(
                f"{row['step']:15} compare_logits={row['compare_logits']:7}{row['seconds']:6.1f} s"
                f"{row['own']:7.0f} MiB own ({row['own'] / size:.2f} of the model){row['all']:7.0f} MiB all"
            )
    low = all(row["own"] < size / 2 for row in rows if row["compare_logits"] == "never")
    return int(options.check and not (low and same))


if __name__ == "__main__":
    sys.exit(main())
