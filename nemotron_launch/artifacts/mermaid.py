"""Text as Mermaid's flowcharts want it."""

from __future__ import annotations


def quoted(text: str) -> str:
    """Text inside a quoted label."""
    return "".join(f"#{ord(letter)};" if letter in '"#<>&;' or not letter.isprintable() else letter for letter in text)
