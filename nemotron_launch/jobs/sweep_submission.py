"""From a compiled sweep to what is submitted: one run with all its files, and a row of the ledger for each point."""

from __future__ import annotations

import posixpath

from nemotron_launch.frozen import replace
from nemotron_launch.hosts import Upload
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.submission import new_run, point_of, uploads
from nemotron_launch.plan import point_folder
from nemotron_launch.render import render
from nemotron_launch.sweeps import PACKED, Sweep, pack


def plan_submission(sweep: Sweep) -> tuple[Run, list[Upload], list[Run]]:
    """The run as a whole, the files of its folder, and the rows of its points, for `submission.submit`."""
    if sweep.array and sweep.rendered:
        run = new_run(sweep.array, sweep.overrides)
        run = replace(run, options={**run.options, "max_parallel": sweep.max_parallel})
        files = [*uploads(sweep.array, sweep.rendered), Upload(PACKED, pack(sweep.array))]
    else:
        first = sweep.jobs[0]
        run = new_run(replace(first, run_dir=posixpath.dirname(first.run_dir)), sweep.overrides)
        run = replace(run, options={**run.options, "max_parallel": sweep.max_parallel or 1})
        files = [
            replace(file, path=f"{point_folder(n)}/{file.path}")
            for n, job in enumerate(sweep.jobs)
            for file in uploads(job, render(job))
        ]
    points = [
        point_of(run, n, job, job.files[0].text, (*sweep.overrides, *overrides))
        for n, (job, overrides) in enumerate(zip(sweep.jobs, sweep.points, strict=True))
    ]
    return run, files, points
