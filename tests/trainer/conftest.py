"""What the trainer's tests share: this process as a layout of one rank, and small tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from small_tokenizers import byte_tokenizer, chat_folder, chat_tokenizer, raw_tokenizer

__all__ = ["byte_tokenizer", "chat_folder", "chat_tokenizer", "layout", "raw_tokenizer"]


@pytest.fixture(scope="session")
def layout() -> Iterator[Any]:
    """This process alone: tensor, pipeline and data size 1, on CPU."""
    import torch

    from nemotron_launch.trainer.megatron import parallel

    torch.set_num_threads(2)
    yield parallel.start(tensor=1, pipeline=1, sequence_parallel=False, device="cpu", seed=1)
    parallel.stop()
