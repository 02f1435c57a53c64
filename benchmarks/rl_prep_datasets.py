"""The preparation of data_prep/rl_prep written with `datasets`, as benchmarks/rl_prep.py measures it.

    python benchmarks/rl_prep_datasets.py OUTPUT --train FILE… --validation FILE [--num-proc N]

The same work: rows parsed and checked, long ones left out, exact and near duplicates (the same normalisation, shingles,
number of permutations and bands, candidates compared by their whole sets), leaks of validation prompts, shuffled, one
JSONL file a split. Prints how many rows are left.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, load_dataset

PERMUTATIONS, BANDS, ROWS, SHINGLE, THRESHOLD = 126, 18, 7, 3, 0.8
_DRAWN = np.random.default_rng(1).integers(0, 2**32, (2, PERMUTATIONS), dtype=np.uint32)
FACTORS, SUMMANDS = _DRAWN[0] | np.uint32(1), _DRAWN[1]

Batch = dict[str, list[Any]]


def parse(batch: Batch) -> Batch:
    """Lines of JSON to prompt and right answer; ok tells which can be used."""
    rows: Batch = {"prompt": [], "expected_answer": [], "ok": []}
    for line in batch["text"]:
        try:
            data = json.loads(line)
            prompt, answer = data.get("question"), data.get("answer")
        except (ValueError, AttributeError):
            prompt = answer = None
        usable = isinstance(prompt, str) and bool(prompt.strip()) and isinstance(answer, str) and bool(answer.strip())
        rows["prompt"].append(prompt if usable else "")
        rows["expected_answer"].append(answer if usable else "")
        rows["ok"].append(usable)
    return rows


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> set[str]:
    words = plain(text).split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def bands(text: str) -> list[int]:
    hashes = np.array([xxhash.xxh32_intdigest(shingle.encode()) for shingle in shingles(text)], np.uint32)
    minima = (hashes[:, None] * FACTORS + SUMMANDS).min(axis=0)
    return [xxhash.xxh3_64_intdigest(band.tobytes()) - 2**63 for band in minima.reshape(BANDS, ROWS)]


def sign(batch: Batch) -> Batch:
    """Exact and near signatures of each row and of its prompt."""
    whole = [f"{prompt}\n{answer}" for prompt, answer in zip(batch["prompt"], batch["expected_answer"], strict=True)]
    return {
        "exact": [xxhash.xxh3_128_digest(plain(text).encode()) for text in whole],
        "asked": [xxhash.xxh3_128_digest(plain(text).encode()) for text in batch["prompt"]],
        "bands": [bands(text) for text in whole],
        "asked_bands": [bands(text) for text in batch["prompt"]],
    }


def column(rows: Dataset, name: str) -> np.ndarray:
    """A column of signatures as one array."""
    table = rows.with_format("arrow")[:][name]
    if name.endswith("bands"):
        return np.concatenate([chunk.flatten().to_numpy() for chunk in table.chunks]).reshape(-1, BANDS)
    return np.array(table.to_pylist(), dtype="S16")


def is_near(a: str, b: str) -> bool:
    left, right = shingles(a), shingles(b)
    return len(left & right) >= THRESHOLD * len(left | right)


def without_duplicates(rows: Dataset) -> Dataset:
    """The first of all rows that are the same, then of all that are nearly the same and have one right answer."""
    rows = rows.select(np.sort(np.unique(column(rows, "exact"), return_index=True)[1]))
    hashes, dropped = column(rows, "bands"), np.zeros(len(rows), bool)
    for band in range(BANDS):
        order = np.argsort(hashes[:, band], kind="stable")
        values = hashes[order, band]
        edges = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1], [True]]))
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            if end - begin == 1:
                continue
            group = [int(row) for row in np.sort(order[begin:end]) if not dropped[row]]
            while len(group) > 1:
                first, later = rows[group[0]], rows[group[1:]]
                texts = zip(later["prompt"], later["expected_answer"], strict=True)
                same = [
                    answer == first["expected_answer"]
                    and is_near(f"{first['prompt']}\n{answer}", f"{prompt}\n{answer}")
                    for prompt, answer in texts
                ]
                dropped[[row for row, is_same in zip(group[1:], same, strict=True) if is_same]] = True
                group = [row for row, is_same in zip(group[1:], same, strict=True) if not is_same]
    return rows.select(np.flatnonzero(~dropped))


def without_leaks(train: Dataset, held_out: Dataset) -> Dataset:
    """The rows whose prompt is not (nearly) one of validation's."""
    leaks = np.isin(column(train, "asked"), column(held_out, "asked"))
    ours, theirs = column(train, "asked_bands"), column(held_out, "asked_bands")
    for band in range(BANDS):
        for row in np.flatnonzero(np.isin(ours[:, band], theirs[:, band]) & ~leaks).tolist():
            others = held_out[np.flatnonzero(theirs[:, band] == ours[row, band])]["prompt"]
            leaks[row] = any(is_near(train[row]["prompt"], other) for other in others)
    return train.select(np.flatnonzero(~leaks))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--num-proc", type=int, default=2)
    options = parser.parse_args()
    procs = options.num_proc
    options.output.mkdir(parents=True)
    # As text: the JSON reader stops at the first torn line.
    data = load_dataset(
        "text",
        data_files={"train": options.train, "validation": options.validation},
        cache_dir=str(options.output / "cache"),
        num_proc=procs,
    )
    data = data.map(parse, batched=True, num_proc=procs, remove_columns="text")
    data = data.filter(lambda usable: usable, input_columns="ok", num_proc=procs)
    most = options.max_length
    data = data.filter(lambda prompt: len(prompt.encode()) <= most, input_columns="prompt", num_proc=procs)
    data = data.map(sign, batched=True, num_proc=procs)
    train, held_out = without_duplicates(data["train"]), without_duplicates(data["validation"])
    train = without_leaks(train, held_out)
    left = {}
    for name, rows in (("train", train), ("validation", held_out)):
        rows = rows.select_columns(["prompt", "expected_answer"]).shuffle(seed=42)
        rows.to_json(options.output / f"{name}.jsonl", num_proc=procs)
        left[name] = len(rows)
    print(json.dumps(left))
    return 0


if __name__ == "__main__":
    sys.exit(main())
