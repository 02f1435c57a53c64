"""Which of a step's strategies a run calls for: their signs, looked for in its metrics, said in plain words. Pure.

A strategy's `sign` in the manifest is a list of conditions that hold together:

    sign:
      after: 20          # the run's steps before which it says nothing
      over: 20           # values of a metric looked at together; a third of few ones, a fiftieth of very many
      all:
        - {metric: train/mean_gen_tokens_per_sample, grows: 0.5}
        - {metric: train/reward, rises: 0.02}

metric: a name, or several, of which the first that a run has counts. A bound is a number, or {key, times}: the config's
value at this key, times a number. The conditions, of the last values' mean unless said otherwise:

    above, below    beyond a bound
    rises, falls    by so much from the first values to the last, and no longer the other way
    grows, shrinks  the same, as a share of the first values' mean
    above_least     by this share above the least mean that came before it
    flat            all means of quarters of the run within so much
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nemotron_launch.catalog import Step, Strategy
from nemotron_launch.frozen import frozen
from nemotron_launch.reports.metrics_file import MetricsFile

AFTER, OVER = 20, 20
_FEWEST = 3  # values of a metric without which nothing can be said
_KEY = re.compile(r"(?<![\w./])[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+(?![\w/]|\.\w)")


@frozen
class Warning:
    """What a run calls for. when, then: the strategy. seen: the numbers and steps. parameters: keys in `then`."""

    step: str
    when: str
    then: str
    seen: str
    metrics: tuple[str, ...]
    parameters: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        return {**vars(self), "metrics": list(self.metrics), "parameters": list(self.parameters)}


@frozen
class _Span:
    """Values of a metric that are looked at together."""

    mean: float
    first: int
    last: int

    def __str__(self) -> str:
        return f"{_shown(self.mean)} ({self.steps})"

    @property
    def steps(self) -> str:
        return f"step {self.first}" if self.first == self.last else f"steps {self.first}-{self.last}"


def warnings_of(step: Step, config: Mapping[str, Any], metrics: MetricsFile) -> list[Warning]:
    """The warnings that a run's numbers give, in the manifest's order. config: the run's composed one."""
    found = []
    for strategy in step.strategies:
        if strategy.sign is not None and (seen := _seen(strategy.sign, config, metrics)):
            names = tuple(name for name, _ in seen)
            text = "; ".join(words for _, words in seen)
            found.append(Warning(step.id, strategy.when, strategy.then, f"{text}.", names, parameters(strategy)))
    return found


def parameters(strategy: Strategy) -> tuple[str, ...]:
    """The config keys that a strategy says to change, in its order."""
    return tuple(dict.fromkeys(_KEY.findall(strategy.then)))


def metrics_of(sign: Mapping[str, Any]) -> list[str]:
    """Every metric that a sign names."""
    return [name for condition in sign["all"] for name in _names(condition)]


def _seen(sign: Mapping[str, Any], config: Mapping[str, Any], metrics: MetricsFile) -> list[tuple[str, str]]:
    """What each condition sees, by its metric; empty where one of them does not hold."""
    if (metrics.last_step or 0) < sign.get("after", AFTER):
        return []
    found = []
    for condition in sign["all"]:
        name = next((name for name in _names(condition) if metrics.steps(name)), None)
        values = _known(metrics, name) if name else []
        words = _holds(condition, config, values, sign.get("over", OVER)) if len(values) >= _FEWEST else None
        if name is None or words is None:
            return []
        found.append((name, f"{name} {words}"))
    return found


def _names(condition: Mapping[str, Any]) -> Sequence[str]:
    names = condition["metric"]
    return [names] if isinstance(names, str) else names


def _known(metrics: MetricsFile, name: str) -> list[tuple[int, float]]:
    return [
        (step, value)
        for step, value in zip(metrics.steps(name), metrics.values(name), strict=True)
        if math.isfinite(value)
    ]


def _holds(
    condition: Mapping[str, Any], config: Mapping[str, Any], values: Sequence[tuple[int, float]], over: int
) -> str | None:
    """What is seen, in words that follow the metric's name; None where the condition does not hold."""
    kind = next(name for name in condition if name != "metric")
    bound, origin = _bound(condition[kind], config)
    count = max(1, min(over, len(values) // 3), len(values) // 50)
    return None if bound is None else _KINDS[kind](values, bound, origin, count)


def _bound(given: Any, config: Mapping[str, Any]) -> tuple[float | None, str]:
    """The number, and where it comes from; None where the config has no number there."""
    if not isinstance(given, Mapping):
        return float(given), ""
    value: Any = config
    for part in given["key"].split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, ""
    times = given.get("times", 1)
    return value * times, f", {_shown(times)} times {given['key']}" if times != 1 else f", {given['key']}"


def _level(higher: bool) -> Callable[..., str | None]:
    def holds(values: Sequence[tuple[int, float]], bound: float, origin: str, count: int) -> str | None:
        last = _mean(values[-count:])
        if not (last.mean > bound if higher else last.mean < bound):
            return None
        return f"is {last}, {'above' if higher else 'below'} {_shown(bound)}{origin}"

    return holds


def _change(sign: int, *, share: bool) -> Callable[..., str | None]:
    def holds(values: Sequence[tuple[int, float]], bound: float, origin: str, count: int) -> str | None:
        first, last = _mean(values[:count]), _mean(values[-count:])
        middle = _mean(values[(len(values) - count) // 2 :][:count])
        least = bound * abs(first.mean) if share else bound
        still = sign * (last.mean - middle.mean) >= 0
        if not still or sign * (last.mean - first.mean) <= least:
            return None
        return f"went from {first} to {last}"

    return holds


def _above_least(values: Sequence[tuple[int, float]], bound: float, origin: str, count: int) -> str | None:
    parts = [_mean(values[i : i + count]) for i in range(0, len(values) - count + 1, count)]
    least, last = min(parts, key=lambda part: part.mean), _mean(values[-count:])
    if last.first <= least.last or last.mean <= least.mean + bound * abs(least.mean):
        return None
    return f"rose again, from {least} to {last}"


def _flat(values: Sequence[tuple[int, float]], bound: float, origin: str, count: int) -> str | None:
    if len(values) < 4:
        return None
    cuts = [i * len(values) // 4 for i in range(5)]
    parts = [_mean(values[start:end]).mean for start, end in zip(cuts, cuts[1:], strict=False)]
    if max(parts) - min(parts) > bound:
        return None
    return f"stays near {_shown(sum(parts) / 4)} (steps {values[0][0]}-{values[-1][0]})"


_KINDS: Mapping[str, Callable[..., str | None]] = {
    "above": _level(True),
    "below": _level(False),
    "rises": _change(1, share=False),
    "falls": _change(-1, share=False),
    "grows": _change(1, share=True),
    "shrinks": _change(-1, share=True),
    "above_least": _above_least,
    "flat": _flat,
}
KINDS = tuple(_KINDS)


def _mean(values: Iterable[tuple[int, float]]) -> _Span:
    taken = list(values)
    return _Span(math.fsum(value for _, value in taken) / len(taken), taken[0][0], taken[-1][0])


def _shown(value: float) -> str:
    return f"{value:.3g}"
