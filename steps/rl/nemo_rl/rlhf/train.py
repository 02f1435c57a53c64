"""Entry point of the step: says that this version does not train it yet."""

import os
import sys
from pathlib import Path

from nemotron_launch.catalog import load_step, untrained

if __name__ == "__main__":
    error = untrained(load_step(Path(__file__).parent))
    if os.environ.get("RANK", "0") == "0":
        print(error, file=sys.stderr)
    sys.exit(error.exit_code)
