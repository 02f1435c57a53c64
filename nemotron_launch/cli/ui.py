"""`nemotron ui`: the runs in a browser."""

from __future__ import annotations

import signal
import threading

import click

_PORT = "On this port; 0 is any free one (default: 8260, or the next free one)."


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help="On this port; 0 is any free one (default: 8260 or the next free one).",
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def ui(port: int | None, no_browser: bool) -> None:
    """Show the runs in a browser: their list, plots, logs and reports, kept fresh, until Ctrl-C.

    It listens on this machine alone, and only the address that it prints, with its token, opens it.
    """
    from nemotron_launch.ui.server import open_server, serve

    server = open_server(port)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: ended.set())
    serving = serve(server)
    click.echo(f"{server.gate.address}\nCtrl-C ends it.")
    if not no_browser:
        from nemotron_launch.ui.opening import open_browser

        open_browser(server.gate.address, server.rows.folder)
    ended.wait()
    server.shutdown()
    serving.join(5)
    server.close()
