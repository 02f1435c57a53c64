"""Rollouts from a server: a stand-in with vLLM's dialect that samples from the weights that it was handed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB, batch_of, hf_model, policy_of
from runs import Run
from stand_in_server import StandIn

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import hf
from nemotron_launch.trainer.batch import Group
from nemotron_launch.trainer.hand_over import write_weights
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Sampling
from nemotron_launch.trainer.server_generation import Limits, ServerGenerator

PROMPTS = [np.arange(2, 2 + n) for n in (3, 7)]
STOPS = tuple(range(0, VOCAB, 6))
LIMITS = Limits(concurrency=4, timeout=20.0, reload_timeout=20.0, retries=2, first_pause=0.01)


@pytest.fixture(scope="module")
def policy(layout) -> Policy:
    return policy_of(hf_model("llama", num_hidden_layers=1), layout)


@pytest.fixture
def server() -> Iterator[StandIn]:
    """It starts with other weights than the policy's."""
    server = StandIn(hf_model("llama", num_hidden_layers=1, seed=9))
    yield server
    server.close()


@pytest.fixture
def generator(policy, server, tmp_path) -> Iterator[ServerGenerator]:
    generator = ServerGenerator(policy, server.address, tmp_path / "hand over", limits=LIMITS)
    yield generator
    generator.close()


def probability_error(policy: Policy, prompts: list[np.ndarray], groups: list[Any], sampling: Sampling) -> float:
    """NeMo-RL's token_mult_prob_error: the mean of exp |log-probability recorded - the trainer's|."""
    errors = []
    for prompt, group in zip(prompts, groups, strict=True):
        for one in group:
            batch = batch_of([Group(len(prompt), (np.concatenate([prompt, one.ids]),))])
            own = policy.logps([batch], sampling)[0][0, len(prompt) :].numpy()
            errors.append(np.exp(np.abs(own - one.logps)))
    return float(np.concatenate(errors).mean())


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 30, "top_p": 0.8}, {"temperature": 0.0}], ids=str
)
def test_what_a_server_samples_has_the_trainers_log_probabilities(policy, generator, options):
    sampling = Sampling(8, stop_ids=STOPS, **options)
    groups = generator.generate(PROMPTS, sampling, samples=3, seed=1)
    assert [len(group) for group in groups] == [3, 3]
    assert probability_error(policy, PROMPTS, groups, sampling) == pytest.approx(1, abs=1e-4)
    for group in groups:
        for one in group:
            assert one.stopped == (one.ids[-1] in STOPS)
            assert one.stopped or len(one.ids) == 8


def test_a_refresh_brings_new_weights_and_without_one_the_error_shows(policy, server, generator):
    sampling = Sampling(8)
    generator.generate(PROMPTS, sampling, samples=2)
    before = policy.weights()
    try:
        with torch.no_grad():
            for value in policy.gpt.parameters():
                value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
        stale = generator.generate(PROMPTS, sampling, samples=2)
        assert probability_error(policy, PROMPTS, stale, sampling) > 1.1
        generator.refresh()
        fresh = generator.generate(PROMPTS, sampling, samples=2)
        assert probability_error(policy, PROMPTS, fresh, sampling) == pytest.approx(1, abs=1e-4)
    finally:
        policy.set_weights(before)
    folder = Path(server.loaded[-1])
    assert len(server.loaded) == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # the one before is gone


def test_samples_depend_on_seed_step_prompt_and_sample_alone(policy, generator):
    def ids(*places: int, **options: Any) -> list[list[int]]:
        prompts = [PROMPTS[i] for i in places]
        groups = generator.generate(prompts, Sampling(8), prompt_keys=[10 + i for i in places], **options)
        return [one.ids.tolist() for group in groups for one in group]

    both = ids(0, 1, samples=3, seed=1, step=4)
    assert len({tuple(one) for one in both}) == 6
    assert [*ids(0, samples=3, seed=1, step=4), *ids(1, samples=3, seed=1, step=4)] == both
    assert ids(1, 0, samples=2, seed=1, step=4) == [*both[3:5], *both[:2]]
    assert not set(map(tuple, ids(0, 1, samples=3, seed=1, step=5))) & set(map(tuple, both))
    assert ids(samples=3) == []  # a data-parallel rank may have none


def test_prompt_and_answer_fill_no_more_than_the_longest_sequence(policy, server, tmp_path):
    generator = ServerGenerator(policy, server.address, tmp_path / "weights", max_length=7, limits=LIMITS)
    groups = generator.generate(PROMPTS, Sampling(8), samples=2)
    assert [len(one.ids) for group in groups for one in group] == [4, 4, 0, 0]
    generator.close()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("fault", [(503, "busy"), (500, {"error": {"message": "out of luck"}}), (200, "{half")])
def test_what_passes_is_asked_again(generator, server, fault):
    calm = generator.generate(PROMPTS, Sampling(4), samples=2)
    left = [2]

    def twice(path: str, body: dict[str, Any]) -> Any:
        left[0] -= 1
        return fault if left[0] >= 0 else None

    server.fault = twice
    again = generator.generate(PROMPTS, Sampling(4), samples=2)
    assert [one.ids.tolist() for group in again for one in group] == [
        one.ids.tolist() for group in calm for one in group
    ]


def test_a_request_that_the_server_gives_up_is_asked_again(generator, server):
    spoiled = [{"finish_reason": "abort"}]
    server.spoil = lambda choice: {**choice, **(spoiled.pop() if spoiled else {})}
    assert len(generator.generate(PROMPTS[:1], Sampling(4))[0][0].ids) == 4


def test_a_server_that_stays_away_ends_the_run_with_its_address(generator, server):
    generator.refresh()
    server.fault = lambda path, body: (503, {"error": {"message": "no GPU left"}})
    with pytest.raises(UserError, match="does not answer /v1/completions: 503 .*no GPU left") as caught:
        generator.generate(PROMPTS, Sampling(4), samples=50)
    assert server.address in str(caught.value)
    assert caught.value.exit_code == 1
    assert len([path for path, _ in server.requests if path == "/v1/completions"]) < 100  # nobody else tries as often
    server.close()
    with pytest.raises(UserError, match="does not answer"):
        generator.generate(PROMPTS, Sampling(4))


def test_a_server_that_hangs_is_not_waited_for_for_ever(policy, server, tmp_path):
    limits = Limits(concurrency=2, timeout=0.2, retries=1, first_pause=0.01)
    generator = ServerGenerator(policy, server.address, tmp_path / "weights", limits=limits)
    generator.refresh()
    server.fault = lambda path, body: time.sleep(0.5)
    with pytest.raises(UserError, match="no answer within 0.2 s"):
        generator.generate(PROMPTS[:1], Sampling(4))
    generator.close()


def test_a_refused_request_is_not_repeated(generator, server):
    generator.refresh()
    server.fault = lambda path, body: (400, {"error": {"message": "max_tokens is too large"}})
    with pytest.raises(UserError, match="400 Bad Request: max_tokens is too large"):
        generator.generate(PROMPTS[:1], Sampling(4))
    assert len([path for path, _ in server.requests if path == "/v1/completions"]) == 1


def test_a_server_that_cannot_load_weights_says_how_it_must_be_started(generator, server):
    server.fault = lambda path, body: (404, {"detail": "Not Found"}) if path == "/collective_rpc" else None
    with pytest.raises(UserError, match="does not answer /collective_rpc: 404") as caught:
        generator.generate(PROMPTS, Sampling(4))
    assert "VLLM_SERVER_DEV_MODE=1" in (caught.value.hint or "")


def test_a_server_that_is_not_there_is_reported_before_the_first_rollout(policy, tmp_path):
    with pytest.raises(UserError, match=r"the server at http://127.0.0.1:9 is not ready"):
        ServerGenerator(policy, "http://127.0.0.1:9", tmp_path)


def without(choice: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in choice.items() if name not in names}


SPOILED = {
    "missing log-probabilities": lambda c: without(c, "logprobs"),
    "no token ids": lambda c: without(c, "token_ids") | {"logprobs": c["logprobs"] | {"tokens": ["a"] * 4}},
    "token ids that differ": lambda c: c | {"token_ids": [token + 1 for token in c["token_ids"]]},
    "a prompt other than the one": lambda c: c | {"prompt_token_ids": [1, *c["prompt_token_ids"]]},
    "3 log-probabilities for 4 tokens": lambda c: c | {"logprobs": c["logprobs"] | {"token_logprobs": [-1.0] * 3}},
    "a token outside": lambda c: c | {"token_ids": [9999] * 4, "logprobs": c["logprobs"] | {"tokens": []}},
    "lacks its stop token": lambda c: c | {"finish_reason": "stop"},
    "ended for no reason": lambda c: (
        c | {"token_ids": c["token_ids"][:2], "logprobs": {"tokens": [], "token_logprobs": [-1.0, -1.0]}}
    ),
    "something else than a completion": lambda c: "text",
}


@pytest.mark.parametrize("said", SPOILED)
def test_nothing_is_trained_on_that_may_not_be_what_was_sampled(generator, server, said):
    server.spoil = SPOILED[said]
    with pytest.raises(UserError, match=said) as caught:
        generator.generate(PROMPTS[:1], Sampling(4))
    assert caught.value.where == "policy.generation.server"


def test_ids_may_come_with_the_log_probabilities_alone(generator, server):
    """As from a vLLM before 0.10.2."""
    whole = generator.generate(PROMPTS[:1], Sampling(4))
    server.spoil = lambda choice: without(choice, "token_ids", "prompt_token_ids")
    assert generator.generate(PROMPTS[:1], Sampling(4))[0][0].ids.tolist() == whole[0][0].ids.tolist()


def test_weights_in_several_files_are_those_of_the_export(policy, tmp_path):
    """Bit for bit, and loadable by transformers; a folder appears when it is whole."""
    from safetensors.torch import load_file

    write_weights(policy, tmp_path / "export")
    write_weights(policy, tmp_path / "weights", max_file_bytes=100_000)
    expected = load_file(tmp_path / "export" / "model.safetensors")
    index = json.loads((tmp_path / "weights" / hf.INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 2
    found = {name: load_file(tmp_path / "weights" / place)[name] for name, place in index.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "weights"]


def test_a_disk_that_takes_no_weights_is_reported(policy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_weights(policy, tmp_path / "file" / "weights")


@pytest.mark.slow
def test_a_run_trains_on_what_a_server_samples(server, tmp_path):
    """Two steps of rl/nemo_rl/rlvr on two tensor-parallel ranks; the server starts with another model than theirs."""
    run = Run("grpo", tmp_path, procs=2).with_(
        policy__generation__backend="vllm",
        policy__generation__server=server.address,
        policy__megatron_cfg__tensor_model_parallel_size=2,
        policy__train_global_batch_size=32,
        policy__megatron_cfg__optimizer__lr=1e-2,
        grpo__max_num_steps=2,
        grpo__val_period=0,
        grpo__val_at_start=False,
        grpo__val_at_end=False,
        checkpointing__pretrained_checkpoint__path=None,
        checkpointing__enabled=False,
    )
    finished = run.go()
    assert finished.code == 0, finished.said
    lines = [line for step, line in run.numbers().items() if step]
    assert [line["train/token_mult_prob_error"] for line in lines] == pytest.approx([1, 1], abs=1e-4)
    assert lines[0]["train/grad_norm"] > 0
    asked = [body for path, body in server.requests if path == "/v1/completions"]
    assert len(asked) == 2 * 8 * 4
    assert len({body["seed"] for body in asked}) == len(asked)
    assert len(server.loaded) == 2
    assert not (run.out / "rollout_weights").exists()
