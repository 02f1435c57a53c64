"""Exact and near duplicates against brute force on small sets, and what must hold however they are cut."""

from __future__ import annotations

import tracemalloc
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.data_prep import duplicates, minhash
from nemotron_launch.data_prep.duplicates import DISTINCT, EXACT, NEAR, Found
from nemotron_launch.data_prep.minhash import Near

NEAR_80 = Near(threshold=0.8)
SEEDED = np.random.Generator(np.random.PCG64())


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test draws the same numbers, whatever ran before it."""
    SEEDED.bit_generator.state = np.random.PCG64(7).state


# Oracles -------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words_of(text: str) -> list[str]:
    """Words between spaces; a character of three or more bytes is its own."""
    words = [""]
    for character in plain(text):
        wide = len(character.encode("utf-8", "surrogatepass")) >= 3
        words += [character, ""] if wide else [""] if character == " " else []
        if not wide and character != " ":
            words[-1] += character
    return [word for word in words if word]


@cache
def shingle_set(text: str, size: int = 3) -> frozenset[tuple[str, ...]]:
    words = words_of(text)
    return frozenset(tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))


def index(a: str, b: str) -> float:
    left, right = shingle_set(a), shingle_set(b)
    return len(left & right) / len(left | right)


# Running it ----------------------------------------------------------------------------------------------------------


def run(
    texts: Sequence[str],
    near: Near | None,
    *,
    parts: int = 1,
    apart: Sequence[str] | None = None,
    sides: np.ndarray | None = None,
) -> Found:
    """What `find` says of texts that lie in so many files, written a few rows at a time."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{i}.records" for i in range(parts)]
        for numbers, file in zip(np.array_split(np.arange(len(texts)), parts), files, strict=True):
            with file.open("wb") as out:
                for few in np.array_split(numbers, 3):
                    rows = few.tolist()
                    labels = None if apart is None else [apart[i] for i in rows]
                    duplicates.signatures([texts[i] for i in rows], near, apart=labels).tofile(out)
        found = duplicates.find(files, folder, near, lambda rows: [texts[i] for i in rows], sides=sides)
        assert sorted(folder.iterdir()) == sorted(files), "files were left behind"
    return found


def changed(words: Sequence[str], at: Sequence[int]) -> str:
    return " ".join(f"changed{i}" if i in at else word for i, word in enumerate(words))


def sentence(count: int) -> list[str]:
    return [f"w{number}" for number in SEEDED.integers(0, 10**9, count)]


# Exact ---------------------------------------------------------------------------------------------------------------

SAYINGS = [
    "",
    " ",
    "Two  words",
    "two words",
    "TWO\twords\n",
    "ﬁne",
    "fine",
    "Straße",
    "STRASSE",
    "\ud800",
    "数 学",
    "x",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SAYINGS), max_size=30), st.integers(1, 4))
def test_exact_duplicates_are_those_of_a_dict(texts: list[str], parts: int) -> None:
    found = run(texts, None, parts=parts)
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        assert found.of[row] == first.setdefault(plain(text), row)
        assert found.kind[row] == (DISTINCT if first[plain(text)] == row else EXACT)


def test_rows_of_two_sides_are_no_duplicates_of_each_other() -> None:
    long = " ".join(sentence(60))
    texts = ["a", "a", "a", "a", long, long + " more", long + " more", long]
    found = run(texts, NEAR_80, sides=np.array([1, 2, 2, 0, 1, 2, 0, 1], np.uint8))
    assert found.kind.tolist() == [DISTINCT, DISTINCT, EXACT, DISTINCT, DISTINCT, DISTINCT, DISTINCT, EXACT]
    assert found.of.tolist() == [0, 1, 1, 3, 4, 5, 6, 4]


# Near ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab cé数 \U0001f600")), min_size=1, max_size=12), st.integers(1, 5))
def test_shingles_are_those_of_words_whatever_the_script(texts: list[str], size: int) -> None:
    hashes, starts = minhash.shingles([minhash.normalised(text) for text in texts], size)
    distinct = [set(hashes[a:b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]
    oracle = [shingle_set(text, size) for text in texts]
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert len(distinct[i] & distinct[j]) == len(oracle[i] & oracle[j])


def families(count: int) -> list[str]:
    """Texts, each followed somewhere by variants that differ from it in none to four of forty words."""
    texts = []
    for _ in range(count):
        words = sentence(40)
        texts.append(" ".join(words))
        for size in SEEDED.integers(0, 5, 4):
            texts.append(changed(words, SEEDED.choice(40, size, replace=False).tolist()))
    return [texts[i] for i in SEEDED.permutation(len(texts))]


def test_near_duplicates_name_an_earlier_row_that_brute_force_finds_as_near() -> None:
    texts = families(40)
    found = run(texts, NEAR_80, parts=3)
    dropped = np.flatnonzero(found.kind == NEAR)
    assert len(dropped) > 30
    for row in dropped.tolist():
        assert found.of[row] < row
        assert index(texts[row], texts[found.of[row]]) >= 0.8


def test_rows_that_are_kept_are_not_near_each_other_but_for_the_recall_that_is_promised() -> None:
    texts = families(40)
    found = run(texts, NEAR_80)
    kept = np.flatnonzero(found.kind == DISTINCT).tolist()
    missed = [(a, b) for i, a in enumerate(kept) for b in kept[:i] if index(texts[a], texts[b]) >= 0.8]
    # About 80 rows are near another; each is missed with a probability of at most 2%.
    assert len(missed) <= 4
    # The first of all that are connected by nearness is always kept.
    root = list(range(len(texts)))
    for row, text in enumerate(texts):
        for other in range(row):
            if index(text, texts[other]) >= 0.8:
                a, b = sorted((root[row], root[other]))
                root = [a if one == b else one for one in root]
    assert all(found.kind[first] == DISTINCT for first in set(root))


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_the_pairs_that_they_promise_and_verification_lets_no_other_through(threshold: float) -> None:
    near = Near(threshold=threshold)
    assert near.recall(threshold) >= minhash.RECALL
    texts, expected = [], []
    for size in [0, 1, 2, 3, 5, 8, 12, 20] * 25:
        words = sentence(60)
        texts += [" ".join(words), changed(words, SEEDED.choice(60, size, replace=False).tolist())]
        expected.append(index(*texts[-2:]) >= threshold)
    same = run(texts, near).kind[1::2] != DISTINCT
    assert not (same & ~np.array(expected)).any()
    assert (~same & np.array(expected)).sum() <= 1 + 0.04 * sum(expected)


TEXT = st.text(st.sampled_from("ab cé数 \n\U0001f600.")) | st.sampled_from(["one two", "a b c d", "", "x" * 70])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=8), st.integers(1, 4))
def test_signatures_of_rows_are_those_of_their_texts(rows: list[tuple[str, str]], size: int) -> None:
    near = Near(shingle_words=size)
    prompts, answers = [prompt for prompt, _ in rows], [answer for _, answer in rows]
    whole, asked = duplicates.row_signatures(prompts, answers, near, apart=answers)
    joined = [f"{prompt}\n{answer}" for prompt, answer in rows]
    assert (whole == duplicates.signatures(joined, near, apart=answers)).all()
    assert (asked == duplicates.signatures(prompts, near)).all()
    for exact, texts in zip(duplicates.row_signatures(prompts, answers, None), (joined, prompts), strict=True):
        assert (exact == duplicates.signatures(texts, None)).all()


@settings(deadline=None)
@given(st.text() | st.text(st.sampled_from("aB \t\n\u00a0\u3000\u2028\u200bß ")))
def test_normalised_text_is_as_it_is_said_to_be(text: str) -> None:
    assert minhash.normalised(text) == plain(text)


def test_minima_agree_as_often_as_the_sets_overlap() -> None:
    """Broder 1997: the probability is the Jaccard index; with 126 minima of 40 pairs its mean is within 0.02."""
    for size in (1, 4, 10):
        pairs = []
        for _ in range(40):
            words = sentence(50)
            pairs.append((" ".join(words), changed(words, SEEDED.choice(50, size, replace=False).tolist())))
        left, right = (minhash.minima(*minhash.shingles([pair[i] for pair in pairs], 3), NEAR_80) for i in range(2))
        assert abs((left == right).mean() - np.mean([index(*pair) for pair in pairs])) < 0.02


def test_minima_do_not_depend_on_the_company_or_on_the_length_of_a_text() -> None:
    """Long texts take another way through the computation than short ones."""
    texts = [" ".join(sentence(count)) for count in (1, 2, 3, 40, 300, 5000)] + [""]
    together = minhash.minima(*minhash.shingles(texts, 3), NEAR_80)
    for row, text in enumerate(texts):
        hashes, _ = minhash.shingles([text], 3)
        a, b = (column.astype(np.uint64) for column in NEAR_80.permutation)
        brute = ((hashes[:, None] >> np.uint64(32)) * a + b) % np.uint64(2**32)
        assert together[row].tolist() == brute.min(axis=0).tolist()


def test_short_texts_are_near_only_when_they_are_equal_word_by_word() -> None:
    found = run(["What is 2 + 3 ?", "What is 2 + 4 ?", "yes", "yes!", "no no", "no"], NEAR_80)
    assert found.kind.tolist() == [DISTINCT] * 6


def test_chinese_without_spaces_is_compared_by_characters() -> None:
    text = "小明有三个苹果，他的妈妈又给了他五个苹果，后来他把两个苹果送给了同学，请问小明现在还有几个苹果？"
    found = run([text, text.replace("小明有", "小红有"), "完全不同的一个题目，与上面没有关系。"], NEAR_80)
    assert found.kind.tolist() == [DISTINCT, NEAR, DISTINCT]


def test_rows_told_apart_are_never_near_but_still_exact_duplicates() -> None:
    words = sentence(80)
    texts = [" ".join(words), changed(words, [3]), " ".join(words), changed(words, [40])]
    found = run(texts, NEAR_80, apart=["72", "72", "73", "74"])
    assert found.kind.tolist() == [DISTINCT, NEAR, EXACT, DISTINCT]


def test_a_huge_word_and_a_huge_text_cost_no_more_than_their_bytes() -> None:
    huge = "".join(word for word in sentence(100_000))
    words = " ".join(sentence(100_000))
    found = run([huge, huge + "y", words, words + " end"], NEAR_80)
    assert found.kind.tolist() == [DISTINCT, NEAR, DISTINCT, NEAR]


def test_nothing_depends_on_buckets_chunks_or_files(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = families(30) + ["same"] * 5
    whole = run(texts, NEAR_80)
    monkeypatch.setattr(duplicates, "BUCKET_ROWS", 20)
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", 7)
    cut = run(texts, NEAR_80, parts=5)
    assert (cut.kind == whole.kind).all()
    assert (cut.of == whole.of).all()


def test_rows_made_from_one_template_are_not_all_compared_with_all() -> None:
    """2,000 rows of 80 common words and one of their own: each is compared with the first, and dropped."""
    common = sentence(80)
    texts = [" ".join([*common, f"own{i}"]) for i in range(2000)]
    asked: list[int] = []

    def give(rows: np.ndarray) -> list[str]:
        asked.extend(rows.tolist())
        return [texts[i] for i in rows]

    with TemporaryDirectory() as name:
        file = Path(name) / "records"
        duplicates.signatures(texts, NEAR_80).tofile(file)
        found = duplicates.find([file], Path(name), NEAR_80, give)
    assert (found.kind[1:] == NEAR).all()
    assert len(asked) < 3 * len(texts)


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 rows in 16 MB of records, one in ten an exact duplicate, one in ten agreeing in a band."""
    monkeypatch.setattr(duplicates, "BUCKET_ROWS", 1 << 13)
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", 1 << 11)
    rows, numbers = 100_000, np.random.Generator(np.random.PCG64(1))
    records = np.zeros(rows, duplicates.record(NEAR_80))
    for name in ("exact", "bands"):
        records[name] = numbers.integers(0, 2**64, records[name].shape, dtype=np.uint64)
    records["exact"][::10] = records["exact"][1::10]
    records["bands"][2::10, 4] = records["bands"][3::10, 4]
    records.tofile(tmp_path / "records")
    del records
    words = [f"word{i}" for i in range(20)]
    tracemalloc.start()
    try:
        found = duplicates.find(
            [tmp_path / "records"], tmp_path, NEAR_80, lambda some: [f"{' '.join(words)} {row}" for row in some]
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.kind == EXACT).sum() == rows / 10
    assert (found.kind == NEAR).sum() == rows / 10
    assert peak < 6 << 20
