"""Entry point of the step: one process of the trainer."""

import sys
from pathlib import Path

from nemotron_launch.trainer.grpo import main

# Saving a checkpoint starts a process that imports this file again.
if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent))
