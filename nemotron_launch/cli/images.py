"""`nemotron images list|squash|prune`: the container images that a Slurm profile keeps on its cluster."""

from __future__ import annotations

import json
import posixpath
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nemotron_launch.cli.main import LazyGroup
from nemotron_launch.cli.steps import PROFILES, complete
from nemotron_launch.errors import UserError

if TYPE_CHECKING:
    from nemotron_launch.hosts import Host
    from nemotron_launch.image_jobs import Stored
    from nemotron_launch.profiles import Profile

DAY = 86400.0
_PAUSES = 0.5, 10.0  # seconds between two looks at an import that is waited for: at first, at most

images = LazyGroup(
    "images",
    help="List, import and remove the container images of a Slurm profile.",
    no_args_is_help=True,
    lazy={
        "list": ("nemotron_launch.cli.images:list_images", "List the images that are there."),
        "squash": ("nemotron_launch.cli.images:squash", "Import an image as a squash file, by a batch job."),
        "prune": ("nemotron_launch.cli.images:prune", "Remove images that are no longer used."),
    },
)
PROFILE = click.argument("profile_name", metavar="PROFILE", shell_complete=complete("profile"))


@click.command("list")
@PROFILE
@PROFILES
@click.option("--check", is_flag=True, help="Ask the registries whether tags have moved.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_images(profile_name: str, profiles: Path | None, check: bool, as_json: bool) -> None:
    """List the images in a profile's image folder: size, when imported and used, whole or not, moved or not.

    --check asks by `enroot digest` on the profile's host; where there is no enroot, nothing is known.
    """
    with _reached(profile_name, profiles) as (_, host, image_dir):
        found = _stored(host, image_dir, ask=check)
    if as_json:
        click.echo(json.dumps([{**vars(one), "moved": one.moved} for one in found], indent=2))
        return
    if not found:
        click.echo(f"no images in {image_dir}", err=True)
        return
    from nemotron_launch.cli.tables import print_table

    rows = [(one.name, _size(one.size), one.imported or "-", _day(one.used), _state(one), one.uri) for one in found]
    print_table(("NAME", "SIZE", "IMPORTED", "USED", "STATE", "REFERENCE"), rows)


@click.command()
@PROFILE
@click.argument("reference", metavar="[IMAGE]", required=False)
@PROFILES
@click.option("--force", is_flag=True, help="Import it anew where it is there already.")
@click.option("--wait", is_flag=True, help="Wait for the import, and end as it does.")
@click.option("-d", "--dry-run", is_flag=True, help="Print the batch script and submit nothing.")
@click.pass_context
def squash(
    ctx: click.Context,
    profile_name: str,
    reference: str | None,
    profiles: Path | None,
    force: bool,
    wait: bool,
    dry_run: bool,
) -> None:
    """Import an image as a squash file into a profile's image folder, by a batch job, unless it is there already.

    IMAGE is what a profile's `image` takes (default: that of the profile): nvcr.io/nvidia/nemo-rl:v0.6.0, docker://…,
    an archive on the cluster. A run does this by itself.
    """
    from nemotron_launch import image_jobs
    from nemotron_launch.backends.slurm import IMPORT, import_script
    from nemotron_launch.hosts import Upload
    from nemotron_launch.images import parse

    with _reached(profile_name, profiles) as (profile, host, image_dir):
        reference = reference or profile.data.get("image")
        if not reference:
            hint = f"nemotron images squash {profile.name} nvcr.io/nvidia/nemo-rl:v0.6.0"
            raise profile.problem("image", "names no image", hint)
        image = parse(str(reference))
        if not image.uri:
            raise UserError(f"{reference} is a file on the cluster already: nothing to import", where="image")
        log_dir = posixpath.join(image_dir, ".imports", image.squash_name.removesuffix(".sqsh"))
        script = import_script(image, profile.data, str(profile.data["remote_job_dir"]), log_dir)
        if dry_run:
            click.echo(script, nl=False)
            return
        host.put(log_dir, [Upload(IMPORT, script.encode())])
        done = image_jobs.ensured(host.run(image_jobs.ensure(log_dir, force=force), timeout=120))
        for note in done.notes:
            click.echo(note, err=True)
        if not done.job_ids:
            click.echo(f"{posixpath.join(image_dir, image.squash_name)} is there")
            return
        click.echo(done.job_ids[0])
        if wait:
            ctx.exit(_wait(host, log_dir, done.job_ids[0]))


@click.command()
@PROFILE
@click.argument("names", metavar="[NAME]...", nargs=-1)
@PROFILES
@click.option(
    "--unused-for", type=click.FloatRange(0), metavar="DAYS", help="Those that no run began with for so long."
)
@click.option("-y", "--yes", is_flag=True, help="Remove them; without it they are only listed.")
def prune(
    profile_name: str, names: tuple[str, ...], profiles: Path | None, unused_for: float | None, yes: bool
) -> None:
    """Remove images by NAME, or those that no run has begun with for some days, and what dead imports left behind.

    A run that is at work needs its image: give --unused-for more days than your longest run has.
    """
    from nemotron_launch import image_jobs

    with _reached(profile_name, profiles) as (_, host, image_dir):
        found = _stored(host, image_dir)
        chosen = _chosen(found, names, unused_for)
        work = host.run(image_jobs.leftovers(image_dir)).stdout.split()
        for one in chosen:
            click.echo(f"{one.name}  {_size(one.size)}, last used {_day(one.used)}")
        for name in work:
            click.echo(f"{name}  left by an import that died")
        if not chosen and not work:
            click.echo("nothing to remove" if names or unused_for is not None else "nothing chosen", err=True)
        elif not yes:
            click.echo(f"{len(chosen) + len(work)} would be removed from {image_dir}: --yes does it", err=True)
        else:
            done = host.run(image_jobs.remove(image_dir, [one.name for one in chosen], work), timeout=600)
            if done.code:
                raise UserError(f"cannot be removed: {done.stderr.strip()}", where=image_dir, exit_code=1)


def _chosen(found: Sequence[Stored], names: Sequence[str], unused_for: float | None) -> list[Stored]:
    known = {one.name.removesuffix(".sqsh"): one for one in found}
    for name in names:
        if name.removesuffix(".sqsh") not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, [one.name for one in found], n=1)
            hint = f"did you mean {near[0]}?" if near else "nemotron images list PROFILE shows them"
            raise UserError(f"there is no image {name}", hint=hint)
    chosen = [known[name.removesuffix(".sqsh")] for name in dict.fromkeys(names)] if names else []
    if unused_for is not None:
        old = [one for one in found if one.used <= time.time() - unused_for * DAY]
        chosen = [one for one in chosen if one in old] if names else old
    return chosen


@contextmanager
def _reached(profile_name: str, profiles: Path | None) -> Iterator[tuple[Profile, Host, str]]:
    """A Slurm profile, its host, and its image folder there."""
    from nemotron_launch.hosts import open_host
    from nemotron_launch.images import folder
    from nemotron_launch.profiles import load_profile

    profile = load_profile(profile_name, profiles_path=profiles)
    if profile.executor != "slurm":
        raise profile.problem("executor", f"{profile.executor} keeps no images", "this is for Slurm profiles")
    host = open_host(profile.data["tunnel"])
    try:
        yield profile, host, folder(profile.data, str(profile.data["remote_job_dir"]))
    finally:
        host.close()


def _stored(host: Host, image_dir: str, *, ask: bool = False) -> list[Stored]:
    from nemotron_launch import image_jobs

    done = host.run(image_jobs.look(image_dir, ask=ask), timeout=600)
    return sorted(image_jobs.stored(done.stdout), key=lambda one: one.name)


def _wait(host: Host, log_dir: str, job_id: str) -> int:
    """Wait for an import; its log on stderr, its exit code."""
    from nemotron_launch import image_jobs

    pause, most = _PAUSES
    while (state := _job_state(host, job_id)) in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
        time.sleep(pause)
        pause = min(1.5 * pause, most)
    note = host.read({posixpath.join(log_dir, image_jobs.NOTE): 0})
    path = next((data.decode().strip().partition(" ")[2] for data in note.values()), "")
    log = next(iter(host.read({path: 0}).values()), b"").decode(errors="replace") if path else ""
    if state != "COMPLETED":
        why = image_jobs.failure(log) or f"job {job_id} ended as {state or 'nobody knows'}; its log is {path}"
        raise UserError(why, where="image", exit_code=1)
    click.echo(log.splitlines()[-1] if log else "imported", err=True)
    return 0


def _job_state(host: Host, job_id: str) -> str:
    done = host.run(f"scontrol --oneliner show job {job_id} | sed -n 's/.* JobState=\\([A-Z_]*\\) .*/\\1/p'")
    return done.stdout.strip()


def _state(one: Stored) -> str:
    if not one.whole:
        return "broken"
    return "moved" if one.moved else "good"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.3g} {unit}"
        size /= 1024
    raise AssertionError


def _day(then: float) -> str:
    return time.strftime("%F", time.localtime(then))
