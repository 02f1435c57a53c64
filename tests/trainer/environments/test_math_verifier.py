"""The verifier math: what counts as the answer, and when two answers are the same."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from nemotron_launch.trainer.environments.answers import final_answer, without_thoughts
from nemotron_launch.trainer.environments.math import Plain, plain_number, quick


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Half of 36.\n#### 18", "18"),
        ("so it is 18\nA: 18", "18"),
        ("**Answer:** 18 dollars\nI hope this helps: bye", "18 dollars"),
        ("Final answer: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("The answer is 18.", "18."),
        ("\\boxed{17} is wrong, it is \\boxed{18}", "18"),
        ("\\boxed{17}\n#### 18", "18"),
        ("#### 17\n\\boxed{18}", "18"),
        ("#### $\\boxed{18}$", "18"),
        ("\\boxed{a \\} b}", "a \\} b"),
        ("\\boxed{\\{1, 2\\}} or {", "\\{1, 2\\}"),
        ("\\boxed{a \\boxed{b}}", "b"),
        ("\\boxed{18", None),
        ("Answer:\n\n18", "18"),
        ("####", ""),
        ("a: 18", None),
        ("it is 18", None),
    ],
)
def test_the_answer_is_what_is_announced_last(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>#### 17</think>#### 18", "#### 18"),
        ("#### 17</think>\n18", "\n18"),  # the template wrote <think>
        ("<think>#### 17", ""),
        ("18", "18"),
    ],
)
def test_reasoning_is_no_answer(text, rest):
    assert without_thoughts(text) == rest


@pytest.mark.parametrize(
    ("text", "value", "measure"),
    [
        ("18", 18, ""),
        ("-18.50", Fraction(-37, 2), ""),
        ("\u221218", -18, ""),
        ("1,234,567", 1234567, ""),
        ("1{,}000", 1000, ""),
        ("$1,000.", 1000, "$"),
        ("\\$18", 18, "$"),
        ("-$3", -3, "$"),
        ("$-3", -3, "$"),
        ("$18$", 18, ""),
        ("\\(18\\)", 18, ""),
        ("**18 eggs**", 18, ""),
        ("50\\%", 50, "%"),
        ("50 percent", 50, "%"),
        ("1/2", Fraction(1, 2), ""),
        ("2 1/2", Fraction(5, 2), ""),
        ("2\\frac{1}{2}", Fraction(5, 2), ""),
        ("\\dfrac{1}{2}", Fraction(1, 2), ""),
        ("5 km", 5, "km"),
        ("5km", 5, "km"),
        ("18\\text{ minutes}", 18, "minute"),
        ("10 dollars per day", 10, "$"),
        ("18 eggs per day", 18, ""),
    ],
)
def test_numbers_are_read_as_people_write_them(text, value, measure):
    assert plain_number(text) == Plain(Fraction(value), measure)


@pytest.mark.parametrize("text", ["5x", "2 pi", "18 or 19", "1,00", "3/0", "x=5", "+-3", "10^5", "(1, 2)", "eighteen"])
def test_what_is_more_than_a_number_is_left_to_math_verify(text):
    assert plain_number(text) is None


@pytest.mark.parametrize(
    ("said", "right", "reward"),
    [
        ("18", "18.0", 1),
        ("18", 18.0, 1),
        ("$18", "18 dollars", 1),
        ("18 duck eggs", "18 eggs", 1),
        ("5 km", "5", 1),
        ("5 m", "5 km", 0),
        ("50%", "50", 1),
        ("0.5", "50%", 1),
        ("0.5%", "50%", 0),
        ("0.50", "50", 0),
        ("2", "2.0000001", 0),
        ("18", ["17", "18"], 1),
        ("", "18", 0),
        ("9" * 2000, "18", 0),
    ],
)
def test_plain_numbers_are_compared_at_once(said, right, reward):
    score = quick(f"#### {said}", {"expected_answer": right}, {})
    assert score is not None
    assert score.reward == reward


@pytest.mark.parametrize(
    ("said", "right", "reward"),
    [
        (r"\boxed{2^{1/2}}", r"\(\sqrt{2}\)", 1),
        (r"\boxed{1 + x^2}", "x^2+1", 1),
        (r"\boxed{x^2 - 1}", "x^2+1", 0),
        (r"\boxed{\left(1, 2\right)}", "(1,2)", 1),
        (r"\boxed{0.3333333333}", r"\frac{1}{3}", 0),
        (r"\boxed{\frac{2\pi}{4}}", r"\frac{\pi}{2}", 1),
        (r"\boxed{x = 5}", "5", 1),
        ("I think that it is 18, all in all", "18", 1),
        ("no idea", "18", 0),
    ],
)
def test_everything_else_is_compared_as_mathematics(scored, said, right, reward):
    (score,) = scored({"expected_answer": right}, said)
    assert (score.reward, score.error) == (reward, "")


def test_an_answer_that_takes_for_ever_scores_0_and_is_counted(opened):
    from nemotron_launch.trainer.environments import Rollout

    environments = opened(math={"timeout": 2})
    row = {"expected_answer": "x^2+1"}
    towers = [Rollout([], rf"\boxed{{9^{{9^{{9^{{9^{{{n}}}}}}}}}}}", row) for n in (7, 8)]
    first, second, right = environments.score([[*towers, Rollout([], r"\boxed{1+x^2}", row)]])[0]
    assert (first.reward, second.reward, right.reward) == (0, 0, 1)
    assert first.error
    assert second.error
    assert not right.error


def test_letters_are_compared_where_the_config_says_so(opened):
    from nemotron_launch.trainer.environments import Rollout

    row = {"expected_answer": "B"}
    english = opened(math={"verifier_type": "english_multichoice"})
    others = opened(math={"verifier_type": "multilingual_multichoice"})
    texts = ["Answer: B", "Antwort: B", "答案：Ｂ", "الإجابة: ب", "Answer: C"]
    group = [[Rollout([], text, row) for text in texts]]
    assert [score.reward for score in english.score(group)[0]] == [1, 0, 0, 0, 0]
    assert [score.reward for score in others.score(group)[0]] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "repeated", ["\\boxed{", "#### ", "answer is ", "{", "\\boxed{1}", "<think>", "A: \n", "$", "1,", "- "]
)
def test_what_a_policy_repeats_is_read_in_no_time(repeated):
    started = time.process_time()
    quick(repeated * 20_000, {"expected_answer": "18"}, {})
    plain_number(repeated * 300)
    assert time.process_time() - started < 2  # milliseconds where it is read once, minutes where it is not
