"""Sampling: against scoring and transformers, against itself in other batches, and its random numbers.

Tensor and pipeline parallel generation is compared in test_layouts.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from models import VOCAB, batch_of, hf_model, policy_of

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.batch import Group
from nemotron_launch.trainer.generation import Completion, generate, uniform
from nemotron_launch.trainer.policy import Policy

PROMPTS = [np.arange(2, 2 + n) for n in (3, 9, 1, 6, 6)]
NEVER = [VOCAB]  # an id that no policy writes
OFTEN = list(range(0, VOCAB, 6))  # a sixth of the vocabulary: sequences end after six tokens or so


@pytest.fixture(scope="module")
def model():
    return hf_model("qwen3", tied=True)


@pytest.fixture(scope="module")
def policy(layout, model) -> Policy:
    return policy_of(model, layout)


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
    together = generate(policy, PROMPTS, first_key=10, **options)
    assert len({len(done.ids) for done in together}) > 1
    for i, (prompt, done) in enumerate(zip(PROMPTS, together, strict=True)):
        alone = generate(policy, [prompt], first_key=10 + i, **options)[0]
        assert alone.ids.tolist() == done.ids.tolist()
        assert alone.stopped == done.stopped
        np.testing.assert_allclose(alone.logps, done.logps, atol=1e-4)


def test_samples_of_a_prompt_are_single_draws_under_their_numbers(policy):
    options = {"max_new_tokens": 12, "stop_ids": OFTEN, "seed": 2}
    together = generate(policy, PROMPTS[:2], samples=4, first_key=3, **options)
    alone = [generate(policy, [PROMPTS[i // 4]], first_key=3 + i, **options)[0] for i in range(8)]
    assert texts(together) == texts(alone)
    assert len({tuple(text) for text in texts(together)}) == 8


def test_a_seed_says_everything_and_another_says_something_else(policy):
    options = {"max_new_tokens": 12, "stop_ids": NEVER, "samples": 3}
    first = generate(policy, PROMPTS, seed=1, **options)
    assert texts(first) == texts(generate(policy, PROMPTS, seed=1, **options))
    assert not set(map(tuple, texts(first))) & set(map(tuple, texts(generate(policy, PROMPTS, seed=2, **options))))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_log_probabilities_are_those_of_scoring(policy, temperature):
    options = {"max_new_tokens": 20, "stop_ids": OFTEN, "temperature": temperature}
    for prompt, done in zip(PROMPTS, generate(policy, PROMPTS, **options), strict=True):
        np.testing.assert_allclose(done.logps, scored(policy, prompt, done.ids), atol=1e-4)


def test_recorded_log_probabilities_are_of_the_temperature(policy, model):
    """Of log softmax(logits / 0.6), with transformers' logits."""
    prompt = PROMPTS[1]
    done = generate(policy, [prompt], max_new_tokens=10, stop_ids=NEVER, temperature=0.6)[0]
    with torch.no_grad():
        ids = torch.as_tensor(np.concatenate([prompt, done.ids]))
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double()
    expected = torch.log_softmax(logits / 0.6, -1).gather(1, torch.as_tensor(done.ids)[:, None])[:, 0]
    np.testing.assert_allclose(done.logps, expected, atol=1e-4)


def test_stop_tokens_end_a_text_and_stay_in_it(policy):
    done = generate(policy, PROMPTS, max_new_tokens=16, stop_ids=OFTEN, samples=8, seed=4)
    assert {one.stopped for one in done} == {True, False}
    for one in done:
        assert len(one.ids) == len(one.logps)
        assert not np.isin(one.ids[:-1], OFTEN).any()
        assert np.isin(one.ids[-1], OFTEN) == one.stopped
        assert one.stopped or len(one.ids) == 16


def test_finished_texts_leave_the_batch(policy):
    """The first pass runs the prompts, pass n + 1 each sequence that has n tokens and goes on."""
    rows: list[int] = []
    hook = policy.gpt.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
    try:
        done = generate(policy, PROMPTS, max_new_tokens=16, stop_ids=OFTEN, samples=4, seed=4)
    finally:
        hook.remove()
    goes_on = [sum(len(one.ids) > n for one in done) for n in range(1, 16)]
    assert rows == [len(PROMPTS), *(count for count in goes_on if count)]
    assert rows[1] < 20


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


def test_random_numbers_are_split_mixs():
    """A generator of seed 0 gives 0xE220A8397B1DCDAF first, the value that its published implementations agree on."""
    assert split_mix(0) == (0xE220A8397B1DCDAF >> 11) / 2**53
    keys = torch.tensor([0, 1, 12345, 2**40])
    for seed, place in ((0, 0), (1, 7), (2**31, 4095)):
        expected = [split_mix(seed, key, place) for key in keys.tolist()]
        assert uniform(seed, keys, place).tolist() == expected


@pytest.mark.parametrize("vary", ["key", "place", "seed"])
def test_random_numbers_are_uniform_along_keys_places_and_seeds(vary):
    """2^16 numbers in 64 bins, and neighbours (x, next x) in 16 × 16 squares."""
    count = 2**16
    if vary == "key":
        drawn = uniform(1, torch.arange(count), 0).numpy()
    elif vary == "place":
        drawn = np.concatenate([uniform(1, torch.arange(16), place).numpy() for place in range(count // 16)])
        drawn = drawn.reshape(-1, 16).T.reshape(-1)  # one key's places side by side
    else:
        drawn = np.concatenate([uniform(seed, torch.tensor([3]), 5).numpy() for seed in range(count)])
    assert 0 <= drawn.min() < drawn.max() < 1
    assert chi_square(np.histogram(drawn, 64, (0, 1))[0], count / 64) < chi_square_limit(63)
    squares = np.histogram2d(drawn[::2], drawn[1::2], 16, ((0, 1), (0, 1)))[0]
    assert chi_square(squares, count / 2 / 256) < chi_square_limit(255)


def test_no_two_seeds_keys_or_places_share_a_number():
    """As they would if seed and key were merely added or xored: 32 × 64 × 32 numbers, all different."""
    keys = torch.arange(64)
    drawn = torch.stack([uniform(seed, keys, place) for seed in range(32) for place in range(32)])
    assert len(drawn.unique()) == drawn.numel()
