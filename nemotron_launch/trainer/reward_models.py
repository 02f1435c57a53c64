"""Reward models: Hugging Face sequence-classification folders with one score a conversation; found, loaded, applied.

Legend: N conversations, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.checkpoints import is_complete, newest_complete
from nemotron_launch.trainer.data.messages import closed, opened, plain_text, render, rest_of
from nemotron_launch.trainer.tokenizer import Message, Tokenizer, load_tokenizer
from nemotron_launch.trainer.warm_start import model_folder

#: Where a step folder of rm/hf keeps its model.
HF_FOLDER = "hf"


def find(name: str, *, step_dir: Path | None, where: str) -> Path:
    """The Hugging Face folder that a config names: itself, a step_N of rm/hf, a folder of those (the newest), a hub id.

    Raises UserError where there is no such thing.
    """
    folder = model_folder(name, step_dir=step_dir, where=where)
    if (folder / "config.json").is_file():
        return folder
    step = folder if is_complete(folder) else newest_complete(folder)
    if step is None or not (step / HF_FOLDER / "config.json").is_file():
        raise UserError(
            f"{folder} is no reward model",
            where=where,
            hint="give a Hugging Face folder (config.json, model.safetensors), or a checkpoint of rm/hf",
        )
    return step / HF_FOLDER


class RewardModel:
    """A sequence-classification model with one score, and the tokenizer that belongs to it."""

    def __init__(self, model: Any, tokenizer: Tokenizer, device: torch.device, *, max_length: int) -> None:
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.max_length = max_length
        self.model.config.pad_token_id = tokenizer.pad_id  # transformers takes the last other token's score

    @staticmethod
    def load(section: Mapping[str, Any], *, step_dir: Path | None, where: str, device: str = "auto") -> RewardModel:
        """From `env.reward_model`: model_name, tokenizer, precision, max_model_len. Its weights are frozen."""
        from transformers import AutoConfig, AutoModelForSequenceClassification

        named = section["model_name"]
        folder = find(named, step_dir=step_dir, where=f"{where}.model_name")
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise _unusable(folder, error, where) from error
        named_heads = [name for name in config.architectures or [] if "SequenceClassification" in name]
        if not named_heads or config.num_labels != 1:
            found = ", ".join(config.architectures or ["nothing"])
            raise UserError(
                f"{folder} is no reward model: it holds {found} with {config.num_labels} labels, "
                "not a sequence classification with 1",
                where=f"{where}.model_name",
                hint="train one with rm/hf, or name a published one",
            )
        own = dict(section.get("tokenizer") or {})
        if own.get("name") in (None, named):
            own["name"] = str(folder)
        tokenizer = load_tokenizer(own, None, step_dir=step_dir, key=f"{where}.tokenizer")
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, dtype=getattr(torch, section["precision"])
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise _unusable(folder, error, where) from error
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        place = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        model.requires_grad_(False).eval()
        return RewardModel(model, tokenizer, place, max_length=section["max_model_len"])

    def ids(self, messages: Sequence[Message], answer: str) -> np.ndarray:
        """Token ids of a conversation with its answer: the chat template's, or the texts one behind the other.

        As rm/hf makes them of its pairs (and NeMo-RL of its messages): BOS in front and EOS behind where absent, the
        template's last newlines cut. A conversation that is too long loses its beginning. Raises BadRow where the
        template refuses it.
        """
        if self.tokenizer.has_chat_template:
            turn: Message = {"role": "assistant", "content": answer}
            prompt = render(self.tokenizer, messages, add_generation_prompt=True)
            rest = rest_of(render(self.tokenizer, [*messages, turn], add_generation_prompt=False), prompt)
        else:
            prompt, rest = plain_text(messages), answer
        first, last = self.tokenizer.encode_batch([prompt, rest.rstrip("\n")])
        ids = np.concatenate([opened(first, self.tokenizer.bos_id), closed(last, self.tokenizer.eos_id)])
        return ids[-self.max_length :]

    def scores(self, sequences: Sequence[np.ndarray]) -> Tensor:
        """The model's score of each sequence of token ids: [N], fp32, with gradients where the weights have them."""
        longest = max(len(ids) for ids in sequences)
        tokens_NS = torch.full((len(sequences), longest), self.tokenizer.pad_id, dtype=torch.long)
        mask_NS = torch.zeros_like(tokens_NS)
        for row, ids in enumerate(sequences):
            tokens_NS[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            mask_NS[row, : len(ids)] = 1
        output = self.model(input_ids=tokens_NS.to(self.device), attention_mask=mask_NS.to(self.device))
        return output.logits[:, 0].float()

    @torch.no_grad()
    def score(self, sequences: Sequence[np.ndarray], *, batch_size: int) -> list[float]:
        """`scores` of many sequences, those of like length together, in the order given."""
        found = [0.0] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for part in _parts(order, batch_size):
            for i, score in zip(part, self.scores([sequences[i] for i in part]).tolist(), strict=True):
                found[i] = score
        return found


def _parts(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _unusable(folder: Path, error: Exception, where: str) -> UserError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{folder} holds no usable reward model", where=f"{where}.model_name", hint=first)
