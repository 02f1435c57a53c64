"""Texts that end an answer, found as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_launch.trainer.tokenizer import Tokenizer

# A fragment of a character decodes to this.
_FRAGMENT = "\N{REPLACEMENT CHARACTER}"


class StopStrings:
    """Ends a sequence with the first token after which its text holds one of `texts`.

    Most tokens cannot be the last of a stop string, which a table of the vocabulary says; only where one can, the end
    of the text is decoded.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.texts = tuple(texts)
        # As many tokens as may hold a stop string: a token stands for a byte or more, and special tokens for many.
        # Some more, because a decoder may treat the first token of a text in its own way.
        self.window = max(len(text.encode()) for text in texts) + 8
        last = {_FRAGMENT, *(text[-1] for text in texts)}
        # Twice, since a decoder may drop the space that the first token of a text begins with.
        spelled = tokenizer.decode_batch([[token, token] for token in range(tokenizer.vocab_size)])
        may_end = [not last.isdisjoint(text) for text in spelled]
        self.may_end_V = torch.tensor(may_end, device=device)

    def ended(self, written_RN: Tensor, rows_N: Tensor, next_N: Tensor, running_N: Tensor) -> Tensor:
        """Which of the sequences `rows_N` (columns of what is written so far) end with `next_N`, if still running."""
        # A model's vocabulary may be padded beyond the tokenizer's; such a token has no text.
        known_N = next_N < len(self.may_end_V)
        ended_N = self.may_end_V[next_N.where(known_N, torch.zeros_like(next_N))] & known_N & running_N
        places = ended_N.nonzero().squeeze(1)
        if len(places):
            texts = self.tokenizer.decode_batch(written_RN[-self.window :, rows_N[places]].T.tolist())
            found = [any(stop in text for stop in self.texts) for text in texts]
            ended_N[places] = torch.tensor(found, device=ended_N.device)
        return ended_N
