"""Sampling: against scoring and transformers, against itself in other batches, and its random numbers.

Tensor and pipeline parallel generation is compared in test_layouts.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB, batch_of, hf_model, policy_of

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.batch import Group
from nemotron_launch.trainer.generation import MegatronGenerator, sample_states, uniform
from nemotron_launch.trainer.megatron.decode import Decoder
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Completion, Sampling, answer_text

PROMPTS = [np.arange(2, 2 + n) for n in (3, 9, 1, 6, 6)]
NEVER = [VOCAB]  # an id that no policy writes
OFTEN = list(range(0, VOCAB, 6))  # a sixth of the vocabulary: sequences end after six tokens or so


@pytest.fixture(scope="module")
def model():
    return hf_model("qwen3", tied=True)


@pytest.fixture(scope="module")
def policy(layout, model) -> Policy:
    return policy_of(model, layout)


def generate(policy: Policy, prompts: Sequence[np.ndarray], **options: Any) -> list[Completion]:
    """Completions of all prompts in one list; options of Sampling, of the engine and of its `generate`."""
    engine = {name: options.pop(name) for name in ("tokenizer", "batch_size", "max_length") if name in options}
    calls = {name: options.pop(name) for name in ("samples", "seed", "step", "prompt_keys") if name in options}
    generator = MegatronGenerator(policy, **engine)
    return [one for group in generator.generate(prompts, Sampling(**options), **calls) for one in group]


def texts(completions: Sequence[Completion]) -> list[list[int]]:
    return [done.ids.tolist() for done in completions]


def scored(policy: Policy, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Log-probabilities of the answer's tokens in one pass over the whole sequence, no cache."""
    batch = batch_of([Group(len(prompt), (np.concatenate([prompt, answer]),))])
    return policy.logps([batch])[0][0, len(prompt) :].numpy()


def next_logps(policy: Policy, text: np.ndarray) -> np.ndarray:
    """Log-probability of every token of the vocabulary behind a text, each scored as an answer of its own."""
    group = Group(len(text), tuple(np.append(text, token) for token in range(VOCAB)))
    return policy.logps([batch_of([group])])[0][:, 0].numpy()


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_limit(freedom: int) -> float:
    """What one fixed seed in 10,000 exceeds (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def test_greedy_is_the_likeliest_token_of_a_full_recomputation(policy):
    done = generate(policy, PROMPTS[:3], max_new_tokens=8, stop_ids=NEVER, temperature=0)
    for prompt, one in zip(PROMPTS, done, strict=False):
        text = prompt
        for token, logp in zip(one.ids, one.logps, strict=True):
            everything = next_logps(policy, text)
            assert token == everything.argmax()
            assert logp == pytest.approx(everything.max(), abs=1e-4)
            text = np.append(text, token)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_is_what_transformers_generates(layout, family):
    model = hf_model(family, seed=3)
    policy = policy_of(model, layout)
    for prompt, done in zip(
        PROMPTS, generate(policy, PROMPTS, max_new_tokens=20, stop_ids=[1], temperature=0), strict=True
    ):
        ids = torch.as_tensor(prompt)[None]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert done.ids.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_does_not_depend_on_its_batch(policy, temperature):
    """Prompts of five lengths together, and each by itself under its number."""
    options = {"max_new_tokens": 16, "stop_ids": OFTEN, "temperature": temperature, "seed": 5}
    together = generate(policy, PROMPTS, prompt_keys=range(10, 15), **options)
    assert len({len(done.ids) for done in together}) > 1
    for i, (prompt, done) in enumerate(zip(PROMPTS, together, strict=True)):
        alone = generate(policy, [prompt], prompt_keys=[10 + i], **options)[0]
        assert alone.ids.tolist() == done.ids.tolist()
        assert alone.stopped == done.stopped
        np.testing.assert_allclose(alone.logps, done.logps, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_the_rollout_batch_size_changes_nothing(policy, batch_size):
    """Less than the samples of one prompt, those of some prompts, more than all."""
    options = {"max_new_tokens": 12, "stop_ids": OFTEN, "seed": 2, "samples": 3, "prompt_keys": [5, 9, 2, 7, 2**40]}
    together = generate(policy, PROMPTS, **options)
    parts = generate(policy, PROMPTS, batch_size=batch_size, **options)
    assert texts(parts) == texts(together)
    assert len({tuple(text) for text in texts(together)}) > 12  # some end with their first token
    for one, other in zip(parts, together, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def test_how_many_samples_are_asked_for_does_not_change_the_first(policy):
    options = {"max_new_tokens": 12, "stop_ids": OFTEN, "seed": 2}
    many = texts(generate(policy, PROMPTS[:2], samples=4, **options))
    assert texts(generate(policy, PROMPTS[:2], samples=2, **options)) == [*many[:2], *many[4:6]]


def test_a_seed_says_everything_and_another_says_something_else(policy):
    options = {"max_new_tokens": 12, "stop_ids": NEVER, "samples": 3}
    first = generate(policy, PROMPTS, seed=1, **options)
    assert texts(first) == texts(generate(policy, PROMPTS, seed=1, **options))
    for other in ({"seed": 2}, {"seed": 1, "step": 1}, {"seed": 1, "prompt_keys": range(10, 15)}):
        assert not set(map(tuple, texts(first))) & set(map(tuple, texts(generate(policy, PROMPTS, **other, **options))))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_log_probabilities_are_those_of_scoring(policy, temperature):
    options = {"max_new_tokens": 20, "stop_ids": OFTEN, "temperature": temperature}
    for prompt, done in zip(PROMPTS, generate(policy, PROMPTS, **options), strict=True):
        np.testing.assert_allclose(done.logps, scored(policy, prompt, done.ids), atol=1e-4)


def test_long_answers_that_leave_one_by_one_are_scored_alike(policy):
    """The cache grows twice, and shrinks whenever enough have ended; prompts that nobody continues leave too."""
    options = {"max_new_tokens": 100, "stop_ids": [3, 7, 50, 120, 200], "samples": 6, "seed": 2}
    done = generate(policy, PROMPTS, **options)
    lengths = sorted(len(one.ids) for one in done)
    assert lengths[0] < 20 and lengths[-1] == 100 and len(set(lengths)) > 15
    for place, one in enumerate(done):
        np.testing.assert_allclose(one.logps, scored(policy, PROMPTS[place // 6], one.ids), atol=1e-4)


def test_recorded_log_probabilities_are_of_the_temperature(policy, model):
    """Of log softmax(logits / 0.6), with transformers' logits."""
    prompt = PROMPTS[1]
    done = generate(policy, [prompt], max_new_tokens=10, stop_ids=NEVER, temperature=0.6)[0]
    with torch.no_grad():
        ids = torch.as_tensor(np.concatenate([prompt, done.ids]))
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double()
    expected = torch.log_softmax(logits / 0.6, -1).gather(1, torch.as_tensor(done.ids)[:, None])[:, 0]
    np.testing.assert_allclose(done.logps, expected, atol=1e-4)


FILTERS = [{"top_k": 5}, {"top_p": 0.3}, {"top_p": 0.5, "top_k": 20, "temperature": 1.7}, {"top_k": 1}]


def processed_logps(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a row of logits as vLLM's documentation has its processed_logprobs, in plain Python."""
    scaled = sorted(((value / temperature, i) for i, value in enumerate(logits.double().tolist())), reverse=True)
    if top_k:
        scaled = scaled[:top_k]
    weights = [math.exp(value) for value, _ in scaled]
    kept, reached = [], 0.0
    for weight, (_, i) in zip(weights, scaled, strict=True):
        if reached >= top_p * sum(weights):
            break
        kept.append((weight, i))
        reached += weight
    result = torch.full((len(logits),), -math.inf, dtype=torch.float64)
    for weight, i in kept:
        result[i] = math.log(weight / reached)
    return result


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_log_probabilities_are_of_the_distribution_that_top_p_and_top_k_leave(policy, model, options):
    """Recorded ones, and those that training computes, against transformers' logits and plain Python."""
    for prompt in PROMPTS[:3]:
        done = generate(policy, [prompt], max_new_tokens=10, stop_ids=NEVER, **options)[0]
        ids = np.concatenate([prompt, done.ids])
        with torch.no_grad():
            logits_SV = model(torch.as_tensor(ids)[None]).logits[0, len(prompt) - 1 : -1]
        expected = [processed_logps(row, **options)[token] for row, token in zip(logits_SV, done.ids, strict=True)]
        np.testing.assert_allclose(done.logps, expected, atol=1e-4)
        batch = batch_of([Group(len(prompt), (ids,))])
        trained = policy.logps([batch], Sampling(10, **options))[0][0, len(prompt) :]
        np.testing.assert_allclose(trained, done.logps, atol=1e-4)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_samples_are_drawn_from_the_filtered_distribution(policy, model, options):
    prompt = PROMPTS[3]
    with torch.no_grad():
        logits = model(torch.as_tensor(prompt)[None]).logits[0, -1]
    expected = 20_000 * processed_logps(logits, **options).exp().numpy()
    done = generate(policy, [prompt], max_new_tokens=1, stop_ids=NEVER, samples=20_000, seed=7, **options)
    counts = np.bincount([int(one.ids[0]) for one in done], minlength=VOCAB)
    assert not counts[expected == 0].any()
    often = expected >= 5
    assert chi_square(counts[often], expected[often]) < chi_square_limit(max(int(often.sum()) - 1, 1))


def test_an_answer_ends_where_prompt_and_answer_fill_the_longest_sequence(policy):
    done = generate(policy, PROMPTS, max_new_tokens=6, stop_ids=NEVER, max_length=9, samples=2)
    assert [len(one.ids) for one in done] == [6, 6, 0, 0, 6, 6, 3, 3, 3, 3]
    assert not any(one.stopped for one in done)
    free = generate(policy, PROMPTS, max_new_tokens=6, stop_ids=NEVER, samples=2)
    assert texts(done) == [text[: len(one.ids)] for text, one in zip(texts(free), done, strict=True)]


def test_stop_tokens_end_a_text_and_stay_in_it(policy):
    done = generate(policy, PROMPTS, max_new_tokens=16, stop_ids=OFTEN, samples=8, seed=4)
    assert {one.stopped for one in done} == {True, False}
    for one in done:
        assert len(one.ids) == len(one.logps)
        assert not np.isin(one.ids[:-1], OFTEN).any()
        assert np.isin(one.ids[-1], OFTEN) == one.stopped
        assert one.stopped or len(one.ids) == 16


def test_stop_strings_end_a_text_with_the_token_that_completes_them(policy, byte_tokenizer):
    """Every answer is the free one up to there; a byte is a token, and "é" two."""
    options = {"max_new_tokens": 60, "stop_ids": (258,), "samples": 40, "tokenizer": byte_tokenizer, "top_k": 60}
    free = [byte_tokenizer.decode(one.ids) for one in generate(policy, PROMPTS[:2], **options)]
    pairs = Counter(text[i : i + 2] for text in free for i in range(len(text) - 1))
    pair = next(pair for pair, _ in pairs.most_common() if "\N{REPLACEMENT CHARACTER}" not in pair)
    stops = (pair, "é")
    done = generate(policy, PROMPTS[:2], stop_strings=stops, **options)
    sampling = Sampling(60, stop_ids=(258,), stop_strings=stops)
    assert sum(one.stopped for one in done) > 5
    for one, text in zip(done, free, strict=True):
        own = byte_tokenizer.decode(one.ids)
        assert text.startswith(own)
        assert one.stopped == (any(stop in text for stop in stops) or text.endswith("<eos>"))
        assert not any(stop in byte_tokenizer.decode(one.ids[:-1]) for stop in stops)
        answer = answer_text(byte_tokenizer.decode, one, sampling)
        assert answer == re.split("|".join(map(re.escape, (*stops, "<eos>"))), own)[0]


def test_finished_texts_leave_the_batch(policy, monkeypatch):
    """They cost less than as much again, where staying to the end would cost almost five times as much."""
    rows: list[int] = []
    step = Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self, hidden, *tables: rows.append(len(hidden)) or step(self, hidden, *tables)
    )
    done = generate(policy, PROMPTS, max_new_tokens=64, stop_ids=OFTEN, samples=40, seed=4)
    needed = sum(len(one.ids) - 1 for one in done)
    assert sum(rows) < 2 * needed
    assert len(rows) * len(done) > 4 * needed
    assert rows[-1] < 20


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_samples_are_drawn_from_the_policys_distribution(policy, temperature):
    """20,000 first tokens; those that are expected fewer than five times count as one."""
    prompt = PROMPTS[3]
    logps = torch.from_numpy(next_logps(policy, prompt)).double()
    done = generate(policy, [prompt], max_new_tokens=1, stop_ids=NEVER, samples=20_000, temperature=temperature, seed=7)
    counts = np.bincount([int(one.ids[0]) for one in done], minlength=VOCAB)
    expected = 20_000 * torch.softmax(logps / temperature, -1).numpy()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert chi_square(counts, expected) < chi_square_limit(len(counts) - 1)


def test_padding_of_the_vocabulary_is_never_drawn(layout):
    """A model of 300 rows of which 40 are padding; hot enough that these would come once in seven or eight draws."""
    policy = policy_of(hf_model("llama", vocab_size=300), layout)
    policy.architecture = dataclasses.replace(policy.architecture, vocab_size=260)
    for temperature in (0.0, 1.0, 50.0):
        done = generate(policy, PROMPTS, max_new_tokens=40, stop_ids=NEVER, samples=10, temperature=temperature, seed=1)
        assert max(int(one.ids.max()) for one in done) < 260
    assert any((one.ids >= 255).any() for one in done)
    one = generate(policy, PROMPTS[:1], max_new_tokens=10, stop_ids=NEVER, seed=1)[0]
    np.testing.assert_allclose(one.logps, scored(policy, PROMPTS[0], one.ids), atol=1e-4)


def test_a_policy_in_training_is_in_training_afterwards(policy):
    policy.gpt.train()
    generate(policy, PROMPTS[:1], max_new_tokens=2, stop_ids=NEVER)
    assert policy.gpt.training
    policy.gpt.eval()


def test_no_prompt_is_no_text_and_an_empty_prompt_is_refused(policy):
    assert generate(policy, [], max_new_tokens=4, stop_ids=NEVER) == []
    with pytest.raises(UserError, match="an empty prompt cannot be continued"):
        generate(policy, [PROMPTS[0], np.array([], np.int64)], max_new_tokens=4, stop_ids=NEVER)


# -- random numbers ----------------------------------------------------------------------------------------------------


def split_mix(*values: int) -> float:
    """SplitMix64 (Steele, Lea, Flood 2014, figure 17) in Python's integers, chained over the values."""
    state = 0
    for value in values:
        z = ((state ^ value) + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        state = z ^ (z >> 31)
    return (state >> 11) / 2**53


def drawn(seed: int, step: int, prompts: Sequence[int], place: int, samples: int = 1) -> torch.Tensor:
    return uniform(sample_states(seed, step, prompts, range(samples), torch.device("cpu")), place)


def test_random_numbers_are_split_mixs():
    """A generator of seed 0 gives 0xE220A8397B1DCDAF first, the value that its published implementations agree on."""
    assert split_mix(0) == (0xE220A8397B1DCDAF >> 11) / 2**53
    prompts = [0, 1, 12345, 2**40]
    for seed, step, place in ((0, 0, 0), (1, 3, 7), (2**31, 10**6, 4095)):
        expected = [split_mix(seed, step, prompt, sample, place) for prompt in prompts for sample in range(2)]
        assert drawn(seed, step, prompts, place, samples=2).tolist() == expected


@pytest.mark.parametrize("vary", ["prompt", "sample", "place", "step", "seed"])
def test_random_numbers_are_uniform_along_every_key(vary):
    """2^16 numbers in 64 bins, and neighbours (x, next x) in 16 × 16 squares."""
    count = 2**16
    if vary == "prompt":
        numbers = drawn(1, 0, range(count), 0).numpy()
    elif vary == "sample":
        numbers = drawn(1, 0, [3], 0, samples=count).numpy()
    elif vary == "place":
        numbers = np.concatenate([drawn(1, 0, range(16), place).numpy() for place in range(count // 16)])
        numbers = numbers.reshape(-1, 16).T.reshape(-1)  # one prompt's places side by side
    else:
        keys = ((1, key) if vary == "step" else (key, 1) for key in range(count // 16))
        numbers = np.concatenate([drawn(*key, range(16), 5).numpy() for key in keys])
        numbers = numbers.reshape(-1, 16).T.reshape(-1)
    assert 0 <= numbers.min() < numbers.max() < 1
    assert chi_square(np.histogram(numbers, 64, (0, 1))[0], count / 64) < chi_square_limit(63)
    squares = np.histogram2d(numbers[::2], numbers[1::2], 16, ((0, 1), (0, 1)))[0]
    assert chi_square(squares, count / 2 / 256) < chi_square_limit(255)


def test_no_two_keys_share_a_number():
    """As they would if keys were merely added or xored: 8^5 numbers, all different."""
    few = range(8)
    numbers = torch.stack([drawn(seed, step, few, place, 8) for seed in few for step in few for place in few])
    assert len(numbers.unique()) == numbers.numel() == 8**5
