"""Tokenizers for the trainer's tests: byte-level, and a small trained one with BOS, merges and a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_launch.trainer.tokenizer import Tokenizer, load_tokenizer

#: ChatML as Qwen writes it: turns end in <|im_end|> and a newline.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return load_tokenizer({"name": "bytes"}, None)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: byte-level BPE with merges, `<s>` and `</s>` as BOS and EOS, ChatML as its template."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    corpus = ["the cat sat on the mat and the dog sat on the log", "what is two and two? it is four."] * 20
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    hf.chat_template = CHATML
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder: Path) -> Tokenizer:
    return load_tokenizer({"name": str(chat_folder)}, None)


@pytest.fixture(scope="session")
def raw_tokenizer(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same without a chat template, as base models come."""
    folder = tmp_path_factory.mktemp("raw-tokenizer")
    for file in chat_folder.iterdir():
        if file.suffix != ".jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    return load_tokenizer({"name": str(folder)}, None)
