"""Preference pairs: formats, the cut between prompt and answer, BOS and EOS, overlong pairs, bad rows."""

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
from nemotron_launch.trainer.data.preference import PreferencePair, load_preferences
from nemotron_launch.trainer.data.sources import BadRows
from nemotron_launch.trainer.tokenizer import Tokenizer, load_tokenizer

Load = Callable[..., tuple[list[PreferencePair], BadRows]]

USER = {"role": "user", "content": "two and two?"}
FOUR = {"role": "assistant", "content": "four"}
FIVE = {"role": "assistant", "content": "five"}
GOOD = {"prompt": "two and two?", "chosen": "four", "rejected": "five"}
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def ranked(rank: int | None, answer: dict[str, str]) -> dict[str, Any]:
    return {"rank": rank, "completion": [answer]}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads rows with a tokenizer, through a JSONL file."""

    def run(
        tokenizer: Tokenizer, rows: list[Any], *, max_length: int = 1000, share: float = 0.0, **section: Any
    ) -> Any:
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_preferences(
            {"data_path": str(file), **section}, tokenizer=tokenizer, max_length=max_length, step_dir=tmp_path,
            max_bad_rows=share,
        )  # fmt: skip

    return run


def texts(tokenizer: Tokenizer, pair: PreferencePair) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_answer, pair.rejected_answer))  # type: ignore[return-value]


def test_text_prompt_stays_raw_without_a_template(load: Load, byte_tokenizer: Tokenizer) -> None:
    [pair], bad = load(byte_tokenizer, [GOOD])
    assert texts(byte_tokenizer, pair) == ("two and two?", "four<eos>", "five<eos>")
    assert pair.prompt_len == len("two and two?")
    assert pair.chosen_ids.dtype == np.int32
    assert pair.source.endswith("pairs.jsonl:1")
    assert bad.summary() == ""


def test_text_prompt_is_a_user_message_under_a_template(load: Load, chat_tokenizer: Tokenizer) -> None:
    [pair], _ = load(chat_tokenizer, [GOOD])
    assert texts(chat_tokenizer, pair) == (
        "<s><|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\n",
        "four<|im_end|></s>",
        "five<|im_end|></s>",
    )
    asked = chat_tokenizer.chat_ids([USER], add_generation_prompt=True)
    assert pair.prompt_ids.tolist() == asked  # what a generator is given


@pytest.mark.parametrize(
    ("row", "section"),
    [
        ({"prompt": [USER], "chosen": "four", "rejected": "five"}, {}),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, {}),
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {}),
        ({"prompt": "two and two?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {}),
        ({"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {}),
        ({"q": "two and two?", "+": "four", "-": "five"}, {"prompt_key": "q", "chosen_key": "+", "rejected_key": "-"}),
        (
            {"context": [USER], "completions": [ranked(1, FIVE), ranked(0, FOUR)]},
            {},
        ),
        (
            {"context": [USER], "completions": [ranked(2, FOUR), ranked(7, FIVE)]},
            {"dataset_name": "PreferenceDataset"},
        ),
        (
            {"context": [USER], "response1": "four", "response2": "five", "overall_preference": -1},
            {"dataset_name": "HelpSteer3"},
        ),
        (
            {"context": "two and two?", "response1": "five", "response2": "four", "overall_preference": 3},
            {"dataset_name": "HelpSteer3"},
        ),
        (
            {"prompt": "another text", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
            {"dataset_name": "Tulu3Preference"},
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "two and two?"}]}], 
            "chosen": "four", "rejected": "five"}, {}),
    ],
)  # fmt: skip
def test_every_format_gives_the_same_pair(load: Load, chat_tokenizer: Tokenizer, row: Any, section: Any) -> None:
    [expected], _ = load(chat_tokenizer, [GOOD])
    [pair], _ = load(chat_tokenizer, [row], **section)
    assert texts(chat_tokenizer, pair) == texts(chat_tokenizer, expected)


def test_columns_of_other_rows_do_not_matter(load: Load, chat_tokenizer: Tokenizer) -> None:
    """Parquet and Arrow give each message every column of all, filled with null."""
    message = {**USER, "name": None, "tool_calls": None}
    [pair], _ = load(chat_tokenizer, [{**GOOD, "prompt": [message], "completions": None}])
    assert "two and two?" in texts(chat_tokenizer, pair)[0]


def test_conversations_share_all_but_the_last_answer(load: Load, chat_tokenizer: Tokenizer) -> None:
    [pair], _ = load(chat_tokenizer, [{"chosen": [*EARLIER, USER, FOUR], "rejected": [*EARLIER, USER, FIVE]}])
    prompt, chosen, rejected = texts(chat_tokenizer, pair)
    assert "hello<|im_end|>" in prompt  # earlier answers are not in the loss
    assert (chosen, rejected) == ("four<|im_end|></s>", "five<|im_end|></s>")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing key rejected"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "missing key prompt"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "prompt is a number, not a list of messages"),
        ({"prompt": "a", "chosen": 5, "rejected": "c"}, "chosen is a number, not text"),
        ({"prompt": "a", "chosen": " \n", "rejected": "c"}, "empty completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b\n"}, "chosen equals rejected"),
        ({"prompt": "x" * 101, "chosen": "b", "rejected": "c"}, "prompt longer than the limit of 100 tokens"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty prompt, and the tokenizer has no BOS to begin with"),
        ({"prompt": [USER, FOUR, USER], "chosen": "b", "rejected": "c"},
         "several messages, but the tokenizer has no chat template"),
        ({"prompt": "a", "chosen": [USER], "rejected": [FIVE]}, "an answer is not the assistant's"),
        ({"chosen": [USER, FOUR], "rejected": [EARLIER[0], FIVE]},
         "chosen and rejected differ before their last message"),
        ({"prompt": "x", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
         "prompt is not what the conversation in chosen answers"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": "c"},
         "a message of chosen holds more than text"),
        ({"context": [USER], "completions": [ranked(1, FOUR), ranked(1, FIVE)]}, "tie"),
        ({"context": [USER], "completions": [ranked(1, FOUR)]}, "1 completions, not two"),
        ({"context": [USER], "completions": [ranked(None, FOUR), ranked(1, FIVE)]}, "a completion has no rank"),
        ({"completions": [ranked(1, FOUR), ranked(2, FIVE)]}, "missing key context"),
        ({"context": "a", "response1": "b", "response2": "c", "overall_preference": 0}, "tie"),
        ("text", "not a JSON object"),
    ],
)  # fmt: skip
def test_bad_row_is_left_out_and_named(load: Load, byte_tokenizer: Tokenizer, row: Any, reason: str) -> None:
    pairs, bad = load(byte_tokenizer, [GOOD, row], max_length=100, share=0.5)
    assert len(pairs) == 1
    assert bad.counts == {reason: 1}
    assert bad.places[reason][0].endswith("pairs.jsonl:2")


def test_too_many_bad_rows_stop_before_training(load: Load, byte_tokenizer: Tokenizer) -> None:
    rows = [GOOD] * 9 + [{**GOOD, "chosen": "five"}]
    assert len(load(byte_tokenizer, rows, share=0.1)[0]) == 9
    with pytest.raises(
        UserError, match=r"1 of 10 rows are bad: 10%(.|\n)*chosen equals rejected: .*pairs.jsonl:10"
    ) as caught:
        load(byte_tokenizer, rows, share=0.09)
    assert caught.value.exit_code == 2


def test_unknown_format_is_refused(load: Load, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no preference format is called Tulu(.|\n)*Tulu3Preference"):
        load(byte_tokenizer, [GOOD], dataset_name="Tulu")


@pytest.mark.parametrize("answer", ["four", "four</s>", "four\n\n"])
def test_bos_and_eos_are_never_doubled(load: Load, raw_tokenizer: Tokenizer, answer: str) -> None:
    [pair], _ = load(raw_tokenizer, [{"prompt": "<s>the cat", "chosen": answer, "rejected": "five"}])
    assert texts(raw_tokenizer, pair) == ("<s>the cat", "four</s>", "five</s>")
    [pair], _ = load(raw_tokenizer, [{"prompt": "the cat", "chosen": answer, "rejected": "five"}])
    assert texts(raw_tokenizer, pair) == ("<s>the cat", "four</s>", "five</s>")


def test_template_that_ends_in_eos_gets_no_second_one(load: Load, chat_folder: Path) -> None:
    template = CHATML.replace("<|im_end|>\n", "{{ eos_token }}\n")
    tokenizer = load_tokenizer({"name": str(chat_folder), "chat_template": template}, None)
    [pair], _ = load(tokenizer, [GOOD])
    assert texts(tokenizer, pair)[1] == "four</s>"


def test_pad_in_a_text_stays_in_the_loss(load: Load, raw_tokenizer: Tokenizer) -> None:
    """Masks come from lengths: an answer may hold the pad token."""
    [pair], _ = load(raw_tokenizer, [{**GOOD, "chosen": "<pad>four<pad>"}])
    assert pair.chosen_answer[0] == raw_tokenizer.pad_id
    assert pair.prompt_ids.tolist() == raw_tokenizer.encode("<s>two and two?")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages|length }}" + CHATML,
        # closes the conversation, and so writes the prompt differently once the answer follows
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}!{% endif %}",
    ],
)
def test_template_that_breaks_its_own_prefix_is_refused(load: Load, chat_folder: Path, template: str) -> None:
    tokenizer = load_tokenizer({"name": str(chat_folder), "chat_template": template}, None)
    with pytest.raises(UserError) as caught:
        load(tokenizer, [GOOD], share=1.0)
    assert caught.value.where == "policy.tokenizer.chat_template"
    assert "does not extend its own prefix" in str(caught.value)
    assert "pairs.jsonl:1" in str(caught.value)


def test_template_that_refuses_a_row_makes_it_a_bad_row(load: Load, chat_folder: Path) -> None:
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    tokenizer = load_tokenizer({"name": str(chat_folder), "chat_template": template}, None)
    pairs, bad = load(tokenizer, [GOOD, {**GOOD, "prompt": "no"}], share=0.5)
    assert len(pairs) == 1
    assert bad.counts == {"the chat template refuses the messages (not this)": 1}


def test_overlong_pair_is_cut_to_a_stub_and_marked(load: Load, byte_tokenizer: Tokenizer) -> None:
    long = {"prompt": "0123456789", "chosen": "x" * 10, "rejected": "y"}
    rows = [{**long, "chosen": "x" * 9}, long]
    pairs, bad = load(byte_tokenizer, rows, max_length=20)
    assert [pair.overlong for pair in pairs] == [False, True]  # 10 + 9 + EOS = 20 fits
    # NeMo-RL: min(4, limit // messages) tokens of each of the two messages
    assert texts(byte_tokenizer, pairs[1]) == ("0123", "xxxx", "y<eos>")
    assert bad.overlong == 1
    assert "1 of 2 rows are longer than the limit" in bad.summary()


def test_overlong_pair_of_many_messages_still_fits(load: Load, chat_tokenizer: Tokenizer) -> None:
    many = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 3 + [USER]
    prompt = len(chat_tokenizer.chat_ids(many, add_generation_prompt=True))
    [pair], _ = load(chat_tokenizer, [{"prompt": many, "chosen": "four", "rejected": "five"}], max_length=prompt)
    assert pair.overlong
    assert len(pair.chosen_ids) <= 4 * (len(many) + 1)
    assert 1 <= pair.prompt_len < len(pair.chosen_ids)


def test_prompt_and_system_files_frame_every_prompt(load: Load, chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("Think. {}")
    (tmp_path / "system.txt").write_text("Be brief.")
    [pair], _ = load(chat_tokenizer, [GOOD], prompt_file="step://ask.txt", system_prompt_file="step://system.txt")
    system = {"role": "system", "content": "Be brief."}
    asked = [system, {"role": "user", "content": "Think. two and two?"}]
    assert pair.prompt_ids.tolist() == chat_tokenizer.chat_ids(asked, add_generation_prompt=True)


def test_unusable_prompt_file_is_refused(load: Load, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("{question}")
    with pytest.raises(UserError, match=r"data.train.prompt_file: .*no prompt template"):
        load(byte_tokenizer, [GOOD], prompt_file="step://ask.txt")
    with pytest.raises(UserError, match=r"data.train.prompt_file: no such file"):
        load(byte_tokenizer, [GOOD], prompt_file="step://no.txt")
    with pytest.raises(UserError, match="a system prompt needs a chat template"):
        load(byte_tokenizer, [GOOD], system_prompt_file="step://ask.txt")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5), max_length=st.integers(8, 80))
@pytest.mark.parametrize("which", ["byte_tokenizer", "raw_tokenizer", "chat_tokenizer"])
def test_pairs_keep_their_invariants(
    load: Load, which: str, request: pytest.FixtureRequest, rows: list[tuple[str, str, str]], max_length: int
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = [good, *({"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows)]
    pairs, bad = load(tokenizer, data, max_length=max(max_length, 40), share=1.0)
    assert len(pairs) + bad.bad == bad.total == len(data)
    for pair in pairs:
        row = data[int(pair.source.rsplit(":", 1)[1]) - 1]
        assert pair.prompt_len >= 1
        assert pair.prompt_ids.tolist() == pair.rejected_ids[: pair.prompt_len].tolist()
        assert max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max(max_length, 40)
        if pair.overlong:
            continue
        if tokenizer.bos_id is not None:
            assert pair.prompt_ids[0] == tokenizer.bos_id
            assert list(pair.prompt_ids[:2]) != [tokenizer.bos_id] * 2
        for answer, text in ((pair.chosen_answer, row["chosen"]), (pair.rejected_answer, row["rejected"])):
            assert answer[-1] == tokenizer.eos_id
            closing = "<|im_end|>" if tokenizer.has_chat_template else ""
            body = text if closing else text.rstrip("\n")
            assert tokenizer.decode(answer[:-1]) == body + closing
        if not tokenizer.has_chat_template:
            assert tokenizer.decode(pair.prompt_ids).removeprefix("<s>") == row["prompt"]


def per_message_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[list[int]]:
    """NeMo-RL's cut, from its source: each message is what its growing prefix adds; the last one ends in EOS."""
    done, ids = "", []
    for i in range(len(messages)):
        text = tokenizer.render(messages[: i + 1], add_generation_prompt=False)
        chunk = text[len(done) :]
        if i == 0:
            chunk = "<s>" + chunk
        if i == len(messages) - 1:
            chunk = chunk.rstrip("\n") + "</s>"
        ids.append(tokenizer.encode(chunk))
        done = text
    return ids


def test_sequences_are_nemo_rls(load: Load, chat_tokenizer: Tokenizer) -> None:
    context = [*EARLIER, USER]
    [pair], _ = load(chat_tokenizer, [{"prompt": context, "chosen": "it is four.", "rejected": "five"}])
    expected = per_message_ids(chat_tokenizer, [*context, {"role": "assistant", "content": "it is four."}])
    assert pair.chosen_ids.tolist() == sum(expected, [])
    header = chat_tokenizer.encode("<|im_start|>assistant\n")  # in NeMo-RL's mask; equal in both answers
    assert pair.prompt_len == len(sum(expected[:-1], [])) + len(header)
