"""Which run made what of what: from a run or an artifact back to its sources and forward to its users.

Everything is read from the ledger, of which no part needs to be complete: a maker that has been forgotten, or never
was in it, is shown as such. For the terminal `tree`, for documents `mermaid`, for programs `as_data`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from nemotron_launch.artifacts import ABOVE, registry
from nemotron_launch.artifacts.mermaid import quoted
from nemotron_launch.artifacts.references import place_of
from nemotron_launch.artifacts.registry import Entry
from nemotron_launch.frozen import field, frozen
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run

Kind = Literal["run", "source", "forgotten"]


@frozen
class Node:
    """A run with what it made, a source that no run made (a file, a hub id), or a maker that is known no more.

    id: the artifacts' NAME@VERSION where there are some, else the run's id or the source itself. types: of what it
    made. state: of the run; "forgotten" where the ledger no longer has it but still what it made.
    """

    id: str
    kind: Kind
    run_id: str = ""
    step: str = ""
    config: str = ""
    state: str = ""
    created: float = 0.0
    types: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


@frozen
class Link:
    """`user` consumed at `key`, as a `type`, what `maker` made: ids of nodes. text: as the config has it."""

    maker: str
    user: str
    type: str
    key: str
    text: str = ""


@frozen
class Lineage:
    """All that leads to a node and all that came of it. root: its id."""

    root: str
    nodes: Mapping[str, Node]
    links: tuple[Link, ...] = field(default=())

    def sources(self, node: str) -> list[Link]:
        """What a node was made of."""
        return [link for link in self.links if link.user == node]

    def users(self, node: str) -> list[Link]:
        """What was made of a node."""
        return [link for link in self.links if link.maker == node]

    def as_data(self) -> dict[str, Any]:
        return {
            "root": self.root,
            "nodes": [
                {**vars(node), "types": list(node.types), "places": list(node.places)} for node in self.nodes.values()
            ],
            "links": [dict(vars(link)) for link in self.links],
        }


def of(ledger: Ledger, text: str) -> Lineage:
    """The lineage of a run (its id, the unique start of one, `last`) or of an artifact (NAME@VERSION, NAME@latest).

    UserError: there is no such thing, or a sweep of several points.
    """
    return everything(ledger).around(_root(ledger, text))


def of_run(ledger: Ledger, run_id: str) -> Lineage:
    """The lineage of exactly this run, which the ledger need not have any more."""
    return everything(ledger).around(registry.labels(ledger).get(run_id, run_id))


def _root(ledger: Ledger, text: str) -> str:
    try:
        return registry.find_any(ledger, text).label
    except registry.NothingMade as error:
        return error.run_id


def _label(name: str, version: int) -> str:
    return f"{name}@{version}"


# The whole graph ---------------------------------------------------------------------------------------------------


class Graph:
    """Every node and link that the ledger knows."""

    def __init__(self, nodes: Mapping[str, Node], links: Sequence[Link]) -> None:
        self.nodes = dict(nodes)
        self._into: dict[str, list[Link]] = {}
        self._out_of: dict[str, list[Link]] = {}
        for link in links:
            self._into.setdefault(link.user, []).append(link)
            self._out_of.setdefault(link.maker, []).append(link)

    def around(self, root: str) -> Lineage:
        """What leads to a node, and what came of it."""
        nodes = {root: self.nodes.get(root) or Node(root, "forgotten")}
        links: dict[Link, None] = {}
        for edges, end in ((self._into, _maker), (self._out_of, _user)):
            left = [root]
            seen = {root}
            while left:
                for link in edges.get(left.pop(), ()):
                    links[link] = None
                    other = end(link)
                    if other not in seen:
                        seen.add(other)
                        left.append(other)
                        nodes[other] = self.nodes[other]
        return Lineage(root, nodes, tuple(links))


def _maker(link: Link) -> str:
    return link.maker


def _user(link: Link) -> str:
    return link.user


def everything(ledger: Ledger) -> Graph:
    """The graph of all runs and artifacts in the ledger, in two readings of it."""
    entries = registry.entries(ledger)
    runs = ledger.runs()
    labels = registry.labels(ledger)
    by_id = {run.run_id: run for run in runs}
    nodes = {one.label: _entry_node(one, by_id.get(one.run_id)) for one in entries}
    for run in runs:
        if run.run_id not in labels:
            nodes[run.run_id] = _run_node(run)
    makers = _Makers(entries)
    links: dict[Link, None] = {}
    for user, created, place, uses in _users(entries, runs, labels):
        for use in uses:
            maker = makers.of(use, place, created, user) or _source(use, nodes[user].step)
            if maker == user:
                continue
            if maker not in nodes:
                known = bool(use.get("name") or use.get("digest"))
                nodes[maker] = Node(maker, "forgotten" if known else "source", run_id=str(use.get("run_id") or ""))
            links[Link(maker, user, str(use["type"]), str(use["key"]), str(use.get("text", "")))] = None
    return Graph(nodes, list(links))


def _users(
    entries: Sequence[Entry], runs: Sequence[Run], labels: Mapping[str, str]
) -> Iterator[tuple[str, float, tuple[str, str], list[dict[str, Any]]]]:
    """Every node that consumes something: its id, when it was made, its machine, and what it consumes."""
    for one in entries:
        uses = [dict(use) for use in one.uses]
        for used in one.record.inputs:  # the run itself knew best which record lay beside what it read
            same = [use for use in uses if use["key"] == used.key and used.value in (use.get("place"), use.get("text"))]
            if not same:
                same = [{"key": used.key, "type": used.type, "text": used.value, "place": used.path}]
                uses += same
            for use in same:
                use["digest"] = use.get("digest") or used.record
                use["place"] = use.get("place") or used.path
        yield one.label, one.record.created, place_of(one.executor, one.contact, one.host), uses
    for run in runs:
        if run.run_id not in labels:
            place = place_of(run.executor, run.contact, run.host)
            yield run.run_id, run.created, place, [dict(use) for use in run.uses]


class _Makers:
    """Finds the artifact that a run consumed: by its name, by its maker's record, by its path."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._labels = {one.label for one in entries}
        self._by_digest = {one.record.digest: one.label for one in entries}
        self._by_path: dict[tuple[tuple[str, str], str], list[tuple[float, str]]] = {}
        for one in entries:
            place = place_of(one.executor, one.contact, one.host)
            for path in {one.record.folder, *(made.path for made in one.record.artifacts)}:
                self._by_path.setdefault((place, path), []).append((one.record.created, one.label))

    def of(self, use: Mapping[str, Any], place: tuple[str, str], created: float, user: str) -> str | None:
        if use.get("name"):
            return _label(str(use["name"]), int(use["version"]))
        digest, path = str(use.get("digest") or ""), str(use.get("place") or "")
        if digest:
            return self._by_digest.get(digest) or f"forgotten, in {path}"
        for _ in range(ABOVE + 1 if path.startswith("/") else 0):
            # The version that lay there when the run began.
            found = [one for one in self._by_path.get((place, path), ()) if one[0] <= created and one[1] != user]
            if found:
                return max(found)[1]
            path = os.path.dirname(path)
        return None


def _source(use: Mapping[str, Any], step: str) -> str:
    """What stands for something that no run made: a hub id as it is, else the path."""
    text, place = str(use.get("text") or ""), str(use.get("place") or "")
    if text.startswith("step://"):  # each step has its own
        return f"steps/{step}/{text.removeprefix('step://')}"
    if text.startswith(("run:", "artifact:")) or not place:
        return text
    return text if use["type"] == "checkpoint_hf" and not os.path.isabs(text) and not text.startswith(".") else place


def _entry_node(one: Entry, run: Run | None) -> Node:
    places = tuple(made.place for made in one.record.artifacts)
    state = run.state if run else "forgotten"
    return Node(one.label, "run", one.run_id, one.step, one.config, state, one.record.created, one.types, places)


def _run_node(run: Run) -> Node:
    return Node(run.run_id, "run", run.run_id, run.step, run.config, run.state, run.created)


# How it looks ------------------------------------------------------------------------------------------------------


def tree(lineage: Lineage) -> str:
    """The lineage for a terminal: what it was made of, and what uses it, each with what it was made of or used by."""
    lines = [_described(lineage.nodes[lineage.root])]
    for title, end, other in (("made of", _user, _maker), ("used by", _maker, _user)):
        below = list(_branches(lineage, end, other))
        lines += ["", title, *(below or ["└─ nothing that is known"])]
    return "\n".join(lines)


def _branches(lineage: Lineage, end: Callable[[Link], str], other: Callable[[Link], str]) -> Iterator[str]:
    """The lines of a tree over links from one of their ends to the other; what has been shown is not opened again."""
    below: dict[str, list[Link]] = {}
    for link in lineage.links:
        below.setdefault(end(link), []).append(link)
    seen = {lineage.root}
    left = [(link, "", n == 0) for n, link in enumerate(reversed(below.get(lineage.root, [])))]
    while left:
        link, indent, last = left.pop()
        node = lineage.nodes[other(link)]
        again = node.id in seen and node.id in below
        yield f"{indent}{'└─' if last else '├─'} {_described(node, link)}{'  (see above)' if again else ''}"
        if node.id not in seen:
            seen.add(node.id)
            deeper = indent + ("   " if last else "│  ")
            left += [(one, deeper, n == 0) for n, one in enumerate(reversed(below.get(node.id, [])))]


def _described(node: Node, link: Link | None = None) -> str:
    at = f"  {link.type} at {link.key}" if link else ""
    if node.kind == "source":
        return f"{node.id}{at}"
    if node.kind == "forgotten":
        run = f", run {node.run_id}" if node.run_id else ""
        return f"{node.id}{at}  (forgotten{run})"
    what = "" if node.id == node.run_id else f"  run {node.run_id}"
    return f"{node.id}{at}  {node.step} -c {node.config}{what}, {node.state}"


def mermaid(lineage: Lineage) -> str:
    """The lineage as a Mermaid flowchart, left to right."""
    names = {node: f"n{n}" for n, node in enumerate(lineage.nodes)}
    lines = ["flowchart LR"]
    for node in lineage.nodes.values():
        text = [node.id] + ([f"{node.step} -c {node.config}", node.state] if node.kind == "run" else [])
        text += ["forgotten"] if node.kind == "forgotten" else []
        label = "<br/>".join(map(quoted, text))
        shape = f'["{label}"]' if node.kind == "run" else f'(["{label}"])'
        lines.append(f"    {names[node.id]}{shape}" + (":::root" if node.id == lineage.root else ""))
    for link in lineage.links:
        lines.append(f'    {names[link.maker]} -- "{quoted(link.type)}" --> {names[link.user]}')
    return "\n".join([*lines, "    classDef root stroke-width:3px"])
