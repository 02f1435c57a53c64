"""A probe's summary to look at: a table for the terminal, one HTML page with plots that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from nemotron_launch.trainer.probe import Finding

WIDTH, HEIGHT, MARGIN = 420, 180, 34
BAR = 30  # characters of the longest bar in a terminal


def table(data: dict[str, Any]) -> str:
    """Plain text: the numbers, the histogram, what to read, what to know."""
    return "\n".join(_lines(data))


def _lines(data: dict[str, Any]) -> Iterator[str]:
    reward, length, verifier = data["reward"], data["length"], data["verifier"]
    yield f"policy            {data['policy']}"
    yield f"rollouts          {data['prompts']} prompts × {data['samples_per_prompt']}"
    yield f"reward            mean {reward['mean']:.4g}   from {reward['min']:.4g} to {reward['max']:.4g}"
    yield (
        f"spread of reward  {reward['std']:.4g}   within prompts {reward['std_within_prompts']:.4g}   "
        f"between prompts {reward['std_between_prompts']:.4g}"
    )
    yield f"equal groups      {_percent(data['groups_without_variance'])} have no variance"
    yield (
        f"length            mean {length['mean']:.4g}   median {length['median']:.4g}   "
        f"from {length['min']:.0f} to {length['max']:.0f} tokens   {_percent(length['truncated'])} truncated"
    )
    correlation = length["correlation_with_reward"]
    yield f"length, reward    correlation {'none' if correlation is None else f'{correlation:.2f}'} within groups"
    yield (
        f"verifier          {verifier['errors']} errors   {verifier['lost']} lost   "
        f"{1000 * verifier['mean_seconds']:.3g} ms a rollout"
    )
    for slow in verifier["slowest"]:
        yield f"  slowest         {slow['seconds']:.3g} s   {slow['source']}"
    for name, value in data["components"].items():
        yield f"  {name:<15} {value:.4g}"
    yield ""
    yield from _bars(reward["histogram"])
    for name in ("best", "worst"):
        for sample in data[name]:
            yield f"{name:<6} {sample['reward']:>8.4g}  {_short(sample['question'])} → {_short(sample['answer'])}"
    yield ""
    if not data["findings"]:
        yield "Nothing speaks against training."
    for finding in data["findings"]:
        yield f"{'stop' if finding['fatal'] else 'note'}: {finding['text']}"
        yield f"      {finding['advice']}"


def _bars(histogram: dict[str, Any]) -> Iterator[str]:
    most = max(histogram["counts"], default=0)
    for low, high, count in zip(histogram["edges"], histogram["edges"][1:], histogram["counts"], strict=False):
        if count:
            yield f"{low:>9.3g} to {high:<9.3g} {'█' * max(1, round(BAR * count / most))} {count}"
    if most:
        yield ""


def page(data: dict[str, Any], found: Sequence[Finding]) -> str:
    """One self-contained page. Everything that comes from data or models is escaped."""
    reward, length = data["reward"], data["length"]
    correlation = length["correlation_with_reward"]
    numbers = {
        "policy": data["policy"],
        "rollouts": f"{data['prompts']} prompts × {data['samples_per_prompt']}",
        "reward": f"mean {reward['mean']:.4g}, from {reward['min']:.4g} to {reward['max']:.4g}",
        "spread of reward": f"{reward['std']:.4g} (within prompts {reward['std_within_prompts']:.4g}, "
        f"between prompts {reward['std_between_prompts']:.4g})",
        "groups without variance": _percent(data["groups_without_variance"]),
        "length": f"mean {length['mean']:.4g}, median {length['median']:.4g}, at most {length['max']:.0f} tokens",
        "truncated": _percent(length["truncated"]),
        "length and reward": "no correlation"
        if correlation is None
        else f"correlation {correlation:.2f} within groups",
        "verifier": f"{data['verifier']['errors']} errors, {data['verifier']['lost']} lost, "
        f"{1000 * data['verifier']['mean_seconds']:.3g} ms a rollout",
        **{f"part: {name}": f"{value:.4g}" for name, value in data["components"].items()},
    }
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in numbers.items())
    notes = "".join(
        f'<li class="{"stop" if finding.fatal else "note"}"><b>{escape(finding.text)}</b><br>'
        f"{escape(finding.advice)}</li>"
        for finding in found
    )
    by_prompt = sorted(((p["mean"], p["std"]) for p in data["by_prompt"] if p["mean"] == p["mean"]), key=lambda p: p[0])
    plots = (
        _figure("Rewards", _histogram(reward["histogram"]))
        + _figure("Mean reward of each prompt, in order; bars: one standard deviation", _means(by_prompt))
        + _figure("Length (tokens) and reward", _scatter([(p["tokens"], p["reward"]) for p in data["points"]]))
    )
    samples = "".join(
        f"<h3>{title}</h3>" + "".join(_sample(sample) for sample in data[name])
        for name, title in (("best", "Best answers"), ("worst", "Worst answers"))
    )
    return _PAGE.format(
        rows=rows, notes=notes or "<li>Nothing speaks against training.</li>", plots=plots, samples=samples
    )


def _sample(sample: dict[str, Any]) -> str:
    error = f" · {escape(sample['error'])}" if sample["error"] else ""
    return (
        f"<article><header>reward {sample['reward']:.4g} · {sample['tokens']} tokens · "
        f"{escape(sample['source'])}{error}</header>"
        f"<pre>{escape(sample['question'])}</pre><pre class=answer>{escape(sample['answer'])}</pre></article>"
    )


def _figure(title: str, body: str) -> str:
    return f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}">{body}</svg></figure>'


def _histogram(histogram: dict[str, Any]) -> str:
    edges, counts = histogram["edges"], histogram["counts"]
    if not counts:
        return ""
    across, up = _scale(edges[0], edges[-1], WIDTH), max(counts)
    bars = "".join(
        f'<rect x="{across(low):.1f}" y="{_height(count / up):.1f}" width="{across(high) - across(low) - 1:.1f}" '
        f'height="{HEIGHT - MARGIN - _height(count / up):.1f}"><title>{count}</title></rect>'
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    )
    return bars + _axis(edges[0], edges[-1], 0, up)


def _means(points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return ""
    low, high = min(m - s for m, s in points), max(m + s for m, s in points)
    across = _scale(0, max(len(points) - 1, 1), WIDTH)
    marks = "".join(
        f'<line x1="{across(i):.1f}" x2="{across(i):.1f}" y1="{_place(m - s, low, high):.1f}" '
        f'y2="{_place(m + s, low, high):.1f}"/><circle cx="{across(i):.1f}" cy="{_place(m, low, high):.1f}" r="2.5"/>'
        for i, (m, s) in enumerate(points)
    )
    return marks + _axis(1, len(points), low, high)


def _scatter(points: Sequence[tuple[float, float]]) -> str:
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    across = _scale(left, right, WIDTH)
    dots = "".join(
        f'<circle cx="{across(x):.1f}" cy="{_place(y, low, high):.1f}" r="3" opacity="0.35"/>' for x, y in points
    )
    return dots + _axis(left, right, low, high)


def _scale(low: float, high: float, size: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: MARGIN + (value - low) / span * (size - MARGIN - 10)


def _height(share: float) -> float:
    return HEIGHT - MARGIN - share * (HEIGHT - MARGIN - 10)


def _place(value: float, low: float, high: float) -> float:
    return _height((value - low) / ((high - low) or 1.0))


def _axis(left: float, right: float, low: float, high: float) -> str:
    base = HEIGHT - MARGIN
    return (
        f'<path d="M{MARGIN} 8V{base}H{WIDTH - 8}" fill="none"/>'
        f'<text x="{MARGIN}" y="{base + 14}">{left:.4g}</text>'
        f'<text x="{WIDTH - 10}" y="{base + 14}" text-anchor="end">{right:.4g}</text>'
        f'<text x="{MARGIN - 4}" y="{base}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{MARGIN - 4}" y="16" text-anchor="end">{high:.3g}</text>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _short(text: str) -> str:
    line = repr(text.strip())[1:-1]
    return line if len(line) <= 70 else f"{line[:45]} … {line[-22:]}"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Probe</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }}
th {{ text-align: left; padding-right: 1.5rem; font-weight: 500; color: #555; vertical-align: top }}
ul {{ padding: 0; list-style: none }} li {{ padding: .5rem .8rem; margin: .4rem 0; background: #f2f2f2 }}
li.stop {{ background: #fde3e0 }} li.note {{ background: #fdf3d6 }}
figure {{ display: inline-block; width: 27rem; max-width: 100%; margin: .6rem 1rem .6rem 0 }}
figcaption {{ color: #555 }} svg {{ width: 100% }}
rect, circle {{ fill: #76b900 }} line {{ stroke: #b9d68a }} path {{ stroke: #999 }}
text {{ font-size: 10px; fill: #666 }}
article {{ margin: .8rem 0; border: 1px solid #ddd }}
header {{ padding: .3rem .6rem; color: #555; background: #f7f7f7 }}
pre {{ margin: 0; padding: .5rem .6rem; white-space: pre-wrap; overflow-wrap: anywhere }}
pre.answer {{ background: #f6faef }}
</style>
<h1>Probe</h1><ul>{notes}</ul><table>{rows}</table>{plots}{samples}
</html>
"""
