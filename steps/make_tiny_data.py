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
"""

from __future__ import annotations

import json
from hashlib import sha256
from itertools import accumulate, chain, pairwise, permutations
from pathlib import Path

STEPS = Path(__file__).parent
SFT_DATA = STEPS / "sft/megatron/data"
DPO_DATA = STEPS / "rl/nemo_rl/dpo/data"
RLVR_DATA = STEPS / "rl/nemo_rl/rlvr/data"
RM_DATA = STEPS / "rm/hf/data"
RLHF_DATA = STEPS / "rl/nemo_rl/rlhf/data"

# Rows of each kind (first digit below 5, or not); a file has twice as many.
HELD_OUT, SFT_TRAIN, DPO_TRAIN, RLVR_TRAIN = 60, 1400, 500, 1000
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


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main(
    sft_data: Path = SFT_DATA,
    dpo_data: Path = DPO_DATA,
    rm_data: Path = RM_DATA,
    rlvr_data: Path = RLVR_DATA,
    rlhf_data: Path = RLHF_DATA,
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


if __name__ == "__main__":
    main()
