"""SFT examples: which tokens are in the loss, formats, BOS and EOS, overlong examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.sft import SFTExample, load_sft
from nemotron_launch.trainer.data.sources import BadRows
from nemotron_launch.trainer.tokenizer import Tokenizer, load_tokenizer

Load = Callable[..., tuple[list[SFTExample], BadRows]]

USER = {"role": "user", "content": "two and two?"}
FOUR = {"role": "assistant", "content": "four"}
GOOD = {"prompt": "two and two?", "response": "four"}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, USER, FOUR]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads rows with a tokenizer, through a JSONL file."""

    def run(
        tokenizer: Tokenizer, rows: list[Any], *, max_length: int = 1000, share: float = 0.0, **options: Any
    ) -> Any:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        bos_eos = {key: options.pop(key) for key in ("add_bos", "add_eos", "add_generation_prompt") if key in options}
        return load_sft(
            {"data_path": str(file), **options}, tokenizer=tokenizer, max_length=max_length, step_dir=tmp_path,
            max_bad_rows=share, **bos_eos,
        )  # fmt: skip

    return run


def in_loss(tokenizer: Tokenizer, example: SFTExample) -> list[str]:
    """The texts of the stretches of tokens in the loss."""
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_mask, [0]])))
    return [tokenizer.decode(example.ids[a:b]) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]


def test_response_is_in_the_loss_and_the_prompt_is_not(load: Load, byte_tokenizer: Tokenizer) -> None:
    [example], _ = load(byte_tokenizer, [GOOD])
    assert byte_tokenizer.decode(example.ids) == "two and two?four<eos>"
    assert in_loss(byte_tokenizer, example) == ["four<eos>"]
    assert example.prompt_len == len("two and two?")
    assert (example.ids.dtype, example.loss_mask.dtype) == (np.int32, np.uint8)
    assert example.source.endswith("rows.jsonl:1")


def test_every_assistant_turn_is_in_the_loss(load: Load, chat_tokenizer: Tokenizer) -> None:
    """As in NeMo-RL, whose add_generation_prompt is off unless set: the header of a turn is part of its message."""
    [example], _ = load(chat_tokenizer, [{"messages": TURNS}])
    assert in_loss(chat_tokenizer, example) == [
        "<|im_start|>assistant\nhello<|im_end|>\n",
        "<|im_start|>assistant\nfour<|im_end|></s>",
    ]
    assert example.ids[: example.prompt_len].tolist() == chat_tokenizer.chat_ids(TURNS[:-1], add_generation_prompt=True)


def test_generation_prompt_takes_the_header_out_of_the_loss(load: Load, chat_tokenizer: Tokenizer) -> None:
    [with_header], _ = load(chat_tokenizer, [{"messages": TURNS}])
    [example], _ = load(chat_tokenizer, [{"messages": TURNS}], add_generation_prompt=True)
    assert in_loss(chat_tokenizer, example) == ["hello<|im_end|>\n", "four<|im_end|></s>"]
    assert example.ids.tolist() == with_header.ids.tolist()


@pytest.mark.parametrize(
    ("row", "section"),
    [
        ({"messages": [USER, FOUR]}, {}),
        ({"input": "two and two?", "output": "four"}, {}),
        ({"input": "two and two?", "output": "four"}, {"input_key": "prompt", "output_key": "response"}),
        ({"q": "two and two?", "a": "four"}, {"input_key": "q", "output_key": "a"}),
        ({"talk": [USER, FOUR]}, {"chat_key": "talk", "dataset_name": "openai_format"}),
        ({"prompt": [USER], "response": "four"}, {"dataset_name": "ResponseDataset"}),
    ],
)
def test_every_format_gives_the_same_example(load: Load, chat_tokenizer: Tokenizer, row: Any, section: Any) -> None:
    [expected], _ = load(chat_tokenizer, [GOOD])
    [example], _ = load(chat_tokenizer, [row], **section)
    assert example.ids.tolist() == expected.ids.tolist()
    assert example.loss_mask.tolist() == expected.loss_mask.tolist()


def test_system_message_comes_from_its_column_or_the_section(load: Load, chat_tokenizer: Tokenizer) -> None:
    own = [{"role": "system", "content": "own"}, USER, FOUR]
    rows = [{"messages": [USER, FOUR]}, {"messages": [USER, FOUR], "sys": "column"}, {"messages": own}]
    examples, _ = load(chat_tokenizer, rows, system_prompt="section", system_key="sys")
    beginnings = [chat_tokenizer.decode(example.ids).split("<|im_end|>")[0] for example in examples]
    assert beginnings == [f"<s><|im_start|>system\n{name}" for name in ("section", "column", "own")]


def test_tools_reach_the_template(load: Load, chat_folder: Path) -> None:
    template = "{% if tools %}<{{ tools[0]['name'] }}>{% endif %}" + CHATML
    tokenizer = load_tokenizer({"name": str(chat_folder), "chat_template": template}, None)
    rows = [{"messages": [USER, FOUR], "tools": [{"name": "add"}]}, {"messages": [USER, FOUR], "tools": None}]
    first, second = load(tokenizer, rows)[0]
    assert tokenizer.decode(first.ids).startswith("<s><add><|im_start|>")
    assert tokenizer.decode(second.ids).startswith("<s><|im_start|>")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "missing key messages or prompt"),
        ({"prompt": "a"}, "missing key response"),
        ({"prompt": "a", "response": "\n"}, "empty completion"),
        ({"messages": [USER]}, "the last message is not the assistant's"),
        ({"messages": []}, "the last message is not the assistant's"),
        ({"messages": [{"content": "a"}]}, "a message of messages has no role"),
        ({"messages": "a"}, "messages is text, not a list of messages"),
        ({"prompt": "x" * 200, "response": "a"}, "prompt longer than the limit of 60 tokens"),
    ],
)
def test_bad_row_is_left_out_and_named(load: Load, chat_tokenizer: Tokenizer, row: Any, reason: str) -> None:
    examples, bad = load(chat_tokenizer, [GOOD, row], max_length=60, share=0.5)
    assert len(examples) == 1
    assert bad.counts == {reason: 1}
    with pytest.raises(UserError, match="1 of 2 rows are bad"):
        load(chat_tokenizer, [GOOD, row], max_length=60, share=0.4)


def test_bos_and_eos_are_optional_and_never_doubled(load: Load, raw_tokenizer: Tokenizer) -> None:
    whole = {"prompt": "<s>two and two?", "response": "four</s>"}
    for row in (whole, GOOD):
        [example], _ = load(raw_tokenizer, [row])
        assert raw_tokenizer.decode(example.ids) == "<s>two and two?four</s>"
    [example], _ = load(raw_tokenizer, [GOOD], add_bos=False, add_eos=False)
    assert raw_tokenizer.decode(example.ids) == "two and two?four"


def test_template_that_rewrites_earlier_turns_is_refused(load: Load, chat_folder: Path) -> None:
    """As reasoning templates do that drop the thoughts of all but the last turn."""
    template = CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else '…' }}")
    tokenizer = load_tokenizer({"name": str(chat_folder), "chat_template": template}, None)
    with pytest.raises(UserError, match="does not extend its own prefix"):
        load(tokenizer, [{"messages": TURNS}], share=1.0)


def test_overlong_example_is_cut_to_a_stub_out_of_the_loss(load: Load, byte_tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "0123456789", "response": "x" * n} for n in (9, 10)]
    examples, bad = load(byte_tokenizer, rows, max_length=20)
    assert [example.overlong for example in examples] == [False, True]
    assert byte_tokenizer.decode(examples[1].ids) == "01234567"  # 4 tokens for each of two messages
    assert examples[1].loss_mask.sum() == 0
    assert bad.overlong == 1


CONTENT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
ROLES = ["user", "assistant", "user", "assistant", "user", "assistant"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(turns=st.lists(CONTENT, min_size=2, max_size=6), header=st.booleans())
def test_mask_covers_the_assistant_and_nothing_else(
    load: Load, chat_tokenizer: Tokenizer, turns: list[str], header: bool
) -> None:
    turns = turns[: len(turns) // 2 * 2]
    messages = [{"role": role, "content": text} for role, text in zip(ROLES, turns, strict=False)]
    examples, bad = load(chat_tokenizer, [GOOD, {"messages": messages}], share=1.0, add_generation_prompt=not header)
    if bad.bad:
        assert list(bad.counts) == ["empty completion"]
        return
    example = examples[1]
    opening = "<|im_start|>assistant\n" if header else ""
    expected = [f"{opening}{text}<|im_end|>\n" for text in turns[1::2]]
    expected[-1] = expected[-1].rstrip("\n") + "</s>"
    assert in_loss(chat_tokenizer, example) == expected
    assert example.ids.size == example.loss_mask.size
    assert example.loss_mask[: example.prompt_len][-1:].tolist() == [int(header)]
