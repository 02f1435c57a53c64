"""The `nemotron` command: its groups, loaded when used, and the one place that prints errors and chooses exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from nemotron_launch import __version__
from nemotron_launch.errors import UserError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
INTERRUPTED = 130
BROKEN_PIPE = 141
COMPLETE = "_NEMOTRON_COMPLETE"


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called. lazy: name → (module:attribute, line of help)."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lazy[name][1]) for name in self.list_commands(ctx)])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.lazy and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.lazy, n=1)
            hint = (
                f"did you mean {ctx.command_path} {near[0]}?" if near else f"commands: {', '.join(sorted(self.lazy))}"
            )
            raise UserError(f"{ctx.command_path} has no command {args[0]}", hint=hint)
        return super().resolve_command(ctx, args)


nemotron = LazyGroup(
    "nemotron",
    context_settings=CONTEXT,
    help="Compile an RL-alignment step, a config and a profile into one job, and run it.",
    epilog="\b\nA first run, on this machine, without a GPU:\n  nemotron steps run rl/nemo_rl/dpo -c tiny",
    no_args_is_help=True,
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            help="Show the version and exit.",
            callback=lambda ctx, param, value: _show_version(ctx) if value else None,
        )
    ],
    lazy={
        "steps": ("nemotron_launch.cli.steps:steps", "List, show and run steps."),
        "jobs": ("nemotron_launch.cli.jobs:jobs", "List, follow, cancel and resubmit runs."),
        "pipeline": ("nemotron_launch.cli.pipeline:pipeline", "Run several steps as one, each on what others made."),
        "artifacts": ("nemotron_launch.cli.artifacts:artifacts", "List and show what runs made, and of what."),
        "profiles": ("nemotron_launch.cli.profiles:profiles", "List, show, check and write profiles."),
        "ui": ("nemotron_launch.cli.ui:ui", "Show the runs in a browser: their list, plots, logs and reports."),
        "images": ("nemotron_launch.cli.images:images", "List, import and remove container images of a Slurm profile."),
        "doctor": ("nemotron_launch.cli.doctor:doctor", "Show what this machine's trainer can do, and what it lacks."),
        "completion": ("nemotron_launch.cli.completion:completion", "Print the shell's completion script."),
    },
)


def _show_version(ctx: click.Context) -> None:
    click.echo(f"nemotron {__version__}")
    ctx.exit()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its code.

    2: usage or bad input; 130: Ctrl-C; 1: everything else that is not the command's own code.
    """
    code = run(argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _broken_pipe()
    sys.exit(code)


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, every error printed."""
    try:
        code = nemotron.main(args=None if argv is None else list(argv), prog_name="nemotron", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _print(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except click.UsageError as error:
        return _print(_usage_error(error))
    except click.ClickException as error:
        return _print(UserError(error.format_message(), exit_code=error.exit_code))
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except SystemExit as stop:  # click's own: after a broken pipe, or with its list of completions
        return _broken_pipe() if stop.code == 1 and COMPLETE not in os.environ else 0
    except Exception as error:
        return _internal(error)


def _print(error: UserError) -> int:
    click.echo(str(error), err=True)
    return error.exit_code


def _usage_error(error: click.UsageError) -> UserError:
    path = error.ctx.command_path if error.ctx else "nemotron"
    if isinstance(error, click.NoSuchOption):
        near = sorted(error.possibilities or [])
        hint = f"did you mean {' or '.join(near)}?" if near else f"its options: {path} -h"
        if " " not in path:
            hint = "options of a command come after it: nemotron steps run ID -d"
        return UserError(f"{path} has no option {error.option_name}", hint=hint)
    message = error.format_message().rstrip(".").replace("'", "")
    return UserError(message[:1].lower() + message[1:], hint=f"how to use it: {path} -h")


def _internal(error: Exception) -> int:
    if os.environ.get("NEMOTRON_DEBUG"):
        raise error
    text = str(error).splitlines()[0] if str(error) else ""
    summary = f"internal: {type(error).__name__}" + (f": {text}" if text else "")
    return _print(UserError(summary, hint="NEMOTRON_DEBUG=1 shows where", exit_code=1))


def _broken_pipe() -> int:
    """Nobody reads any more. Python would complain once more when it closes the stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


if __name__ == "__main__":
    main()
