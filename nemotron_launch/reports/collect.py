"""Everything that a report about some runs says: their files read, their warnings found; what `jobs report` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_launch.catalog import Step, find_step
from nemotron_launch.errors import UserError
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends, Warn
from nemotron_launch.jobs.status import progress_of
from nemotron_launch.reports.run_data import report_data
from nemotron_launch.reports.signs import warnings_of
from nemotron_launch.reports.sources import METRICS, RunFiles, config_of, find_files, missing, update

_DRAWN = 8  # runs whose lineage is drawn
_QUICK = 8 << 20  # bytes of metrics that are read in a moment
# A folder that no ledger knows tells its step by the section that its config has.
_SECTIONS = {"dpo": "rl/nemo_rl/dpo", "sft": "sft/megatron", "rm": "rm/hf", "grpo": "rl/nemo_rl/rlvr"}


def collect(ledger: Ledger, backends: Backends, names: Sequence[str], warn: Warn) -> dict[str, Any]:
    """The data of a report about the runs that these names mean (run_data.report_data).

    A run without metrics is a warning beside others that have some. UserError: none has any, or a name means nothing.
    """
    files = find_files(backends, ledger, names, warn)
    update(files, warn)
    without = [(one, error) for one in files if (error := missing(one))]
    if len(without) == len(files):
        raise without[0][1]
    for _, error in without:
        warn(str(error).removeprefix("error: ").partition("\n")[0])
    for one in files:
        for problem in one.metrics().problems:
            warn(f"{one.name}: {problem}")
    progress = progress_of(backends, [one.run for one in files if one.run], warn)
    return report_data(
        files,
        progress=progress,
        warnings={one.name: run_warnings(one) for one in files},
        lineage=lineage_of(ledger, [one.run for one in files if one.run]),
    )


def lineage_of(ledger: Ledger, runs: Sequence[Run]) -> dict[str, Any] | None:
    """What these runs were made of and what was made of them, as one graph; None where nothing is known of it.

    Of many runs, as the points of a sweep are, the first ones stand for all.
    """
    from nemotron_launch.artifacts import registry
    from nemotron_launch.artifacts.lineage import everything

    graph, labels = everything(ledger), registry.labels(ledger)
    roots = [labels.get(run.run_id, run.run_id) for run in runs[:_DRAWN]]
    found = [graph.around(root).as_data() for root in roots]
    nodes = {node["id"]: node for one in found for node in one["nodes"]}
    links = list({tuple(link.values()): link for one in found for link in one["links"]}.values())
    return {"roots": roots, "nodes": list(nodes.values()), "links": links} if links else None


def quick_warnings(backends: Backends, run: Run) -> list[dict[str, Any]]:
    """The warnings of a run whose metrics lie on this machine and are not long; none of any other."""
    host, path = backends.of(run).host, Path(run.output_dir, METRICS)
    if host is None or host.name or not path.is_file() or path.stat().st_size > _QUICK:
        return []
    one = RunFiles(run.run_id, run.output_dir, host, run=run)
    update([one], lambda text: None)
    return run_warnings(one)


def run_warnings(one: RunFiles) -> list[dict[str, Any]]:
    """The warnings of a run, as the page shows them; none where its step is not known here."""
    config = config_of(one)
    step = step_of(one)
    return [warning.as_data() for warning in warnings_of(step, config, one.metrics())] if step else []


def step_of(one: RunFiles) -> Step | None:
    """The step that a run was one of."""
    config = config_of(one)
    name = one.run.step if one.run else next((_SECTIONS[key] for key in config if key in _SECTIONS), None)
    try:
        return find_step(name) if name else None
    except UserError:  # a step of another folder of steps
        return None
