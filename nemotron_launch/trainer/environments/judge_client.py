"""Asks the judge's server: concurrency, retries, a budget, and a record of judgements that outlives the process."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import exit_codes
from nemotron_launch.trainer.servers import retry_after, server_address

KEY = "env.judge"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between tries
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Reply:
    """The judge's words, or why there are none."""

    text: str
    problem: str = ""
    seconds: float = 0.0


class JudgeClient:
    """One OpenAI-compatible server, asked from several threads; section: `env.judge`."""

    def __init__(self, section: Mapping[str, Any], *, cache: Path | None) -> None:
        self.section = section
        self.address = server_address(section["server"], where=f"{KEY}.server")
        self.http = httpx.Client(
            base_url=self.address,
            headers=_authorization(section["api_key_env"]),
            timeout=httpx.Timeout(section["timeout"], connect=10.0),
            limits=httpx.Limits(max_connections=section["concurrency"]),
            trust_env=False,  # a proxy for the hub is none for a server next door, and ~/.netrc has no say
        )
        self.cache = cache
        self.known = _read_cache(cache.parent) if cache else {}
        self.asked = 0
        self.lock = threading.Lock()

    def check_ready(self) -> None:
        """UserError where the server does not answer, or lacks the model."""
        model = self.section["model"]
        try:
            reply = self.http.get("/v1/models", timeout=30.0)
            reply.raise_for_status()
            served = [str(entry["id"]) for entry in reply.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the judge at {self.address} is not ready: {_plain(error)}",
                where=f"{KEY}.server",
                hint="see its log (logs/attempt-*/<service>-*.log); a service's start_timeout must cover its loading",
                exit_code=exit_codes.FAILED,
            ) from error
        if model not in served:
            raise UserError(
                f"the server at {self.address} has {', '.join(served) or 'no model'}, not {model}",
                where=f"{KEY}.model",
                hint="name the model as its server does",
            )

    def ask(self, prompt: str, number: int) -> Reply:
        """One judgement. number: which of several of the same prompt; each has its own seed, the same in every run."""
        section = self.section
        body: dict[str, Any] = {
            "model": section["model"],
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": section["max_output_tokens"],
            "temperature": section["temperature"],
            "top_p": section["top_p"],
        }
        digest = hashlib.sha256(json.dumps([body, number], sort_keys=True).encode())
        key, body["seed"] = digest.hexdigest(), int.from_bytes(digest.digest()[:4], "big") >> 1
        if key in self.known:
            return Reply(self.known[key])
        began = time.monotonic()
        problem = ""
        for attempt in range(section["retries"] + 1):
            self._count()
            pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            try:
                reply = self.http.post("/v1/chat/completions", json=body)
                if reply.status_code == 200:
                    text = str(reply.json()["choices"][0]["message"]["content"] or "")
                    self._keep(key, text)
                    return Reply(text, seconds=time.monotonic() - began)
                problem = f"{reply.status_code} {reply.reason_phrase}".strip()
                if reply.status_code not in _PASSING:
                    self._refused(reply)
                    break
                pause = max(pause, min(retry_after(reply), _LONGEST_PAUSE))
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = _plain(error)
            if attempt < section["retries"]:
                time.sleep(pause)
        return Reply("", problem=f"the judge at {self.address}: {problem}", seconds=time.monotonic() - began)

    def close(self) -> None:
        self.http.close()

    def _count(self) -> None:
        """The budget is the whole run's: what is kept of earlier attempts has been paid for."""
        with self.lock:
            most = self.section["max_requests"]
            if most is not None and self.asked + len(self.known) >= most:
                raise UserError(
                    f"the judge has been asked {most} times",
                    where=f"{KEY}.max_requests",
                    hint="raise it, and start the same command again: the run goes on from its last checkpoint",
                    exit_code=exit_codes.FAILED,
                )
            self.asked += 1

    def _refused(self, reply: httpx.Response) -> None:
        """What no other rollout would be spared either ends the run."""
        if reply.status_code in (401, 403):
            raise UserError(
                f"the judge at {self.address} refuses the key ({reply.status_code})",
                where=f"{KEY}.api_key_env",
                hint="name the environment variable that holds its key, and list it under the profile's secrets",
                exit_code=exit_codes.FAILED,
            )
        if reply.status_code == 404:
            raise UserError(
                f"the server at {self.address} has no chat completions of {self.section['model']} (404)",
                where=f"{KEY}.model",
                exit_code=exit_codes.FAILED,
            )

    def _keep(self, key: str, text: str) -> None:
        with self.lock:
            self.asked -= 1  # it counts among the known from here on
            self.known[key] = text
            if self.cache is None:
                return
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "text": text}) + "\n")


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise UserError(
            f"{variable} is not set",
            where=f"{KEY}.api_key_env",
            hint="list it under the profile's secrets, or set api_key_env to null for a server without a key",
        )
    return {"Authorization": f"Bearer {key}"}


def _read_cache(folder: Path) -> dict[str, str]:
    """All judgements that earlier attempts kept, of all processes; a line that a kill cut off is left out."""
    known: dict[str, str] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                known[entry["key"]] = entry["text"]
            except (ValueError, KeyError, TypeError):
                continue
    return known


def _plain(error: Exception) -> str:
    """An error in words, without the request's headers."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        return "no connection"
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code} {error.response.reason_phrase}".strip()
    return "its reply is none of an OpenAI-compatible server" if not isinstance(error, httpx.HTTPError) else str(error)
