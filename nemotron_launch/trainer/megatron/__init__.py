"""All that touches megatron-core, so that a newer version in a container needs changes in one folder only."""
