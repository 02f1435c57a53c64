"""Rows for benchmarks/rl_prep.py: word problems in JSONL, with duplicates, leaks and bad rows whose number is known.

    python benchmarks/rl_prep_rows.py FOLDER SIZE [--seed N]

writes FOLDER/train-0.jsonl … of SIZE bytes together (2GB, 200MB), validation.jsonl, and expected.json: how
many rows a preparation must read, drop for each reason, and keep. About 50 MB/s.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

FILES = 8
VALIDATION_ROWS = 2000
#: Bytes, with the tokenizer `bytes`, above which a prompt is too long.
MAX_LENGTH = 8192
#: Shares of the rows.
EXACT, NEAR, LEAK, BAD, LONG = 0.02, 0.02, 0.0005, 0.001, 0.0005
_POOL = 40_000
_LONG_SENTENCES = 160
_KEPT_BACK = 2000


def write(folder: Path, size: int, seed: int = 1) -> dict[str, int]:
    """Write the files; returns what expected.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    pool = _sentences(draw)
    held_out = [_problem(draw, pool, f"Held out {number}.") for number in range(VALIDATION_ROWS)]
    with (folder / "validation.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(_line(number, *row) for number, row in enumerate(held_out))
    counts = dict.fromkeys(("read", "bad", "too_long", "exact", "near", "leaks", "kept"), 0)
    rows = _rows(draw, pool, held_out, counts)
    for number in range(FILES):
        with (folder / f"train-{number}.jsonl").open("w", encoding="utf-8") as file:
            written = 0
            while written < size // FILES:
                lines = "".join(next(rows) for _ in range(500))
                written += len(lines.encode())
                file.write(lines)
    counts["read"] = sum(counts.values())
    counts["validation"] = len(held_out)
    (folder / "expected.json").write_text(json.dumps(counts, indent=2) + "\n")
    return counts


def _rows(
    draw: random.Random, pool: list[str], held_out: list[tuple[str, str]], counts: dict[str, int]
) -> Iterator[str]:
    """Lines without end; each original and each held-out row is repeated at most once."""
    waiting: list[tuple[str, str]] = []
    leaking = list(held_out)
    number = 0
    bad: list[Callable[[str, str], str]] = [
        lambda question, answer: f'{{"id": {number}, "question": "{question}\n',  # torn
        lambda question, answer: f'{{"id": {number}, "question": "{question}"}}\n',  # nothing to verify by
        lambda question, answer: f'{{"id": {number}, "question": null, "answer": "{answer}"}}\n',
    ]
    while True:
        number += 1
        chance = draw.random()
        kind = "kept"
        for name, share in (("exact", EXACT), ("near", NEAR), ("leaks", LEAK), ("bad", BAD), ("too_long", LONG)):
            if chance < share:
                kind = name
                break
            chance -= share
        if (kind in ("exact", "near") and not waiting) or (kind == "leaks" and not leaking):
            kind = "kept"
        counts[kind] += 1
        if kind == "exact":
            question, answer = waiting.pop(draw.randrange(len(waiting)))
            yield _line(number, " " + question.replace(". ", ".  ").replace("The ", "THE "), answer)
        elif kind == "near":
            question, answer = waiting.pop(draw.randrange(len(waiting)))
            yield _line(number, question + " Please explain.", answer)
        elif kind == "leaks":
            question, answer = leaking.pop()
            yield _line(number, question.upper() if number % 2 and "\\" not in question else f"{question} Why?", answer)
        elif kind == "bad":
            yield bad[number % len(bad)](*_problem(draw, pool, f"Case {number}."))
        else:
            row = _problem(draw, pool, f"Case {number}.", sentences=_LONG_SENTENCES if kind == "too_long" else None)
            if kind == "kept" and draw.random() < 2 * (EXACT + NEAR):
                if len(waiting) < _KEPT_BACK:
                    waiting.append(row)
                else:
                    waiting[draw.randrange(_KEPT_BACK)] = row
            yield _line(number, *row)


def _problem(draw: random.Random, pool: list[str], name: str, *, sentences: int | None = None) -> tuple[str, str]:
    """(question, answer) as they stand in JSON; about 600 bytes, of some 100 words."""
    count = sentences or min(4 + int(draw.expovariate(0.25)), 40)
    return f"{name} {' '.join(draw.choices(pool, k=count))}", f"#### {draw.randrange(100_000)}"


def _sentences(draw: random.Random) -> list[str]:
    """Sentences of words with Zipf's frequencies, escaped as JSON text; some with other scripts, quotes and breaks."""
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(20_000)]
    words[50:80] = ["naïve", "Zürich", '"so"', "12.5%", "$9", "3/4", "x_1", "\n"] * 3 + ["数学", "题目", "сколько"] * 2
    weights = [1 / (rank + 10) for rank in range(len(words))]
    chosen = iter(draw.choices(words, weights, k=_POOL * 16))
    sentences = (" ".join(next(chosen) for _ in range(draw.randint(8, 16))) for _ in range(_POOL))
    return [json.dumps(f"The {text}.", ensure_ascii=False)[1:-1] for text in sentences]


def _line(number: int, question: str, answer: str) -> str:
    return f'{{"id": {number}, "question": "{question}", "answer": "{answer}"}}\n'


def size_of(text: str) -> int:
    """Bytes that 200MB or 2GB stands for."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("size", type=size_of)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps(write(arguments.folder, arguments.size, arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
