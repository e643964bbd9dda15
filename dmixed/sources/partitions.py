"""Small partitions of a Dask DataFrame, computed where they are read and not by tasks of their own.

Dask takes milliseconds for each task, which is longer than the rows of a small partition take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dask.core import get
from dask.delayed import Delayed

from dmixed.sources.base import Part

NODES = 64
"""Nodes of Dask's graph that a partition may be made of, to be computed one after the other."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition, with the graph that it is made of.

    Attributes
    ----------
    name
        for messages
    graph
        nodes of Dask's graph, which need no others
    key
        that of the partition among them
    """

    name: str
    graph: Mapping[Any, Any]
    key: Any

    def __call__(self) -> Any:
        """The pandas frame, computed here; what is needed once is forgotten at once."""
        try:
            return get(dict(self.graph), [self.key])[0]
        except Exception as error:
            error.add_note(f"dmixed: while Dask's {self.name} was computed")
            raise


def on_their_own(parts: Sequence[Part]) -> list[Part]:
    """Parts that compute their own partitions, or the same parts where that is not possible.

    It is not where partitions share a node, which would be computed again for each of them; where
    something is on the cluster already (futures); and where partitions are made of many nodes.
    """
    if not all(isinstance(part.task, Delayed) for part in parts):
        return list(parts)
    graph = _nodes(parts[0].task)  # all partitions of a frame have one graph
    found, met, seen = [], set[Any](), 0
    for part in parts:
        own = _needed(graph, part.task.key)
        if own is None:
            return list(parts)
        met.update(own)
        seen += len(own)
        if len(met) < seen:
            return list(parts)
        found.append(replace(part, task=Partition(part.name, own, part.task.key)))
    return found


def _nodes(task: Delayed) -> dict[Any, Any]:
    """The graph of a task, each node with its dependencies, of which those on a cluster are absent.

    None at all where this version of Dask has no such form, which has no public name.
    """
    try:
        from dask._task_spec import convert_legacy_graph
    except ImportError:
        return {}
    return convert_legacy_graph(dict(task.__dask_graph__()))


def _needed(graph: Mapping[Any, Any], key: Any) -> dict[Any, Any] | None:
    """Nodes that one is made of, itself among them; None if one is absent, or they are many."""
    found: dict[Any, Any] = {}
    left = [key]
    while left:
        key = left.pop()
        if key in found:
            continue
        if key not in graph or len(found) == NODES:
            return None
        found[key] = graph[key]
        left += graph[key].dependencies
    return found
