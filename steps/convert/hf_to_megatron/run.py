"""Entry point of the step: one process of the conversion."""

import sys
from pathlib import Path

from nemotron_launch.trainer.convert import hf_to_megatron

if __name__ == "__main__":
    sys.exit(hf_to_megatron(Path(__file__).parent))
