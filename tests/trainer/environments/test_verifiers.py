"""The other verifiers: exact, regex, multiple_choice, json_schema, tool_call, instruction_following, reasoning_gym."""

from __future__ import annotations

import time

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import (
    exact,
    instruction_following,
    json_schema,
    multiple_choice,
    regex,
    tool_call,
)
from nemotron_launch.trainer.environments.code import program_of
from nemotron_launch.trainer.environments.instruction_following import CONSTRAINTS
from nemotron_launch.trainer.environments.tool_calls import words_beside

ADD = {"name": "add", "arguments": {"a": 1, "b": [2.0]}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
COUNTRY = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}}}
OPTIONS = ["Paris", "Rome", "Oslo"]


@pytest.mark.parametrize(
    ("module", "row", "right", "wrong"),
    [
        (exact, {"expected_answer": "Oslo"}, ["Oslo", " Oslo\n", "<think>x</think>Oslo"], ["oslo", "Oslo!", ""]),
        (exact, {"answer": ["a", "b"], "ignore_case": True}, ["A", "b"], ["c"]),
        (exact, {"answer": "a b", "ignore_whitespace": True}, ["ab", "a  b"], ["a-b"]),
        (exact, {"answer": "ab", "ignore_punctuation": True}, ["a-b!"], ["a b"]),
        (exact, {"answer": "18", "match": "final"}, ["#### 18", "Answer: 18"], ["18"]),
        (exact, {"answer": "18", "match": "contains"}, ["it is 18."], ["it is 17"]),
        (exact, {"answer": "18", "match": "last_line"}, ["so\n18\n\n"], ["18\nso"]),
        (regex, {"regex": r"\d{2}"}, ["a 12"], ["a 1"]),
        (regex, {"regex": ["a", "b"]}, ["ba"], ["a"]),
        (regex, {"pattern": "^ok$", "regex_flags": "im"}, ["x\nOK"], ["not ok"]),
        (regex, {"regex": "o+", "regex_match": "fullmatch"}, ["oo"], ["ook"]),
        (regex, {"regex": r"is (\w+)", "answer": "Oslo"}, ["is Rome, no, is Oslo"], ["is Oslo, no, is Rome"]),
        (regex, {"regex": r"(?P<x>a)(?P<answer>\d)", "answer": 1}, ["a1"], ["a2"]),
        (multiple_choice, {"answer": "B"}, ["\\boxed{B}", "Answer: (b)", "B", "**Answer:** B) Rome"], ["A", "", "Bob"]),
        (
            multiple_choice,
            {"answer": "B", "options": OPTIONS},
            ["\\boxed{Rome}", "\\boxed{\\text{B}}"],
            ["\\boxed{Oslo}"],
        ),
        (multiple_choice, {"answer": "Rome", "choices": OPTIONS}, ["The answer is B."], ["The answer is C."]),
        (multiple_choice, {"answer": "B", "options": [{"A": "x"}, {"B": "y"}]}, ["\\boxed{y}"], ["\\boxed{D}"]),
        (multiple_choice, {"answer": "B", "options": {"text": OPTIONS, "label": ["A", "B", "C"]}}, ["B"], ["C"]),
        (multiple_choice, {"answer": "A"}, ["I choose option A"], ["A man went out, and chose option B"]),
        (
            json_schema,
            {"json_schema": COUNTRY},
            ['{"name": "Oslo"}', '```json\n{"name": "A"}\n```'],
            ['{"name": "a"}', "no"],
        ),
        (json_schema, {"schema": '{"type": "number"}'}, ["1"], ["NaN", '"1"', "[" * 5000]),
        (
            tool_call,
            {"expected_calls": [ADD]},
            [CALL],
            [CALL + CALL, "add", CALL.replace("2", "3"), "<tool_call>{</tool_call>"],
        ),
        (
            tool_call,
            {"expected_calls": ADD},
            ["<function=add>" + '{"a": 1, "b": [2]}' + "</function>"],
            ['{"name": "add"}'],
        ),
        (
            tool_call,
            {"answer": '[{"name": "now", "arguments": {}}]'},
            ['{"name": "now"}', '```json\n[{"name": "now"}]\n```'],
            ["now"],
        ),
        (tool_call, {"tool_calls": []}, ["no tool is needed"], [CALL]),
        (
            tool_call,
            {"tool_calls": [{"type": "function", "function": {"name": "now", "arguments": "{}"}}, ADD]},
            [CALL + '<tool_call>{"name": "now"}</tool_call>'],
            [CALL],
        ),
        (
            tool_call,
            {"tool_calls": [{"name": "now"}, ADD], "ordered": True},
            ['<tool_call>{"name": "now"}</tool_call>' + CALL],
            [CALL + '<tool_call>{"name": "now"}</tool_call>'],
        ),
    ],
)
def test_right_answers_score_1_and_wrong_ones_0(module, row, right, wrong):
    assert module.problem(row) == ""
    assert [module.verify(text, row, {}).reward for text in right] == [1] * len(right)
    assert [module.verify(text, row, {}).reward for text in wrong] == [0] * len(wrong)


@pytest.mark.parametrize(
    ("module", "row", "problem"),
    [
        (exact, {}, "missing key expected_answer"),
        (exact, {"answer": "x", "match": "all"}, "match is 'all'"),
        (exact, {"answer": "x", "ignore_case": "yes"}, "ignore_case is not true or false"),
        (regex, {"regex": "("}, "no regular expression"),
        (regex, {"regex": 1}, "neither text"),
        (regex, {"regex": "x", "regex_flags": "q"}, "not letters of ims"),
        (multiple_choice, {"answer": "E", "options": OPTIONS}, "none of the options A, B, C"),
        (multiple_choice, {"answer": "18"}, "no letter"),
        (multiple_choice, {"answer": "A", "options": "A, B"}, "no list of 1 to 26 options"),
        (json_schema, {}, "missing key json_schema"),
        (json_schema, {"schema": "{"}, "not valid JSON"),
        (json_schema, {"schema": {"type": "objekt"}}, "no JSON schema"),
        (json_schema, {"schema": {"$ref": "https://example.com/x"}}, "refers to another document"),
        (tool_call, {"answer": "add(1)"}, "not valid JSON"),
        (tool_call, {"expected_calls": [{"arguments": {}}]}, "a call has no name"),
        (instruction_following, {}, "missing key instruction_id_list"),
        (instruction_following, {"instruction_id_list": ["no_commas"]}, "not known"),
        (
            instruction_following,
            {"instruction_id_list": ["punctuation:no_commas"]},
            "did you mean punctuation:no_comma",
        ),
        (instruction_following, {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "not a list of 1"),
        (instruction_following, {"instruction_id_list": ["keywords:frequency"]}, "lack keyword and frequency"),
    ],
)
def test_rows_that_cannot_be_verified_say_why(module, row, problem):
    assert problem in module.problem(row)


# For each of IFEval's constraints: its parameters, a text that keeps it, and one that does not.
KEPT = {
    "keywords:existence": ({"keywords": ["sea", "sun"]}, "The sun over the Sea", "The season's sun"),
    "keywords:frequency": ({"keyword": "so", "frequency": 2, "relation": "less than"}, "so it goes", "so so"),
    "keywords:forbidden_words": ({"forbidden_words": ["sun"]}, "sunny", "the Sun"),
    "keywords:letter_frequency": ({"letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
    "language:response_language": ({"language": "de"}, "Das ist ein ganz gewöhnlicher Satz.", "This is a sentence."),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"},
        "Dr. No paid 3.50. Really?",
        "Dr. No paid 3.50.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "it's two", "now it is three"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen, more.",
        "Then.\n\nFirst.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] of [town]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye\nP.S. more", "Bye"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n* b", "* a"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and **b**", "*a*"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1 a Section 2 b",
        "Section 1",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:title": ({}, "<<A title>>\ntext", "<<>> text"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, "Say it. It.", "It."),
    "startend:end_checker": ({"end_phrase": "The end."}, "So. the end.", "The end. So"),
    "startend:quotation": ({}, '"quoted"', "unquoted"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        "ONE word",
        "TWO WORDS",
    ),
    "change_case:english_capital": ({}, "ALL OF IT", "Some OF IT"),
    "change_case:english_lowercase": ({}, "all of it", "All of it"),
    "punctuation:no_comma": ({}, "none; at all", "one, at least"),
}


def test_every_constraint_is_tried():
    assert KEPT.keys() == CONSTRAINTS.keys()


@pytest.mark.parametrize("name", KEPT)
def test_constraints_are_kept_or_broken(name):
    if name.startswith("language:"):
        pytest.importorskip("langdetect")
    parameters, kept, broken = KEPT[name]
    row = {"instruction_id_list": [name], "kwargs": [parameters]}
    assert instruction_following.problem(row) == ""
    assert instruction_following.verify(kept, row, {}).reward == 1
    assert instruction_following.verify(broken, row, {}).reward == 0


def test_a_share_of_constraints_or_calls_may_be_rewarded():
    row = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "partial_reward": True}
    assert instruction_following.verify("a, b", row, {}).reward == 0
    assert instruction_following.verify("a b", row, {}).reward == 0.5
    two = {"expected_calls": [ADD, {"name": "now"}], "partial_reward": True}
    assert tool_call.verify(CALL, two, {}).reward == 0.5
    assert tool_call.verify(CALL, two, {}).components == {"valid_calls": 1, "right_names": 0.5}


def test_reasoning_gym_is_asked_for_where_it_is_not_installed(opened):
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="reasoning-gym is not installed"):
            opened().check([{"env_name": "reasoning_gym"}], ["rows.jsonl:1"])
    else:
        pytest.skip("it is installed")


def test_reasoning_gym_scores_its_own_tasks(opened, scored):
    pytest.importorskip("reasoning_gym")
    import reasoning_gym

    for entry in reasoning_gym.create_dataset("chain_sum", size=2, seed=1):
        row = {**entry, "env_name": "reasoning_gym"}
        opened().check([row], ["rows.jsonl:1"])
        answer = entry["answer"]
        right, tagged, wrong = scored(row, answer, f"so <answer>{answer}</answer>", f"<answer>{answer}7</answer>")
        assert (right.reward, tagged.reward) == (1, 1)
        assert wrong.reward < 1
    unknown = {**row, "metadata": {"source_dataset": "chain_sums"}}
    with pytest.raises(UserError, match="did you mean chain_sum"):
        opened().check([unknown], ["rows.jsonl:1"])


@pytest.mark.parametrize(
    "repeated", ["<tool_call>", "<tool_call> ", "<function=f>", "```\n", "{", "[", "<code>", "A ", "answer "]
)
def test_what_a_policy_repeats_is_read_in_no_time(repeated):
    started = time.process_time()
    text = repeated * 20_000
    tool_call.verify(text, {"expected_calls": [ADD]}, {})
    multiple_choice.verify(text, {"answer": "B", "options": OPTIONS}, {"multilingual": True})
    words_beside(text)
    program_of(text)
    assert time.process_time() - started < 2  # milliseconds where it is read once, minutes where it is not
