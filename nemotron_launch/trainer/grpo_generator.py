"""The engine that makes a run's rollouts, and how it samples, as `policy.generation` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemotron_launch.trainer.generation import MegatronGenerator
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Generator, Sampling
from nemotron_launch.trainer.server_generation import ServerGenerator
from nemotron_launch.trainer.servers import server_address
from nemotron_launch.trainer.setup import Session
from nemotron_launch.trainer.tokenizer import Tokenizer


def sampling_of(generation: Mapping[str, Any], tokenizer: Tokenizer) -> Sampling:
    """How training rollouts are sampled. generation: a config's `policy.generation`."""
    stops = generation["stop_token_ids"]
    return Sampling(
        max_new_tokens=generation["max_new_tokens"],
        temperature=generation["temperature"],
        top_p=generation["top_p"],
        top_k=generation["top_k"] or 0,
        stop_ids=tuple(tokenizer.stop_ids if stops is None else stops),
        stop_strings=tuple(generation["stop_strings"] or ()),
    )


def open_generator(session: Session, policy: Policy) -> Generator:
    """The engine of `policy.generation.backend`; close it in the end."""
    config = session.config["policy"]
    if config["generation"]["backend"] == "vllm":
        return ServerGenerator(
            policy,
            server_address(config["generation"]["server"], where="policy.generation.server"),
            session.output_dir / "rollout_weights",
            max_length=config["max_total_sequence_length"],
        )
    return MegatronGenerator(
        policy,
        session.tokenizer,
        batch_size=config["generation_batch_size"],
        max_length=config["max_total_sequence_length"],
    )
