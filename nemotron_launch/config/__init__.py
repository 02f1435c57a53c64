"""Configs: reading, composing, overriding and checking them. Light: imports YAML and nothing heavier."""
