"""`nemotron profiles list|show|check|init`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotron_launch.cli.main import LazyGroup
from nemotron_launch.cli.steps import PROFILES, complete
from nemotron_launch.errors import UserError

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile

profiles = LazyGroup(
    "profiles",
    help="List, show, check and write profiles: where and with what a run happens.",
    no_args_is_help=True,
    lazy={
        "list": ("nemotron_launch.cli.profiles:list_profiles", "List the profiles."),
        "show": ("nemotron_launch.cli.profiles:show", "Show a profile with everything that it extends, resolved."),
        "check": ("nemotron_launch.cli.profiles:check", "Check profiles and say all that is wrong."),
        "init": ("nemotron_launch.cli.profiles:init", "Write a first profile of your own."),
    },
)


@click.command("list")
@PROFILES
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_profiles(profiles: Path | None, as_json: bool) -> None:
    """List the profiles, each as it would be found.

    Looked into, first to last: --profiles, ./profiles/, ~/.config/nemotron/profiles/, env.toml, the shipped examples.
    """
    from nemotron_launch.profiles import list_profiles as found

    entries = found(profiles_path=profiles)
    if as_json:
        _print_json([{**vars(entry), "file": str(entry.file), "extends": list(entry.extends)} for entry in entries])
        return
    from nemotron_launch.cli.tables import print_profiles

    print_profiles(entries)


@click.command()
@click.argument("name", shell_complete=complete("profile"))
@PROFILES
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, profiles: Path | None, as_json: bool) -> None:
    """Show a profile with everything that it extends, interpolations resolved. Secrets are shown by name only.

    What is printed is a profile in YAML, whatever file this one comes from.
    NAME is a profile's name, or the path of its file.
    """
    from nemotron_launch.profile_drafts import as_yaml
    from nemotron_launch.profiles import load_profile

    profile = load_profile(name, profiles_path=profiles)
    if as_json:
        _print_json(_as_json(profile))
        return
    _print_warnings(profile)
    text = as_yaml(profile)
    if sys.stdout.isatty():
        from nemotron_launch.cli.tables import print_yaml

        print_yaml(text)
    else:
        click.echo(text, nl=False)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete("profile"))
@PROFILES
@click.option("--online", is_flag=True, help="Ask the Lepton workspace too: node groups, shape, secrets, logins.")
@click.pass_context
def check(ctx: click.Context, names: tuple[str, ...], profiles: Path | None, online: bool) -> None:
    """Check profiles, all of them unless named, and say all that is wrong.

    The exit code is 1 where something is wrong.
    """
    from nemotron_launch.profile_drafts import placeholders
    from nemotron_launch.profiles import list_profiles, load_profile

    if online and not names:
        raise UserError("--online asks the workspaces of named profiles", hint="nemotron profiles check NAME --online")
    wrong = 0
    for name in names or [entry.name for entry in list_profiles(profiles_path=profiles)]:
        try:
            profile = load_profile(name, profiles_path=profiles)
        except UserError as error:
            if names and not _is_known(name, profiles):
                raise
            wrong += 1
            click.echo(str(error), err=True)
            continue
        _print_warnings(profile)
        left = placeholders(profile)
        note = f"  (an example's values still: {', '.join(left)})" if left else ""
        if online:
            found = _asked(profile)
            for problem in found:
                click.echo(str(problem), err=True)
            if found:
                wrong += 1
                continue
        click.echo(f"{profile.name}  {profile.executor}  good{note}")
    ctx.exit(1 if wrong else 0)


@click.command()
@click.argument("executor", type=click.Choice(["slurm", "lepton", "local"]))
@click.option("--name", metavar="NAME", help="Its name (default: the executor's).")
@click.option("--output", metavar="PATH", type=click.Path(path_type=Path), help="File (default: profiles/NAME.yaml).")
@click.option("--force", is_flag=True, help="Write over a file that is there already.")
@click.option("--account", metavar="NAME", help="Slurm: account to charge.")
@click.option("--partition", metavar="NAME", help="Slurm: partition.")
@click.option("--host", metavar="HOST", help="Slurm: login node, reached over SSH; without it sbatch runs here.")
@click.option("--user", metavar="NAME", help="Slurm: user on that host.")
@click.option("--runtime", type=click.Choice(["pyxis", "charliecloud", "none"]), help="Slurm: what runs the container.")
@click.option("--time", metavar="HH:MM:SS", help="Slurm: time limit of an attempt.")
@click.option("--node-group", metavar="NAME", help="Lepton: node group.")
@click.option("--resource-shape", metavar="SHAPE", help="Lepton: shape of each node.")
@click.option("--workspace", metavar="ID", help="Lepton: workspace.")
@click.option("--remote-job-dir", metavar="PATH", help="Folder for runs that every node sees.")
@click.option(
    "--mount", "mounts", metavar="FROM:TO", multiple=True, help="Slurm: HOST:CONTAINER. Lepton: PATH:MOUNT_PATH:FROM."
)
@click.option("--image", metavar="IMAGE", help="Container image (default: the step's).")
@click.option("--python", metavar="PATH", help="Python that runs the trainer.")
@click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="Nodes (default: the config's).")
@click.option("--gpus-per-node", type=click.IntRange(min=0), metavar="N", help="GPUs of each (default: the config's).")
def init(executor: str, name: str | None, output: Path | None, force: bool, **said: Any) -> None:
    """Write a first profile of your own, with comments, into ./profiles/.

    On a terminal it asks for what it needs; elsewhere the options say it. A profile named slurm or lepton is the one
    that the shipped profiles of the steps (slurm_rl_nemo_rl_dpo, …) build on.
    """
    from nemotron_launch.profile_drafts import draft, write

    path = output or Path("profiles") / f"{name or executor}.yaml"
    if path.exists() and not force:
        raise UserError("is there already", where=str(path), hint="--force writes over it, --output elsewhere")
    given = _answers(executor, {key: value for key, value in said.items() if value not in (None, ())})
    profile = write(path, draft(executor, given), force=force)
    click.echo(f"{path}: the profile {profile.name}; try it with  nemotron steps run dpo -r {profile.name} -d")


def _answers(executor: str, said: dict[str, Any]) -> dict[str, Any]:
    """What the options say, and on a terminal what the user answers, as values of the profile's keys."""
    from nemotron_launch.profile_drafts import DRAFTS, Line

    lines = {line.key: line for line in DRAFTS[executor] if isinstance(line, Line)}
    ours = {"host": "tunnel", "user": "tunnel"}
    for key in said:
        if ours.get(key, key) not in lines:
            raise UserError(f"--{key.replace('_', '-')} has no meaning for the executor {executor}")
    given = dict(said)
    host, user = given.pop("host", None), given.pop("user", None)
    if host:
        given["tunnel"] = host
    for line in lines.values():
        if line.question and line.key not in given and sys.stdin.isatty() and sys.stdout.isatty():
            given[line.key] = _ask(line.question, required=line.required)
    missing = [line.key for line in lines.values() if line.required and not given.get(line.key)]
    if missing:
        options = ", ".join(f"--{'mount' if key == 'mounts' else key.replace('_', '-')}" for key in missing)
        raise UserError(f"a {executor} profile needs {options}", hint="on a terminal it is asked for")
    if given.get("tunnel"):
        given["tunnel"] = {"type": "ssh", "host": given["tunnel"], **({"user": user} if user else {})}
    elif user:
        raise UserError("--user needs --host")
    if executor == "lepton":
        given["mounts"] = [_volume(text) for text in _listed(given.get("mounts"))]
    elif "mounts" in given:
        given["mounts"] = _listed(given["mounts"])
    return given


def _ask(question: str, *, required: bool) -> str:
    while True:
        answer: str = click.prompt(question, default="", show_default=False).strip()
        if answer or not required:
            return answer


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _volume(text: str) -> dict[str, str]:
    path, _, rest = text.partition(":")
    target, _, volume = rest.partition(":")
    if not (path and target and volume):
        raise UserError(f"a volume is PATH:MOUNT_PATH:FROM, got {text}", hint="for example /:/mnt/shared:node-nfs:NAME")
    return {"path": path, "mount_path": target, "from": volume}


def _is_known(name: str, profiles: Path | None) -> bool:
    from nemotron_launch.profiles import list_profiles

    return Path(name).is_file() or any(entry.name == name for entry in list_profiles(profiles_path=profiles))


def _as_json(profile: Profile) -> dict[str, Any]:
    from nemotron_launch.config.tree import to_plain

    return {
        "name": profile.name,
        "executor": profile.executor,
        "file": str(profile.file),
        "files": [str(path) for path in profile.files],
        "from_cwd": profile.from_cwd,
        "data": profile.data,
        "config": to_plain(profile.layer),
        "secrets": [vars(secret) for secret in profile.secrets],
        "warnings": list(profile.warnings),
    }


def _asked(profile: Profile) -> list[UserError]:
    """What the workspace of a Lepton profile lacks; what it has is printed. UserError: it cannot be asked."""
    if profile.executor != "lepton":
        raise profile.problem("executor", "--online asks a Lepton workspace", "this profile has none")
    from nemotron_launch.backends.lepton_access import access, contact_of
    from nemotron_launch.backends.lepton_api import Api
    from nemotron_launch.backends.lepton_online import look_for_profile

    reached = access(contact_of(profile.data))
    for text in reached.warnings:
        click.echo(f"warning: {text}", err=True)
    api = Api(reached)
    try:
        found = look_for_profile(api, profile.data, [one.reference for one in profile.secrets if one.reference])
    finally:
        api.close()
    for text in found.notes:
        click.echo(f"  {text}")
    return [
        UserError(one.message, where=f"profile {profile.name}: {one.where}", hint=one.hint) for one in found.problems
    ]


def _print_warnings(profile: Profile) -> None:
    for text in profile.warnings:
        click.echo(f"warning: profile {profile.name}: {text}", err=True)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False))
