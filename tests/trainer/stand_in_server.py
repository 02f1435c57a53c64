"""A stand-in for a vLLM server: its HTTP dialect in front of a small transformers model, on loopback, in a thread.

It really samples from the model that it was told to load, so its log-probabilities are real. It computes each token
from the whole text, without a cache, one request at a time.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

Reply = tuple[int, Any]
# What a test does to a request: (path, body) → a reply in place of the server's, or None to let it answer.
Fault = Callable[[str, dict[str, Any]], Reply | None]


class StandIn:
    """A running server; `fault` and `spoil` (which changes a completion's choice) may be set at any time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.loaded: list[str] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.fault: Fault | None = None
        self.spoil: Callable[[dict[str, Any]], Any] | None = None
        self.lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "served"}]})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null") or {}
                self.answer(*stand_in.reply(self.path, body))

            def answer(self, status: int, value: Any) -> None:
                body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        with self.lock:
            self.requests.append((path, body))
            if self.fault is not None and (faulty := self.fault(path, body)) is not None:
                return faulty
            if path == "/v1/completions":
                choice = self.complete(body)
                return 200, {"choices": [choice]}
            if path == "/collective_rpc":
                return self.reload(Path(body["kwargs"]["weights_path"]))
            return (200, {}) if path == "/reset_prefix_cache" else (404, {"detail": "Not Found"})

    def reload(self, folder: Path) -> Reply:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.loaded.append(str(folder))
        return 200, {"results": [None]}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(body["seed"] or 0)
        prompt, written, logps, reason = body["prompt"], [], [], "length"
        while len(written) < body["max_tokens"]:
            with torch.no_grad():
                logits_V = self.model(torch.tensor([prompt + written])).logits[0, -1]
            logps_V = processed_logps(logits_V, body["temperature"], body["top_k"], body["top_p"])
            token = int(
                torch.multinomial(logps_V.exp(), 1, generator=draw) if body["temperature"] else logps_V.argmax()
            )
            written.append(token)
            logps.append(float(logps_V[token]))
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        choice = {
            "index": 0,
            "finish_reason": reason,
            "prompt_token_ids": prompt,
            "token_ids": written,
            "logprobs": {"tokens": [f"token_id:{token}" for token in written], "token_logprobs": logps},
        }
        return choice if self.spoil is None else self.spoil(choice)


def processed_logps(logits_V: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Log-probabilities after temperature, top_k and top_p, as vLLM's processed_logprobs are, in plain Python."""
    falling = sorted(
        ((value / (temperature or 1), i) for i, value in enumerate(logits_V.double().tolist())), reverse=True
    )
    falling = falling[:top_k] if top_k > 0 else falling
    weights = [math.exp(value) for value, _ in falling]
    reached, kept = 0.0, {}
    for weight, (_, i) in zip(weights, falling, strict=True):
        if reached >= top_p * sum(weights):
            break
        kept[i] = weight
        reached += weight
    result_V = torch.full((len(logits_V),), -math.inf, dtype=torch.float64)
    for i, weight in kept.items():
        result_V[i] = math.log(weight / reached)
    return result_V
