"""`python -m nemotron_launch` is `nemotron`."""

from __future__ import annotations

from nemotron_launch.cli.main import main

if __name__ == "__main__":
    main()
