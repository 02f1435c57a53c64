"""The exit codes of a training run, for the trainer, `spawn` and the backends. Anyone may import this.

A backend reads them from the process, or from the file `exit_code` in the output folder.
Above 128 it is a signal: 128 + its number, 137 for SIGKILL (the kernel's answer to too little memory).
"""

from __future__ import annotations

FINISHED = 0  # trained to the last step; the last checkpoint is complete
FAILED = 1  # something went wrong that the user's input did not cause; another attempt may help
BAD_INPUT = 2  # config, data or checkpoint refused; another attempt with the same input ends the same way
RESUME_ME = 85  # asked to stop (SIGTERM, SIGUSR1, SIGINT, `checkpoint_must_save_by`), saved: start again to go on
CLAIMED = 86  # of a job of Slurm that finds its run claimed by another one, or cancelled: nothing was started
