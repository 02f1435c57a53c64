"""Which step feeds which, from the manifests alone: of each artifact type who makes it, takes it, converts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_launch.artifacts.mermaid import quoted
from nemotron_launch.catalog import ArtifactType, Step, is_a
from nemotron_launch.frozen import frozen


@frozen
class Edge:
    """What `maker` leaves, a `made`, `user` takes at `key`, where it asks for a `taken`: that type or a wider one."""

    maker: str
    user: str
    made: str
    taken: str
    key: str


@frozen
class StepGraph:
    """Steps by id, types by name, and the edges between steps."""

    steps: tuple[Step, ...]
    types: Mapping[str, ArtifactType]
    edges: tuple[Edge, ...]

    def makers(self, type_name: str) -> list[str]:
        """Steps that produce exactly this type."""
        return [step.id for step in self.steps if any(port.type == type_name for port in step.produces)]

    def takers(self, type_name: str) -> list[tuple[str, str]]:
        """Steps and keys that ask for exactly this type."""
        return [(step.id, port.key) for step in self.steps for port in step.consumes if port.type == type_name]

    def conversions(self, type_name: str) -> list[tuple[str, str]]:
        """The types that this one is converted to, and the step that does it, of those that exist."""
        kind = self.types.get(type_name)
        ids = {step.id for step in self.steps}
        return [(to, step) for to, step in kind.convert_to.items() if step in ids] if kind else []

    def used_types(self) -> list[str]:
        """The types that a step makes or takes, in the order of artifacts.yaml."""
        used = {port.type for step in self.steps for port in (*step.consumes, *step.produces)}
        return [name for name in self.types if name in used] + sorted(used - set(self.types))

    def as_data(self) -> dict[str, Any]:
        return {
            "steps": [
                {
                    "id": step.id,
                    "consumes": [{"type": port.type, "key": port.key} for port in step.consumes],
                    "produces": [{"type": port.type, "key": port.key} for port in step.produces],
                }
                for step in self.steps
            ],
            "types": [
                {"name": name, "is_a": self.types[name].is_a if name in self.types else None,
                 "convert_to": dict(self.conversions(name))}
                for name in self.used_types()
            ],
            "edges": [dict(vars(edge)) for edge in self.edges],
        }  # fmt: skip


def step_graph(steps: Sequence[Step], types: Mapping[str, ArtifactType]) -> StepGraph:
    """The graph of these steps. An artifact goes where its very type is asked for; elsewhere, where a wider one is."""
    edges = []
    for maker in steps:
        for made in maker.produces:
            for user in steps:
                fits = [port for port in user.consumes if is_a(dict(types), made.type, port.type)]
                exact = [port for port in fits if port.type == made.type]
                edges += [Edge(maker.id, user.id, made.type, port.type, port.key) for port in exact or fits]
    return StepGraph(tuple(steps), types, tuple(edges))


def text(graph: StepGraph) -> str:
    """The graph for a terminal: of each type who makes it, who takes it, and what it may be used or converted as."""
    lines = []
    for name in graph.used_types():
        kind = graph.types.get(name)
        lines.append(name + (f"  (a {kind.is_a})" if kind and kind.is_a else ""))
        lines.append(f"  made by       {', '.join(graph.makers(name)) or 'no step: give a path'}")
        takers = graph.takers(name)
        own = {step for step, _ in takers}
        wider = [other for other in graph.used_types() if other != name and is_a(dict(graph.types), name, other)]
        below = [other for other in wider if {step for step, _ in graph.takers(other)} - own]
        lines += [f"  {'taken by' if n == 0 else '':<12}  {step}  at {key}" for n, (step, key) in enumerate(takers)]
        lines += [f"  {'':<12}  every step that takes {other}" for other in below]
        lines += [f"  converted     to {to} by {step}" for to, step in graph.conversions(name)]
        lines.append("")
    return "\n".join(lines).rstrip()


def mermaid(graph: StepGraph) -> str:
    """The graph as a Mermaid flowchart: steps are boxes, types rounded; a dotted line leads to the wider type."""
    steps = {step.id: f"s{n}" for n, step in enumerate(graph.steps)}
    types = {name: f"t{n}" for n, name in enumerate(graph.used_types())}
    lines = ["flowchart LR"]
    lines += [f'    {name}["{quoted(step)}"]' for step, name in steps.items()]
    lines += [f'    {name}(["{quoted(kind)}"])' for kind, name in types.items()]
    links = [f"    {steps[step.id]} --> {types[port.type]}" for step in graph.steps for port in step.produces]
    links += [f"    {types[port.type]} --> {steps[step.id]}" for step in graph.steps for port in step.consumes]
    links += [
        f"    {types[name]} -. is a .-> {types[kind.is_a]}"
        for name in types
        if (kind := graph.types.get(name)) and kind.is_a in types
    ]
    return "\n".join([*lines, *dict.fromkeys(links)])
