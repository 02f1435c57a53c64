"""Training prompts that are validation prompts too, against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemotron_launch.data_prep import duplicates, leakage
from nemotron_launch.data_prep.duplicates import DISTINCT, EXACT, NEAR, Found
from nemotron_launch.data_prep.leakage import OUT, TRAIN, VALIDATION
from nemotron_launch.data_prep.minhash import Near

NEAR_80 = Near(threshold=0.8)


def run(folder: Path, texts: list[str], sides: list[int], near: Near | None = NEAR_80, parts: int = 2) -> Found:
    files = [folder / f"{i}.records" for i in range(parts)]
    for numbers, file in zip(np.array_split(np.arange(len(texts)), parts), files, strict=True):
        duplicates.signatures([texts[i] for i in numbers], near).tofile(file)
    return leakage.find(files, np.array(sides, np.uint8), near, lambda rows: [texts[i] for i in rows])


def prompt(number: int, changed: int | None = None) -> str:
    """A prompt of 50 words of its own; with `changed`, one of them is another: 45 of 51 shingles are the same."""
    return " ".join("other" if i == changed else f"p{number}w{i}" for i in range(50))


def test_equal_prompts_leak_up_to_case_and_white_space(tmp_path: Path) -> None:
    texts = ["What is 2 + 2?", "what  IS 2 + 2?\n", "What is 2 + 3?", "What is 2 + 2?"]
    found = run(tmp_path, texts, [TRAIN, VALIDATION, TRAIN, OUT], near=None)
    assert found.kind.tolist() == [EXACT, DISTINCT, DISTINCT, DISTINCT]
    assert found.of.tolist() == [1, 1, 2, 3]


def test_nearly_equal_prompts_leak_and_say_of_what(tmp_path: Path) -> None:
    texts = [prompt(1), prompt(2), prompt(3, changed=20), prompt(1, changed=7), prompt(3)]
    found = run(tmp_path, texts, [TRAIN, TRAIN, VALIDATION, VALIDATION, TRAIN])
    assert found.kind.tolist() == [NEAR, DISTINCT, DISTINCT, DISTINCT, NEAR]
    assert found.of.tolist() == [3, 1, 2, 3, 2]


def test_an_equal_prompt_is_named_before_a_similar_one(tmp_path: Path) -> None:
    texts = [prompt(1, changed=4), prompt(1), prompt(1), prompt(1)]
    found = run(tmp_path, texts, [VALIDATION, TRAIN, VALIDATION, VALIDATION])
    assert (found.kind[1], found.of[1]) == (EXACT, 2)


def test_rows_that_share_a_band_and_little_else_do_not_leak(tmp_path: Path) -> None:
    """Every band of the two agrees, as if by chance: their texts decide."""
    texts = [prompt(1), prompt(2)]
    records = duplicates.signatures(texts, NEAR_80)
    records["bands"][0] = records["bands"][1]
    records.tofile(tmp_path / "records")
    sides = np.array([TRAIN, VALIDATION], np.uint8)
    found = leakage.find([tmp_path / "records"], sides, NEAR_80, lambda rows: [texts[i] for i in rows])
    assert found.kind.tolist() == [DISTINCT, DISTINCT]


def test_without_validation_rows_nothing_leaks(tmp_path: Path) -> None:
    assert run(tmp_path, [prompt(1), prompt(1)], [TRAIN, TRAIN]).kind.tolist() == [DISTINCT, DISTINCT]


@pytest.mark.parametrize("cut", [False, True])
def test_leaks_are_those_of_brute_force_however_the_rows_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    if cut:
        monkeypatch.setattr(leakage, "SLICE_ROWS", 7)
        monkeypatch.setattr(duplicates, "CHUNK_ROWS", 5)
    draw = np.random.Generator(np.random.PCG64(3))
    texts, sides = [], []
    for number in draw.integers(0, 60, 300).tolist():
        place = int(draw.integers(-1, 50))
        texts.append(prompt(number, changed=None if place < 0 else place))
        sides.append(VALIDATION if number % 6 == 0 and draw.random() < 0.5 else TRAIN)
    found = run(tmp_path, texts, sides, parts=4)
    held = [set(zip(*(texts[i].split()[k:] for k in range(3)), strict=False)) for i in range(len(texts))]
    for row in range(len(texts)):
        best = 0.0
        if sides[row] == TRAIN:
            others = [held[i] for i in range(len(texts)) if sides[i] == VALIDATION]
            best = max(len(held[row] & other) / len(held[row] | other) for other in others)
            if found.kind[row] != DISTINCT:
                of = held[found.of[row]]
                assert sides[found.of[row]] == VALIDATION
                assert len(held[row] & of) / len(held[row] | of) >= 0.8
        # One word changed in each of two prompts leaves 42 of 54 shingles: 0.78. One word in one: 45 of 51, 0.88.
        assert (found.kind[row] != DISTINCT) == (best >= 0.8)
