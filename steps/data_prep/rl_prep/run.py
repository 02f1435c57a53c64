"""Entry point of the step: one process, which starts its workers."""

import sys
from pathlib import Path

from nemotron_launch.data_prep.run import main

# A worker process imports this file again.
if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent))
