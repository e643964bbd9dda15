"""YAML of plain mappings, lists and scalars, each with the line it is in.

Nothing in a file is run or made that is not plain: tags, anchors and aliases are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from dmixed.errors import JobError

SIZE = 2**16
"""Bytes of a file at most."""

DEPTH = 6
"""Collections within each other at most."""

Steps: TypeAlias = tuple[str | int, ...]
"""Names of fields and positions in lists, from the outermost."""


@dataclass(frozen=True, slots=True)
class Yaml:
    """Values of a file, and the line of each by its path."""

    plain: dict[str, Any]
    lines: dict[Steps, int]

    def line(self, path: Sequence[str | int]) -> int:
        """Line of the value at a path, or of what it should be in."""
        while tuple(path) not in self.lines:
            path = path[:-1]
        return self.lines[tuple(path)]


def read_yaml(path: Path, name: str) -> Yaml:
    """The mapping of a file.

    Parameters
    ----------
    name
        what messages call it

    Raises
    ------
    JobError
        naming the line that is no YAML, or more than plain YAML
    """
    return _parsed(_content(path, name), name)


def _content(file: Path, name: str) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(SIZE + 1)
        if len(content) > SIZE:
            raise JobError([f"{name}: has more than {SIZE:,} bytes"])
        return content.decode("utf-8-sig")
    except OSError as error:
        raise JobError([f"{name}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise JobError([f"{name}: is not UTF-8 text: {error.reason}"]) from None


def _parsed(text: str, name: str) -> Yaml:
    """The mapping of a text."""
    lines: dict[Steps, int] = {}
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:  # the time to read them is quadratic
                raise JobError([f"{name}:{_line(event)}: has lists within lists within lists"])
            if getattr(event, "anchor", None) is not None:
                raise JobError([f"{name}:{_line(event)}: anchors and aliases are not read here"])
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise JobError([f"{name}:1: must hold fields, as 'name: value'"])
            plain = _value(loader, root, (), lines, name)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{name}:{mark.line + 1}" if mark is not None else name
        raise JobError([f"{place}: is not YAML: {error.problem}"]) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise JobError([f"{name}: is not YAML: {' '.join(str(error).split())}"]) from None
    return Yaml(plain, lines)


def _value(loader: Any, node: yaml.Node, path: Steps, lines: dict[Steps, int], name: str) -> Any:
    """What a node says; the lines are noted."""
    here = _line(node)
    lines.setdefault(path, here)
    plain = f"tag:yaml.org,2002:{'map' if isinstance(node, yaml.MappingNode) else 'seq'}"
    if isinstance(node, yaml.ScalarNode):
        try:
            return loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise JobError([f"{name}:{here}: {node.value!r} cannot be read: {error}"]) from None
    if node.tag != plain:
        raise JobError([f"{name}:{here}: the tag {node.tag!r} is not read here"])
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, x, (*path, i), lines, name) for i, x in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = _line(key_node)
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise JobError([f"{name}:{line}: the name of a field must be text"])
        if key in found:
            raise JobError([f"{name}:{line}: {dotted((*path, key))}: is there twice"])
        lines[(*path, key)] = line
        found[key] = _value(loader, value_node, (*path, key), lines, name)
    return found


def _line(node: yaml.Node | yaml.Event) -> int:
    """Line on which something begins."""
    assert node.start_mark is not None
    return node.start_mark.line + 1


def dotted(path: Sequence[str | int]) -> str:
    """A path as messages show it: ``drift.limit``, ``filters[0]``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
