"""Rollouts from an OpenAI-compatible server: vLLM in a container, given the policy's weights after each step.

Prompts go as token ids, and the reply's ids and log-probabilities are taken as they are: nothing is ever encoded again.
What vLLM needs for that: `--logprobs-mode processed_logprobs` (log-probabilities of the very distribution sampled
from), and VLLM_SERVER_DEV_MODE=1 (the address that loads new weights; it also runs code, so the server must not be
reachable from outside). docs/grpo.md has the whole command.
"""

from __future__ import annotations

import math
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import torch.distributed as dist

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import exit_codes
from nemotron_launch.trainer.agreement import on_rank_0, together
from nemotron_launch.trainer.generation import sample_states
from nemotron_launch.trainer.hand_over import write_weights
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Completion, Sampling

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

KEY = "policy.generation.server"
# Answers that another try may better: busy, starting, behind a proxy.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Limits:
    """concurrency: requests at once of one replica. timeouts in seconds; retries of a request."""

    concurrency: int = 256
    timeout: float = 1800.0
    reload_timeout: float = 1800.0
    retries: int = 5
    first_pause: float = 0.5


class ServerGenerator:
    """A server as the engine. All ranks of the job make one, and call its methods at the same points.

    address: http://host:port. hand_over: a folder on a disk that the server sees under the same name; each refresh
    puts the weights into a new folder in it and removes the one before. max_length: as MegatronGenerator's.
    """

    def __init__(
        self,
        policy: Policy,
        address: str,
        hand_over: Path,
        *,
        max_length: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.policy = policy
        self.address = address
        self.hand_over = hand_over
        self.max_length = max_length
        self.limits = limits or Limits()
        self.fresh = False
        self.version = 0
        self.http = httpx.Client(
            base_url=address,
            timeout=httpx.Timeout(self.limits.timeout, connect=10.0),
            limits=httpx.Limits(max_connections=self.limits.concurrency),
            trust_env=False,  # a proxy for the hub is none for a server next door
        )
        self.model: str = on_rank_0(self._served_model)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        *,
        samples: int = 1,
        seed: int = 0,
        step: int = 0,
        prompt_keys: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, in prompt order; ranks of one replica get the same.

        The server draws with its own random numbers, from a seed of each (seed, step, prompt, sample). Raises
        UserError, on all ranks, where it cannot be asked or where its answer cannot be trained on.
        """
        if not self.fresh:
            self.refresh()
        keys = list(range(len(prompts)) if prompt_keys is None else prompt_keys)
        states = sample_states(seed, step, keys, range(samples), torch.device("cpu")).tolist()
        asks = parallel_state.get_tensor_model_parallel_rank() == self.policy.layout.pipeline_rank == 0

        def ask() -> list[Completion]:
            return self._ask_all(prompts, sampling, samples, states) if asks else []

        done = [together(ask)]
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            dist.broadcast_object_list(done, src=min(dist.get_process_group_ranks(group)), group=group)
        return [done[0][i * samples : (i + 1) * samples] for i in range(len(prompts))]

    def refresh(self) -> None:
        """Hand the policy's weights over, and have the server load them; it must have no requests meanwhile."""
        self.version += 1
        folder = self.hand_over / f"weights-{self.version}"
        on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))  # of an earlier attempt
        write_weights(self.policy, folder)

        def reload() -> None:
            # vLLM: the workers load the checkpoint in place; what is cached of prompts was computed with the old one.
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._post("/collective_rpc", body, timeout=self.limits.reload_timeout, hint=_NO_RELOAD)
            self._post("/reset_prefix_cache", None, timeout=self.limits.reload_timeout, hint=_NO_RELOAD)
            for old in self.hand_over.glob("weights-*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)

        on_rank_0(reload)
        self.fresh = True

    def close(self) -> None:
        """Leave the server; the weights that were handed over go. Waits for no other rank."""
        self.http.close()
        if self.policy.layout.rank == 0:
            shutil.rmtree(self.hand_over, ignore_errors=True)

    # -- asking ------------------------------------------------------------------------------------------------

    def _ask_all(
        self, prompts: Sequence[np.ndarray], sampling: Sampling, samples: int, states: Sequence[int]
    ) -> list[Completion]:
        given_up = threading.Event()

        def one(place: int) -> Completion:
            if given_up.is_set():
                return _NOTHING
            try:
                return self._ask(prompts[place // samples], sampling, states[place])
            except UserError:
                given_up.set()  # nobody else need try as often
                raise

        with ThreadPoolExecutor(self.limits.concurrency) as pool:
            return list(pool.map(one, range(len(prompts) * samples)))

    def _ask(self, prompt: np.ndarray, sampling: Sampling, state: int) -> Completion:
        room = sampling.max_new_tokens
        if self.max_length is not None:
            room = min(room, self.max_length - len(prompt))
        if room <= 0:
            return _NOTHING
        if not len(prompt):
            raise UserError("an empty prompt cannot be continued: there is no token to predict the first from")
        body = request_body(self.model, prompt, sampling, room=room, seed=state & (1 << 63) - 1)
        vocab = self.policy.architecture.vocab_size

        def read(reply: Any) -> Completion:
            return completion_of(reply, prompt, sampling, room=room, vocab_size=vocab)

        try:
            done: Completion = self._post("/v1/completions", body, timeout=self.limits.timeout, read=read)
        except _Unusable as error:
            raise UserError(
                f"the server at {self.address} answers with {error}",
                where=KEY,
                hint=error.hint,
                exit_code=exit_codes.FAILED,
            ) from error
        return done

    def _post(
        self,
        path: str,
        body: Any,
        *,
        timeout: float,
        hint: str | None = None,
        read: Callable[[Any], Any] | None = None,
    ) -> Any:
        """The reply as `read` takes it, after retries of what may pass."""
        problem = ""
        for attempt in range(self.limits.retries + 1):
            if attempt:
                time.sleep(min(self.limits.first_pause * 2 ** (attempt - 1), 30.0) * random.uniform(0.5, 1.0))
            try:
                reply = self.http.post(path, json=body, timeout=timeout)
                if reply.status_code == 200:
                    return read(reply.json()) if read else None
                problem = f"{reply.status_code} {reply.reason_phrase}".strip() + _said(reply)
                if reply.status_code not in _PASSING:
                    break
            except httpx.TimeoutException:
                problem = f"no answer within {timeout:g} s"
            except (httpx.HTTPError, ValueError) as error:
                problem = str(error) or type(error).__name__
            except _Aborted:
                problem = "the request was aborted"
        raise UserError(
            f"the server at {self.address} does not answer {path}: {problem}",
            where=KEY,
            hint=hint or "see its log (logs/attempt-*/<service>-*.log)",
            exit_code=exit_codes.FAILED,
        )

    def _served_model(self) -> str:
        try:
            reply = self.http.get("/v1/models", timeout=30.0)
            reply.raise_for_status()
            return str(reply.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"the server at {self.address} is not ready: {error or type(error).__name__}",
                where=KEY,
                hint="see its log (logs/attempt-*/<service>-*.log); a service's start_timeout must cover its loading",
                exit_code=exit_codes.FAILED,
            ) from error


_NOTHING = Completion(np.array([], np.int64), np.array([], np.float32), False)
_NO_RELOAD = "start vLLM with VLLM_SERVER_DEV_MODE=1; the folder of the weights must have the same name on its machine"


class _Unusable(Exception):
    """An answer on which nobody should train; asking again would not change it."""

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.hint = hint


class _Aborted(Exception):
    """The server gave a request up."""


def request_body(model: str, prompt: np.ndarray, sampling: Sampling, *, room: int, seed: int) -> dict[str, Any]:
    """One completion's request, in vLLM's dialect.

    Whatever the served model's generation config would add (penalties, min_p, its own stop tokens) is switched off.
    """
    return {
        "model": model,
        "prompt": prompt.tolist(),
        "n": 1,
        "max_tokens": room,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature else 1.0,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop": list(sampling.stop_strings),
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def completion_of(reply: Any, prompt: np.ndarray, sampling: Sampling, *, room: int, vocab_size: int) -> Completion:
    """The completion in a reply of /v1/completions. Raises _Unusable for one that says too little or another thing."""
    try:
        choice = reply["choices"][0]
        reason, logprobs = choice["finish_reason"], choice.get("logprobs")
        ids, sent = choice.get("token_ids"), choice.get("prompt_token_ids")
        values = None if logprobs is None else logprobs["token_logprobs"]
        named = [] if logprobs is None else logprobs["tokens"]
    except (KeyError, IndexError, TypeError) as error:
        raise _Unusable("something else than a completion", "it must be an OpenAI-compatible server") from error
    if reason == "abort":
        raise _Aborted
    if values is None or any(not isinstance(value, int | float) or not math.isfinite(value) for value in values):
        raise _Unusable("missing log-probabilities", "the request asks for them: logprobs=0 in vLLM's dialect")
    spelled = [_spelled_id(token) for token in named]
    if ids is None:
        ids = spelled
    elif any(one is not None and one != other for one, other in zip(spelled, ids, strict=False)):
        raise _Unusable("token ids that differ from those of its log-probabilities")
    if any(not isinstance(one, int) for one in ids):
        raise _Unusable(
            "no token ids",
            "the trainer must have the very ids that were sampled: vLLM has return_token_ids from 0.10.2",
        )
    if sent is not None and list(sent) != prompt.tolist():
        raise _Unusable("a prompt other than the one that was sent")
    if len(ids) != len(values):
        raise _Unusable(f"{len(values)} log-probabilities for {len(ids)} tokens")
    if not 0 < len(ids) <= room:
        raise _Unusable(f"{len(ids)} tokens where 1 to {room} were asked for")
    if not all(0 <= one < vocab_size for one in ids):
        raise _Unusable(f"a token outside the policy's vocabulary of {vocab_size}", "does it serve another model?")
    stopped = reason == "stop"
    if stopped and not sampling.stop_strings and ids[-1] not in sampling.stop_ids:
        raise _Unusable("a stopped text that lacks its stop token")
    if not stopped and len(ids) < room:
        raise _Unusable(f"a text of {len(ids)} tokens that ended for no reason (finish_reason {reason!r})")
    return Completion(np.array(ids, np.int64), np.array(values, np.float32), stopped)


def _spelled_id(token: Any) -> int | None:
    """The id in `token_id:123`, as vLLM spells tokens when asked."""
    digits = token.removeprefix("token_id:") if isinstance(token, str) and token.startswith("token_id:") else ""
    return int(digits) if digits.isdigit() else None


def _said(reply: httpx.Response) -> str:
    """The server's own words, at most a line of them."""
    try:
        body = reply.json()
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = reply.text
    line = text.strip().splitlines()[0][:200] if text.strip() else ""
    return f": {line}" if line else ""
