"""Sends each row to the environment that scores it: the one it names, NeMo Gym for its agent_ref, or the config's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemotron_launch.config.checks_rewards import ENVIRONMENTS
from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import Environment, Rollout, Score
from nemotron_launch.trainer.environments.bad_rows import refuse_bad_rows
from nemotron_launch.trainer.environments.verified import Verified, Verifier
from nemotron_launch.trainer.environments.workers import WorkerPool

PYTHON = "python:"
#: Those that mostly wait, for servers or subprocesses: they score while others compute.
_WAITING = ("nemo_gym", "judge", "code")
#: Address space of a worker that runs our own verifiers.
_WORKER_MIB = 4096


class Environments:
    """The environments of a config, each opened when the first row asks for it.

    step_dir: what `step://` stands for; rank: tells the files of several processes apart. `check` allows the share
    of rows that data.max_bad_rows says; those rows get the reward 0 and an error, or `problems` tells them before.
    """

    def __init__(self, config: Mapping[str, Any], *, step_dir: Path | None = None, rank: int = 0) -> None:
        self._config = config
        self._step_dir = step_dir
        self._rank = rank
        self._env: Mapping[str, Any] = config["env"]
        self._opened: dict[str, Environment] = {}

    def name_of(self, row: Mapping[str, Any]) -> str:
        """What scores a row; empty if nothing says it."""
        own = row.get("env_name")
        if own:
            return str(own)
        if row.get("agent_ref") and self._env["should_use_nemo_gym"]:
            return "nemo_gym"
        data = self._config["data"]
        sections = (data.get("train") or {}, data.get("default") or {})
        return next((part["env_name"] for part in sections if part.get("env_name")), "")

    def problems(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """For each row why it cannot be scored; empty if it can. Raises UserError for what is no row's fault."""
        names = [self.name_of(row) for row in rows]
        found = [self._problem_of_name(name) for name in names]
        for name in dict.fromkeys(name for name, problem in zip(names, found, strict=True) if not problem):
            environment = self._environment(name)
            own = [i for i, other in enumerate(names) if other == name]
            for i, problem in zip(own, _problems(environment, [rows[i] for i in own]), strict=True):
                said = not problem or (name.startswith(PYTHON) and name in problem)
                found[i] = problem if said else f"{problem} (environment {name})"
        return found

    def check(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None:
        """Raise UserError if too many rows cannot be scored, with file, line and field of the first ones."""
        refuse_bad_rows(self.problems(rows), wheres, allowed=self._config["data"].get("max_bad_rows") or 0.0)

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """A score for each rollout, in the same shape and order, whatever the environments do at the same time."""
        scores: list[list[Score]] = [[Score(0.0)] * len(group) for group in groups]
        places: dict[str, list[list[tuple[int, int]]]] = {}
        for g, group in enumerate(groups):
            for name, own in self._by_name(group).items():
                places.setdefault(name, []).append([(g, i) for i in own])
        jobs = {name: [[groups[g][i] for g, i in part] for part in parts] for name, parts in places.items()}
        for name, found in self._score_all(jobs).items():
            for part, part_scores in zip(places[name], found, strict=True):
                for (g, i), score in zip(part, part_scores, strict=True):
                    scores[g][i] = score
        return scores

    def close(self) -> None:
        """End all workers and servers that were started."""
        opened, self._opened = self._opened, {}
        for environment in opened.values():
            environment.close()

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _by_name(self, group: Sequence[Rollout]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, rollout in enumerate(group):
            name = self.name_of(rollout.row)
            found.setdefault("" if self._problem_of_name(name) else name, []).append(i)
        return found

    def _score_all(self, jobs: Mapping[str, list[list[Rollout]]]) -> dict[str, list[list[Score]]]:
        found: dict[str, list[list[Score]]] = {}
        environments = {name: self._environment(name) for name in jobs if name}
        aside = [name for name in environments if name in _WAITING] if len(environments) > 1 else []
        with ThreadPoolExecutor(max(len(aside), 1), "environment") as threads:
            futures = {name: threads.submit(environments[name].score, jobs[name]) for name in aside}
            for name, groups in jobs.items():
                if not name:
                    found[name] = [[self._unknown(rollout) for rollout in group] for group in groups]
                elif name not in futures:
                    found[name] = environments[name].score(groups)
            found |= {name: future.result() for name, future in futures.items()}
        return found

    def _unknown(self, rollout: Rollout) -> Score:
        return Score(0.0, error=self._problem_of_name(self.name_of(rollout.row)))

    def _problem_of_name(self, name: str) -> str:
        if not name:
            return "nothing says what scores it: no env_name, here or in data.default"
        if name in ENVIRONMENTS or name.startswith(PYTHON):
            if name == "nemo_gym" and not self._env["should_use_nemo_gym"]:
                return "env_name is nemo_gym, but env.should_use_nemo_gym is false"
            return ""
        return f"there is no environment {name}"

    def _environment(self, name: str) -> Environment:
        if name not in self._opened:
            self._opened[name] = self._open(name)
        return self._opened[name]

    def _open(self, name: str) -> Environment:
        verifier = _verifier(name, self._env["math"]["verifier_type"])
        if verifier is not None:
            return self._verified(verifier, "math" if name == "math" else "verifiers")
        if name.startswith(PYTHON):
            from nemotron_launch.trainer.environments.python_function import PythonEnvironment

            return PythonEnvironment(name.removeprefix(PYTHON), self._pool("verifiers", memory_mib=None))
        if name == "code":
            from nemotron_launch.trainer.environments.code import CodeEnvironment

            return CodeEnvironment(self._env["code"])
        if name == "nemo_gym":
            from nemotron_launch.trainer.environments.nemo_gym import NemoGymEnvironment

            return NemoGymEnvironment(self._env["nemo_gym"])
        if name == "judge":
            from nemotron_launch.trainer.environments.judge import JudgeEnvironment

            output_dir = Path(self._config["output_dir"])
            return JudgeEnvironment(self._env["judge"], step_dir=self._step_dir, output_dir=output_dir, rank=self._rank)
        if name == "reward_model":
            from nemotron_launch.trainer.environments.reward_model import RewardModelEnvironment

            return RewardModelEnvironment(self._env["reward_model"], step_dir=self._step_dir)
        raise UserError(f"there is no environment {name}", where="env_name")

    def _verified(self, verifier: Verifier, section: str) -> Environment:
        pool = self._pool(section, memory_mib=_WORKER_MIB) if verifier.slow else None
        return Verified(verifier, pool, {**self._env[section], **verifier.options})

    def _pool(self, section: str, *, memory_mib: int | None) -> WorkerPool:
        options = self._env[section]
        return WorkerPool(size=options["num_workers"], timeout=options["timeout"], memory_mib=memory_mib)


def _verifier(name: str, math_type: str) -> Verifier | None:
    """The verifiers of single answers; those that call what may hang, or needs a main thread, have a slow part."""
    if name == "math" and math_type == "math":
        from nemotron_launch.trainer.environments import math

        return Verifier(math.problem, math.quick, f"{math.__name__}_expressions:compare")
    if name == "math" or name == "multiple_choice":
        from nemotron_launch.trainer.environments import multiple_choice

        multilingual = name == "math" and math_type.startswith("multilingual")
        return Verifier(multiple_choice.problem, multiple_choice.verify, options={"multilingual": multilingual})
    if name == "exact":
        from nemotron_launch.trainer.environments import exact

        return Verifier(exact.problem, exact.verify)
    if name == "regex":
        from nemotron_launch.trainer.environments import regex

        return Verifier(regex.problem, slow=f"{regex.__name__}:verify")
    if name == "json_schema":
        from nemotron_launch.trainer.environments import json_schema

        return Verifier(json_schema.problem, slow=f"{json_schema.__name__}:verify")
    if name == "tool_call":
        from nemotron_launch.trainer.environments import tool_call

        return Verifier(tool_call.problem, tool_call.verify)
    if name == "instruction_following":
        from nemotron_launch.trainer.environments import instruction_following

        return Verifier(instruction_following.problem, slow=f"{instruction_following.__name__}:verify")
    if name == "reasoning_gym":
        if find_spec("reasoning_gym") is None:
            raise UserError(
                "reasoning-gym is not installed",
                where="env_name: reasoning_gym",
                hint="pip install 'nemotron-launch[rewards]'",
                exit_code=1,
            )
        from nemotron_launch.trainer.environments import reasoning_gym

        return Verifier(reasoning_gym.problem, slow=f"{reasoning_gym.__name__}:verify")
    return None


def _problems(environment: Environment, rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What an environment has against each row; one that only checks has nothing against single rows."""
    problems = getattr(environment, "problems", None)
    if problems is not None:
        return list(problems(rows))
    problem: Callable[[Mapping[str, Any]], str] | None = getattr(environment, "problem", None)
    if problem is not None:
        return [problem(row) for row in rows]
    environment.check(rows, [""] * len(rows))
    return [""] * len(rows)
