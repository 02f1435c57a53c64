"""`nemotron completion`: the script that completes commands, step ids and configs in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_INSTALL = """\b
bash:  echo 'eval "$(nemotron completion bash)"' >> ~/.bashrc
zsh:   echo 'eval "$(nemotron completion zsh)"' >> ~/.zshrc
fish:  nemotron completion fish > ~/.config/fish/completions/nemotron.fish"""


@click.command(help=f"Print the completion script of a shell. To install it:\n\n{_INSTALL}")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    from nemotron_launch.cli.main import COMPLETE, nemotron

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(nemotron, {}, "nemotron", COMPLETE).source())
