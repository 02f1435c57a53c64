"""What the trainer's tests share: this process as a layout of one rank, small tokenizers, small runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Run
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


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of sft/megatron, small, whose last checkpoint a DPO run may start from."""
    run = Run("sft", tmp_path_factory.mktemp("sft"))
    finished = run.go()
    assert finished.code == 0, finished.said
    return run


@pytest.fixture(scope="session")
def dpo(warm_start: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Makes a small run of rl/nemo_rl/dpo, not yet started, with options by their keys."""

    def dpo(folder: Path | None = None, *, procs: int = 1, **options: Any) -> Run:
        run = Run("dpo", folder or tmp_path_factory.mktemp("dpo"), procs=procs)
        return run.with_(checkpointing__pretrained_checkpoint__path=str(warm_start.checkpoints)).with_(**options)

    return dpo
