"""Several steps as one: a file names the stages, all are compiled and checked, then they run in their order."""
