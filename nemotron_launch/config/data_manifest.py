"""`data.manifest_path` over the data paths of lower layers: what it stands in place of is taken out of the tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemotron_launch.config import tree
from nemotron_launch.config.interpolation import resolve_at
from nemotron_launch.config.tree import COMMAND_LINE, DEFAULT, Node
from nemotron_launch.errors import UserError

MANIFEST = ("data", "manifest_path")

#: What a data section says of the source that it names, and what it says instead once a manifest names the rows.
#: How rows are scored, framed and repeated stays.
_OF_A_SOURCE: Mapping[str, Any] = {
    **dict.fromkeys(("data_path", "dataset_name", "subset", "split")),
    **dict.fromkeys(("chat_key", "system_key", "tool_key", "input_key", "output_key")),
    "prompt_key": "prompt",
    "chosen_key": "chosen",
    "rejected_key": "rejected",
}


def apply_manifest(root: Node, order: Mapping[str, int], env: Mapping[str, str]) -> Node:
    """Let a manifest stand in place of the sources that lower layers name.

    order: the rank of each origin. A manifest that an environment variable names is above all files. A data path that
    is not below it is an error that names both places. A `data.validation` that nobody wrote becomes the manifest's.
    """
    given = tree.find(root, MANIFEST)
    if given is None or given.value is None or resolve_at(root, MANIFEST, env) is None:
        return root
    rank = float(order.get(given.source.origin, 1))
    if "${oc.env:" in str(given.value):
        rank = max(rank, order.get(COMMAND_LINE.origin, 1) - 0.5)
    for section in ("train", "validation", "default"):
        for key, without in _OF_A_SOURCE.items():
            path = ("data", section, key)
            node = tree.find(root, path)
            if node is None or node.value is None or node.source is DEFAULT:
                continue
            below = order.get(node.source.origin, 1) < rank
            if not below and key == "data_path":
                raise UserError(
                    f"data.manifest_path and {'.'.join(path)} ({node.source}) both name the rows",
                    where=str(given.source),
                    hint=f"give one of them; {'.'.join(path)}=null takes the manifest's, "
                    "data.manifest_path=null the other",
                )
            if below:
                root = tree.put(root, path, Node(without, given.source))
    validation = tree.find(root, ("data", "validation"))
    if validation is not None and validation.value is None and validation.source is DEFAULT:
        root = tree.put(root, ("data", "validation"), Node({}, given.source))
    return root
