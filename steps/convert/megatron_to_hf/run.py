"""Entry point of the step: one process of the conversion."""

import sys
from pathlib import Path

from nemotron_launch.trainer.convert import megatron_to_hf

if __name__ == "__main__":
    sys.exit(megatron_to_hf(Path(__file__).parent))
