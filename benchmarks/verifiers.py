"""How fast answers are verified on one core, and whether they are verified right: GSM8K, mathematics, programs.

    python benchmarks/verifiers.py [--gsm8k FOLDER] [--json]

FOLDER (or NEMOTRON_TEST_GSM8K) holds GSM8K's train.jsonl and test.jsonl, and preferences.{train,validation}.jsonl with
prompt, chosen and rejected. A row a kind of answer: checks a second of wall-clock time, workers' start-up included in
`first`, not in `again`; and how many were scored as they should be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron_launch.config.compose import compose
from nemotron_launch.trainer.environments import Rollout, open_environments
from nemotron_launch.trainer.environments.router import Environments

REPOSITORY = Path(__file__).resolve().parent.parent
STEP = REPOSITORY / "steps/rl/nemo_rl/rlvr"
ADD = "```python\ndef add(a, b):\n    return a + b\n```"
# (said, right, whether it is): what plain numbers do not decide.
EXPRESSIONS = [
    (r"\boxed{2^{1/2}}", r"\sqrt{2}", True),
    (r"\boxed{1 + x^2}", "x^2+1", True),
    (r"\boxed{\frac{2\pi}{4}}", r"\frac{\pi}{2}", True),
    (r"\boxed{(1, 3)}", "(1, 2)", False),
    (r"\boxed{x^2 - 1}", "x^2+1", False),
]

Case = tuple[Rollout, bool]


def gsm8k(folder: Path) -> Iterator[tuple[str, list[Case]]]:
    """Reference solutions, and solutions that people marked as right and wrong."""

    def read(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]

    test = read("test.jsonl")
    right = {
        _plain(row["question"]): row["answer"].rsplit("####", 1)[1].strip() for row in [*test, *read("train.jsonl")]
    }
    yield (
        "GSM8K, reference solutions",
        [(_rollout(row["answer"], right[_plain(row["question"])]), True) for row in test],
    )
    for name in ("preferences.train.jsonl", "preferences.validation.jsonl"):
        for kind, is_right in (("chosen", True), ("rejected", False)):
            cases = [(_rollout(row[kind], right[_plain(row["prompt"])]), is_right) for row in read(name)]
            yield f"{name}, {kind}", cases


def measure(environments: Environments, cases: list[Case]) -> dict[str, float]:
    """Checks a second, the first time and again, and the share that is scored right."""
    rollouts, wanted = [[rollout] for rollout, _ in cases], [float(is_right) for _, is_right in cases]
    seconds, right = [], 0
    for _ in range(2):
        start = time.perf_counter()
        scores = environments.score(rollouts)
        seconds.append(time.perf_counter() - start)
        right = sum(score.reward == reward for (score,), reward in zip(scores, wanted, strict=True))
    first, again = (len(cases) / taken for taken in seconds)
    return {"checks": len(cases), "first": first, "again": again, "right": right}


def _plain(question: str) -> str:
    return " ".join(question.split())


def _rollout(text: str, right: str) -> Rollout:
    return Rollout([], text, {"expected_answer": right})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = os.environ.get("NEMOTRON_TEST_GSM8K", str(REPOSITORY / "../shared/data/gsm8k"))
    parser.add_argument("--gsm8k", type=Path, default=Path(default))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kinds = list(gsm8k(arguments.gsm8k)) if arguments.gsm8k.is_dir() else []
    kinds.append(
        ("expressions, by math-verify", [(_rollout(said, right), ok) for said, right, ok in EXPRESSIONS * 200])
    )
    tests = {"env_name": "code", "tests": ["assert add(1, 2) == 3"]}
    kinds.append(("programs, in the sandbox", [(Rollout([], ADD, tests), True)] * 50))
    config: dict[str, Any] = compose(STEP / "config/default.yaml", [], schema=STEP / "schema.json").data
    rows = {}
    with open_environments(config) as environments:
        for name, cases in kinds:
            rows[name] = measure(environments, cases)
            if not arguments.json:
                shown = rows[name]
                print(
                    f"{name:40} {shown['first']:9.0f} {shown['again']:9.0f} /s  {shown['right']} of {shown['checks']}"
                )
    if arguments.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
