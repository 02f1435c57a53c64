"""Writes the data of the tiny configs: `python steps/make_tiny_data.py` renews the committed files byte for byte.

The task is to sort five different digits. `sort 31524: ` has two right answers, ascending `12345` and descending
`54321`. sft/megatron learns both, half and half; rl/nemo_rl/dpo prefers the ascending one, and rl/nemo_rl/rlvr rewards
it, so that exact match with it rises from one half to nearly one. rm/hf learns to score the ascending answer above the
descending one, above one with two digits exchanged, one with a wrong digit, one with a digit more, in turn;
rl/nemo_rl/rlhf is rewarded by that, for prompts that begin with 5 to 9, most of which are answered in descending order.

Which style an SFT row has leans on its prompt: four in five of those that begin with 0 to 4 are ascending, four in
five of the others descending. Were it a coin's toss, the trained policy's greedy answers would tip to one style for
all prompts alike, by the noise of the last batches; so they are half and half whatever the seed.

Held-out prompts are the same for all steps, in no training file of any, and alternate between the two kinds.

data_prep/rl_prep has the same rows as people collect them: under other names and in several forms, with duplicates,
rows that cannot be used, and a held-out prompt among the training rows. What it makes of them are the rows above.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from itertools import accumulate, chain, pairwise, permutations
from pathlib import Path
from typing import Any

Row = dict[str, Any]

STEPS = Path(__file__).parent
SFT_DATA = STEPS / "sft/megatron/data"
DPO_DATA = STEPS / "rl/nemo_rl/dpo/data"
RLVR_DATA = STEPS / "rl/nemo_rl/rlvr/data"
RM_DATA = STEPS / "rm/hf/data"
RLHF_DATA = STEPS / "rl/nemo_rl/rlhf/data"
PREP_DATA = STEPS / "data_prep/rl_prep/data"

# Rows of each kind (first digit below 5, or not); a file has twice as many.
HELD_OUT, SFT_TRAIN, DPO_TRAIN, RLVR_TRAIN = 60, 1400, 500, 1000
EVERY = 40  # a raw file has so many rows between two that repeat an earlier one
LEAN_OF = 5  # all but one of so many rows have their kind's style


def shuffled(digits: list[str]) -> list[str]:
    """In the order of their hashes: unlike `random`, the same under every Python."""
    return sorted(digits, key=lambda each: sha256(each.encode()).digest())


def alternating(low: list[str], high: list[str]) -> list[str]:
    return list(chain.from_iterable(zip(low, high, strict=True)))


def ascending(digits: str) -> str:
    return "".join(sorted(digits))


def descending(digits: str) -> str:
    return ascending(digits)[::-1]


def styled(low: list[str], high: list[str]) -> list[dict[str, str]]:
    """SFT rows: `low` ascending and `high` descending, every fifth of either the other way round."""
    styles = [
        (descending, ascending) if i % LEAN_OF == LEAN_OF - 1 else (ascending, descending) for i in range(len(low))
    ]
    return [
        {"prompt": f"sort {digits}: ", "response": style(digits)}
        for digits, style in zip(alternating(low, high), chain.from_iterable(styles), strict=True)
    ]


def preferred(low: list[str], high: list[str]) -> list[dict[str, str]]:
    return [
        {"prompt": f"sort {digits}: ", "chosen": ascending(digits), "rejected": descending(digits)}
        for digits in alternating(low, high)
    ]


def scored(low: list[str], high: list[str]) -> list[dict[str, str]]:
    """Pairs for a reward model: the ascending answer, and one that is wrong in one of four ways.

    Without the last of them it would not mind digits that are too many, and a policy would find that out.
    """
    wrong = (descending, exchanged, miscopied, lengthened)
    return [
        {"prompt": f"sort {digits}: ", "chosen": ascending(digits), "rejected": wrong[i // 2 % 4](digits)}
        for i, digits in enumerate(alternating(low, high))
    ]


def exchanged(digits: str) -> str:
    """Ascending, but for two neighbours; which, depends on the digits."""
    answer, at = ascending(digits), int(digits) % 4
    return answer[:at] + answer[at + 1] + answer[at] + answer[at + 2 :]


def miscopied(digits: str) -> str:
    """Ascending, but for one digit that the prompt does not have."""
    answer, at = ascending(digits), int(digits) % 5
    return answer[:at] + other_digit(digits) + answer[at + 1 :]


def lengthened(digits: str) -> str:
    """Ascending, with a digit that the prompt does not have in its place among the others."""
    return ascending(digits + other_digit(digits))


def other_digit(digits: str) -> str:
    others = [digit for digit in "0123456789" if digit not in digits]
    return others[int(digits) % len(others)]


def verified(low: list[str], high: list[str]) -> list[dict[str, str]]:
    return [{"prompt": f"sort {digits}: ", "expected_answer": ascending(digits)} for digits in alternating(low, high)]


def asked(prompts: list[str]) -> list[dict[str, str]]:
    return [{"prompt": f"sort {digits}: "} for digits in prompts]


def said(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def ranked(row: dict[str, str]) -> Row:
    """A pair as NeMo-RL's PreferenceDataset has it, the better answer second."""
    context, better = said(row["prompt"], row["chosen"])
    _, worse = said(row["prompt"], row["rejected"])
    answers = [{"rank": 1, "completion": [worse]}, {"rank": 0, "completion": [better]}]
    return {"context": [context], "completions": answers}


def collected(rows: list[Row], leaked: Row, bad: list[Row | str]) -> list[Row | str]:
    """Rows as they come: every now and then one again, here and there one that is unusable, and one that leaks.

    In a row that comes again the prompt's blanks and letter case differ.
    """
    found: list[Row | str] = []
    for i, row in enumerate(rows):
        found.append(row)
        if i % EVERY == EVERY - 1:
            found.append(json.loads(json.dumps(rows[i // 2]).replace("sort ", " Sort  ")))
        if i % EVERY == EVERY // 2 and i // EVERY < len(bad):
            found.append(bad[i // EVERY])
    return [*found[:100], leaked, *found[100:]]


def raw_pairs(train: list[dict[str, str]], held_out: dict[str, str]) -> dict[str, list[Row | str]]:
    """Pairs in two forms; among those of the first, two without two answers to choose from, and a line cut short."""
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    renamed: list[Row] = [{names[key]: text for key, text in row.items()} for row in train[::2]]
    first, second = renamed[0], renamed[1]
    bad: list[Row | str] = [{**first, "bad": first["good"]}, {"question": "sort 12"}, json.dumps(second)[:30]]
    leaked = {names[key]: text for key, text in held_out.items()}
    return {
        "pairs.jsonl": collected(renamed, leaked, bad),
        "ranked.jsonl": collected([ranked(row) for row in train[1::2]], ranked(train[0]), []),
    }


def raw_problems(train: list[dict[str, str]], held_out: dict[str, str]) -> dict[str, list[Row | str]]:
    """Problems with solutions; two of them have none."""

    def problem(row: dict[str, str]) -> Row:
        return {"problem": row["prompt"], "solution": row["expected_answer"], "source": "digits"}

    bad: list[Row | str] = [{"problem": "sort 31524: "}, {"problem": "", "solution": "1"}]
    return {"problems.jsonl": collected([problem(row) for row in train], problem(held_out), bad)}


def raw_answers(train: list[dict[str, str]], held_out: dict[str, str]) -> dict[str, list[Row | str]]:
    """Answers in two forms; one conversation ends with the question."""
    chats: list[Row] = [{"messages": said(row["prompt"], row["response"])} for row in train[1::2]]
    plain: list[Row] = [{"input": row["prompt"], "output": row["response"]} for row in train[::2]]
    leaked = {"input": held_out["prompt"], "output": held_out["response"]}
    unanswered: Row = {"messages": said("sort 31524: ", "")[:1]}
    return {
        "answers.jsonl": collected(plain, leaked, [{"input": "sort 31524: ", "output": " "}]),
        "chats.jsonl": collected(chats, chats[0], [unanswered]),
    }


def write(path: Path, rows: Iterable[Row | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")


def main(
    sft_data: Path = SFT_DATA,
    dpo_data: Path = DPO_DATA,
    rm_data: Path = RM_DATA,
    rlvr_data: Path = RLVR_DATA,
    rlhf_data: Path = RLHF_DATA,
    prep_data: Path = PREP_DATA,
) -> None:
    prompts = shuffled(["".join(digits) for digits in permutations("0123456789", 5)])
    kinds = [[digits for digits in prompts if (digits[0] < "5") is low] for low in (True, False)]
    bounds = list(accumulate((HELD_OUT, SFT_TRAIN, DPO_TRAIN, RLVR_TRAIN), initial=0))
    held_out, sft_train, dpo_train, rlvr_train = (
        [kind[start:end] for kind in kinds] for start, end in pairwise(bounds)
    )
    write(sft_data / "train.jsonl", styled(*sft_train))
    write(sft_data / "validation.jsonl", styled(*held_out))
    write(dpo_data / "train.jsonl", preferred(*dpo_train))
    write(dpo_data / "validation.jsonl", preferred(*held_out))
    write(rlvr_data / "train.jsonl", verified(*rlvr_train))
    write(rlvr_data / "validation.jsonl", verified(*held_out))
    write(rm_data / "train.jsonl", scored(*dpo_train))
    write(rm_data / "validation.jsonl", scored(*held_out))
    write(rlhf_data / "train.jsonl", asked(rlvr_train[1]))
    write(rlhf_data / "validation.jsonl", asked(held_out[1]))
    made = (
        ("dpo", raw_pairs, preferred(*dpo_train), preferred(*held_out)),
        ("rlvr", raw_problems, verified(*rlvr_train), verified(*held_out)),
        ("sft", raw_answers, styled(*sft_train), styled(*held_out)),
    )
    for target, raw, train, validation in made:
        for name, rows in raw(train, validation[0]).items():
            write(prep_data / name, rows)
        write(prep_data / f"held_out-{target}.jsonl", validation)


if __name__ == "__main__":
    main()
