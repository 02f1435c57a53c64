"""Rows of every shape become prompts: what is asked, what is verified by, what scores it, and which rows cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.prompts import GymRows, Prompt, load_prompts


@pytest.fixture
def load(byte_tokenizer, tmp_path):
    def load(
        *rows: Any, tokenizer: Any = byte_tokenizer, max_length: int = 1000, gym: GymRows | None = None, **section
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        options = {key: section.pop(key) for key in ("max_bad_rows",) if key in section}
        section = {"data_path": str(path), **section}
        return load_prompts(section, tokenizer=tokenizer, max_length=max_length, gym=gym, **options)

    return load


def only(loaded: tuple[list[Prompt], Any]) -> Prompt:
    prompts, bad = loaded
    assert not bad.bad, bad.lines()
    assert len(prompts) == 1
    return prompts[0]


def text(prompt: Prompt) -> str:
    return bytes(prompt.ids.tolist()).decode()


ASKED = "2+2?"
SHAPES = {
    "ResponseDataset": {"input": ASKED, "output": "4"},
    "gsm8k": {"question": ASKED, "answer": "4"},
    "math_data_processor": {"problem": ASKED, "expected_answer": "4"},
    "prompt and truth": {"prompt": ASKED, "ground_truth": "4"},
    "messages that end with the truth": {
        "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "4"}]
    },
    "prompt as messages, DAPO's truth": {
        "prompt": [{"role": "user", "content": ASKED}],
        "reward_model": {"ground_truth": "4"},
    },
    "ShareGPT": {"messages": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "4"}]},
    "extra_env_info": {"prompt": ASKED, "extra_env_info": {"ground_truth": "4"}},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES.keys())
def test_what_is_asked_and_what_is_right_are_found_in_every_shape(load, row):
    prompt = only(load(row, env_name="math"))
    assert text(prompt) == ASKED
    assert list(prompt.messages) == [{"role": "user", "content": ASKED}]
    assert (prompt.row["expected_answer"], prompt.row["env_name"]) == ("4", "math")
    assert prompt.source.endswith("rows.jsonl:1")


def test_named_columns_win_and_their_absence_is_said(load):
    row = {"prompt": "no", "task": ASKED, "answer": "no", "gold": "4"}
    prompt = only(load(row, input_key="task", output_key="gold"))
    assert (text(prompt), prompt.row["expected_answer"]) == (ASKED, "4")
    with pytest.raises(UserError, match="none of the 1 rows can be used") as raised:
        load(row, output_key="solution")
    assert "missing key solution: " in str(raised.value) and "rows.jsonl:1" in str(raised.value)


def test_a_rows_own_environment_wins(load):
    assert only(load({"prompt": ASKED, "env_name": "exact"}, env_name="math")).row["env_name"] == "exact"


def test_the_chat_template_writes_the_prompt_with_its_tools_and_the_answers_beginning(load, chat_tokenizer):
    tool = {"type": "function", "name": "add", "parameters": {}}
    prompt = only(load({"prompt": ASKED, "tools": [tool]}, tokenizer=chat_tokenizer))
    chat = {"type": "function", "function": {"name": "add", "parameters": {}}}
    messages = [{"role": "user", "content": ASKED}]
    assert prompt.ids.tolist() == chat_tokenizer.chat_ids(messages, add_generation_prompt=True, tools=[chat])


def test_long_prompts_are_left_out_and_counted(load):
    prompts, bad = load({"prompt": "x" * 9}, {"prompt": "x" * 8}, max_length=8, max_bad_rows=0.5)
    assert [len(prompt.ids) for prompt in prompts] == [8]
    assert bad.lines() == [f"1 × the prompt is longer than 8 tokens (data.max_input_seq_length): {_place(bad)}"]
    with pytest.raises(UserError, match="1 of 2 rows are bad"):
        load({"prompt": "x" * 9}, {"prompt": "x" * 8}, max_length=8)


def _place(bad: Any) -> str:
    return next(iter(bad.places.values()))[0]


BAD = {
    "missing key messages or prompt or question or problem or input": {"text": ASKED},
    "prompt asks nothing": {"prompt": "  "},
    "prompt is a number, not a list of messages": {"prompt": 4},
    "a message of messages has no role": {"messages": [{"content": ASKED}]},
    "not valid JSON": "{",
    "messages asks nothing": {"messages": [{"role": "assistant", "content": "4"}]},
    "tools is not a list of objects": {"prompt": ASKED, "tools": ["add"]},
}


@pytest.mark.parametrize(("problem", "row"), BAD.items(), ids=BAD.keys())
def test_rows_that_cannot_be_used_are_named_by_file_line_and_field(load, problem, row):
    prompts, bad = load({"prompt": ASKED}, row, max_bad_rows=0.5)
    assert len(prompts) == 1
    assert bad.lines() == [f"1 × {problem}: {_place(bad)}"]
    assert _place(bad).endswith("rows.jsonl:2")


def test_a_row_is_repeated_in_its_place(load):
    prompts, _ = load({"prompt": "a"}, {"prompt": "b"}, repeat=2)
    assert [text(prompt) for prompt in prompts] == ["a", "a", "b", "b"]


def test_prompt_template_and_system_message_go_around(load, chat_tokenizer, tmp_path):
    (tmp_path / "cot.txt").write_text("Think. {}")
    (tmp_path / "system.txt").write_text("Be right.")
    files = {"prompt_file": str(tmp_path / "cot.txt"), "system_prompt_file": str(tmp_path / "system.txt")}
    prompt = only(load({"prompt": ASKED}, tokenizer=chat_tokenizer, **files))
    assert [message["content"] for message in prompt.messages] == ["Be right.", f"Think. {ASKED}"]


# -- NeMo Gym -------------------------------------------------------------------------------------------------------

AGENT = {"type": "responses_api_agents", "name": "math"}


def gym_fields(prompt: Prompt) -> tuple[Any, Any]:
    return prompt.row["responses_create_params"]["input"], prompt.row["agent_ref"]


@pytest.mark.parametrize(
    "row",
    [
        {"responses_create_params": {"input": [{"role": "user", "content": ASKED}]}},
        {"responses_create_params": {"input": ASKED}},
        {"responses_create_params": json.dumps({"input": ASKED})},
        {"extra_env_info": {"responses_create_params": {"input": [{"role": "user", "content": ASKED}]}}},
        *({key: ASKED} for key in ("prompt", "question", "problem", "input")),
        {"messages": [{"role": "user", "content": ASKED}]},
    ],
)
def test_rows_are_brought_into_gyms_shape(load, row):
    prompt = only(load({**row, "agent_ref": AGENT}, gym=GymRows()))
    assert gym_fields(prompt) == ([{"role": "user", "content": ASKED}], AGENT)
    assert text(prompt) == ASKED
    assert prompt.row["env_name"] == "nemo_gym"


def test_rows_that_name_no_agent_have_the_default_one(load):
    gym = GymRows.of(
        {"env": {"should_use_nemo_gym": True}, "data": {"default_agent_ref": "math"}},
    )
    assert gym_fields(only(load({"prompt": ASKED}, gym=gym)))[1] == AGENT
    other = {"prompt": ASKED, "agent_ref": {"name": "mcqa"}}
    assert gym_fields(only(load(other, gym=gym)))[1] == {**AGENT, "name": "mcqa"}


def test_what_a_request_says_besides_is_kept(load, chat_tokenizer):
    tool = {"type": "function", "name": "add", "parameters": {}, "strict": True}
    params = {"input": ASKED, "instructions": "Be right.", "tools": [tool], "parallel_tool_calls": False}
    prompt = only(
        load({"responses_create_params": params, "agent_ref": AGENT}, tokenizer=chat_tokenizer, gym=GymRows())
    )
    kept = prompt.row["responses_create_params"]
    assert [message["role"] for message in kept["input"]] == ["system", "user"]
    assert (kept["tools"], kept["parallel_tool_calls"]) == ([tool], False)


GYM_BAD = {
    "missing key agent_ref, and data.default_agent_ref is not set": {"prompt": ASKED},
    "agent_ref has no name": {"prompt": ASKED, "agent_ref": {"type": "x"}},
    "missing key responses_create_params.input": {"responses_create_params": {}, "agent_ref": AGENT},
    "responses_create_params is not an object": {"responses_create_params": [1], "agent_ref": AGENT},
    "responses_create_params is not valid JSON": {"responses_create_params": "{", "agent_ref": AGENT},
}


@pytest.mark.parametrize(("problem", "row"), GYM_BAD.items(), ids=GYM_BAD.keys())
def test_rows_without_gyms_fields_are_named(load, problem, row):
    with pytest.raises(UserError) as raised:
        load(row, gym=GymRows())
    assert f"1 × {problem}: " in str(raised.value)
    assert "rows.jsonl:1" in str(raised.value)


def test_gsm8k_as_it_is_published_is_read(load):
    row = {"question": "How many?", "answer": "He has 2+2=<<2+2=4>>4.\n#### 4"}
    prompt = only(load(row, dataset_name="gsm8k", env_name="math"))
    assert (text(prompt), prompt.row["expected_answer"]) == ("How many?", row["answer"])


def test_all_files_of_the_tiny_run_are_read(byte_tokenizer):
    folder = Path(__file__).parents[3] / "steps/rl/nemo_rl/rlvr/data"
    for name, count in (("train", 2000), ("validation", 120)):
        prompts, bad = load_prompts(
            {"data_path": str(folder / f"{name}.jsonl")}, tokenizer=byte_tokenizer, max_length=48
        )
        assert (len(prompts), bad.bad) == (count, 0)
