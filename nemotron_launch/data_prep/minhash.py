"""Shingles, MinHash and band hashes of many texts at once, in numpy: what near duplicates are found by.

A text is the set of its shingles, runs of a few words. The Jaccard index of two sets is how much of their union they
share; the probability that the smallest value of a random permutation is the same in both is that index (Broder 1997,
"On the resemblance and containment of documents"). A signature of P such minima is cut into bands of r; two texts
that agree in all of at least one of b bands are candidates, which happens with probability 1 - (1 - J^r)^b (Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4). Candidates are then compared shingle by shingle, so a
band never decides alone.

Dimensions: N texts, W words, S shingles, P permutations, B bands.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

#: A word hash reads so many bytes; longer words count as several, so that one huge word costs no more than a text.
WORD_BYTES = 64

#: Least probability with which two texts exactly at the threshold become candidates.
RECALL = 0.98

_ROWS_AT_ONCE = 512
_LONG = 256
_BLOCK = 1024
_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], dtype=np.uint64)


@dataclass(frozen=True)
class Near:
    """How near duplicates are found.

    threshold: Jaccard index of word shingles from which two texts are near duplicates. shingle_words: words of a
    shingle; of a text with fewer words, all of them are its one shingle, so short texts are near only when equal word
    by word. permutations: at most so many minima are computed of each text. seed: of the permutations.
    """

    threshold: float = 0.8
    shingle_words: int = 3
    permutations: int = 128
    seed: int = 1

    @cached_property
    def banding(self) -> tuple[int, int]:
        """(bands, minima of a band): the most selective bands that find RECALL of the pairs at the threshold."""
        for rows in range(self.permutations, 1, -1):
            bands = self.permutations // rows
            if 1 - (1 - self.threshold**rows) ** bands >= RECALL:
                return bands, rows
        return self.permutations, 1

    def recall(self, jaccard: float) -> float:
        """Probability that a pair with this Jaccard index becomes a candidate."""
        bands, rows = self.banding
        return 1 - (1 - jaccard**rows) ** bands

    @cached_property
    def permutation(self) -> tuple[np.ndarray, np.ndarray]:
        """Factors (odd) and summands (uint32, P) of h -> a·h + b mod 2^32, each a permutation of 32-bit numbers."""
        bands, rows = self.banding
        numbers = np.random.Generator(np.random.PCG64(self.seed))
        draw = numbers.integers(0, 2**32, size=(2, bands * rows), dtype=np.uint32)
        return draw[0] | np.uint32(1), draw[1]


def normalised(text: str) -> str:
    """A text as duplicates are compared: Unicode NFKC, case folded, every run of whitespace one space, none around."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = text.casefold()
    if text.isprintable() and "  " not in text:  # of whitespace, only the space is printable
        return text.strip(" ")
    return " ".join(text.split())


def shingles(texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64, S) of the shingles of normalised texts, in order, and where each text's begin (int64, N + 1).

    A word is what stands between spaces; a character that UTF-8 writes in three or more bytes (Chinese, Japanese,
    Korean and others written without spaces) is a word of its own. Every text has at least one shingle.
    """
    words_W, begins = _words(texts)
    counts_N = np.diff(begins)
    shingles_N = np.maximum(counts_N - words + 1, 1)
    starts = np.concatenate([[0], np.cumsum(shingles_N)])
    if not len(texts):
        return np.zeros(0, np.uint64), starts
    # The word with which each shingle begins, and how many words its text has from there on.
    at_S = np.arange(starts[-1]) + np.repeat(begins[:-1] - starts[:-1], shingles_N)
    left_S = np.repeat(begins[1:], shingles_N) - at_S
    padded_W = np.concatenate([words_W, np.zeros(words, np.uint64)])
    hashes_S = np.zeros(len(at_S), np.uint64)
    for i in range(words):
        word = padded_W[at_S + i]
        if (short := left_S <= i).any():
            word = np.where(short, np.uint64(0), word)
        hashes_S = (hashes_S ^ word) * _ODD[i % len(_ODD)]
        hashes_S ^= hashes_S >> np.uint64(29)
    return _mixed(hashes_S), starts


def minima(hashes: np.ndarray, starts: np.ndarray, near: Near) -> np.ndarray:
    """MinHash of each text (uint32, N × P): the least of its shingles' hashes under each permutation."""
    a_P, b_P = near.permutation
    h_S = (hashes >> np.uint64(32)).astype(np.uint32)
    counts_N = np.diff(starts)
    least_NP = np.full((len(counts_N), len(a_P)), 0xFFFFFFFF, np.uint32)
    order = np.argsort(-counts_N, kind="stable")
    long = int(np.searchsorted(-counts_N[order], -_LONG, side="left"))
    for n in order[:long]:
        for begin in range(int(starts[n]), int(starts[n + 1]), _BLOCK):
            block = h_S[begin : min(begin + _BLOCK, int(starts[n + 1])), None] * a_P
            block += b_P
            np.minimum(least_NP[n], block.min(axis=0), out=least_NP[n])
    # Texts of like length side by side: one shingle of each at a time, all permutations at once.
    for first in range(long, len(order), _ROWS_AT_ONCE):
        rows = order[first : first + _ROWS_AT_ONCE]
        counts, begins = counts_N[rows], starts[rows]
        longer = np.searchsorted(-counts, -np.arange(counts[0]), side="left")
        least = np.full((len(rows), len(a_P)), 0xFFFFFFFF, np.uint32)
        scratch = np.empty_like(least)
        for i, n in enumerate(longer.tolist()):
            block = scratch[:n]
            np.multiply(h_S[begins[:n] + i, None], a_P, out=block)
            block += b_P
            np.minimum(least[:n], block, out=least[:n])
        least_NP[rows] = least
    return least_NP


def band_hashes(signatures: np.ndarray, near: Near) -> np.ndarray:
    """One hash (uint64, N × B) of each band of each signature."""
    bands, rows = near.banding
    split = signatures.reshape(len(signatures), bands, rows)
    hashes = np.zeros((len(signatures), bands), np.uint64)
    for i in range(rows):
        hashes = (hashes ^ split[:, :, i]) * _ODD[i % len(_ODD)]
        hashes ^= hashes >> np.uint64(29)
    return _mixed(hashes)


def jaccard(hashes: np.ndarray, starts: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Jaccard index (float64) of each pair of texts, left[i] with right[i], by their whole sets of shingles.

    Shingles are compared by 40 bits: of a million compared pairs of 1,000 shingles, one is off by one shingle.
    """
    result = np.empty(len(left), np.float64)
    for first in range(0, len(left), _BLOCK):
        pair = slice(first, first + _BLOCK)
        common = _distinct(hashes, starts, left[pair]) + _distinct(hashes, starts, right[pair])
        union = _distinct(hashes, starts, left[pair], right[pair])
        result[pair] = (common - union) / union
    return result


def _distinct(hashes: np.ndarray, starts: np.ndarray, *sides: np.ndarray) -> np.ndarray:
    """How many different shingles the texts of each pair hold together."""
    keys = []
    for side in sides:
        counts = starts[side + 1] - starts[side]
        ends = np.cumsum(counts)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts[side] - ends + counts, counts)
        pair = np.repeat(np.arange(len(side), dtype=np.uint64), counts)
        keys.append((pair << np.uint64(40)) | (hashes[at] >> np.uint64(24)))
    key = np.sort(np.concatenate(keys))
    new = np.ones(len(key), bool)
    new[1:] = key[1:] != key[:-1]
    return np.bincount((key[new] >> np.uint64(40)).astype(np.int64), minlength=len(sides[0]))


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64, W) of the words of normalised texts, and where each text's begin (int64, N + 1)."""
    joined = b"".join([text.encode("utf-8", "surrogatepass") + b"\n" for text in texts])
    data = np.frombuffer(joined + bytes(WORD_BYTES), np.uint8)
    text = data[: len(joined)]
    inside = text > 32
    before = np.empty_like(inside)
    before[:1], before[1:] = False, inside[:-1]
    first, last = inside & ~before, before & ~inside
    wide = np.flatnonzero(text >= 0xE0)
    if len(wide):  # such a character ends the word before it, and the one that it is
        after = wide + np.where(text[wide] >= 0xF0, 4, 3)
        last[wide] |= before[wide]
        last[after] = True
        first[wide] = True
        first[after] |= inside[after]
    starts_W, ends_W = np.flatnonzero(first), np.flatnonzero(last)
    sizes_W = ends_W - starts_W
    if len(sizes_W) and sizes_W.max() > WORD_BYTES:
        pieces = -(-sizes_W // WORD_BYTES)
        offset = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts_W = np.repeat(starts_W, pieces) + offset * WORD_BYTES
        sizes_W = np.minimum(np.repeat(ends_W, pieces) - starts_W, WORD_BYTES)
    eights = np.lib.stride_tricks.as_strided(data[:8].view("<u8"), (len(joined) + WORD_BYTES - 7,), (1,))
    hashes_W = np.zeros(len(starts_W), np.uint64)
    active = np.arange(len(starts_W))
    for offset in range(0, WORD_BYTES, 8):
        left = sizes_W[active] - offset
        value = eights[starts_W[active] + offset] & _FIRST_BYTES[np.minimum(left, 8)]
        mixed = (hashes_W[active] ^ value) * _ODD[0]
        hashes_W[active] = mixed ^ (mixed >> np.uint64(32))
        active = active[left > 8]
        if not len(active):
            break
    line_ends = np.flatnonzero(text == 10)
    return _mixed(hashes_W + sizes_W.astype(np.uint64)), np.concatenate([[0], np.searchsorted(starts_W, line_ends)])


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood 2014): every bit of the input reaches every bit of the hash."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)
