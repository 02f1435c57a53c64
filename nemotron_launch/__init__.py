"""Nemotron Launch: compile an RL-alignment step, a config and a run profile into one job, and run it anywhere."""

__version__ = "0.1.0"
