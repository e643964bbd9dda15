"""How a pass is divided: by the data alone, so that its sums do not depend on the machine.

A task reads a run of parts into one state; states are divided into shards by a hash of the labels
and added shard by shard. How many tasks and shards there are follows from the number of rows and
an estimate of the number of groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from dask.delayed import Delayed

from dmixed.design import DesignSpec, block
from dmixed.design.columns import Rows
from dmixed.index import LabelIndex
from dmixed.sources import Part
from dmixed.sources.partitions import Partition

TASKS, TASK_ROWS = 8, 64_000_000
"""The pass has at most `TASKS` tasks for every `TASK_ROWS` rows."""

FEW_TASKS, REPEATS = 4, 24
"""Tasks at least, and rows of a task for each group it meets: adding states is to cost little."""

STATE = 2**29
"""Bytes of a task's state at most, by estimate."""

WHOLE, SHARD, SHARDS = 2**25, 2**27, 8
"""Bytes of all moments that are not divided; of a shard; shards at least, if there are any."""

FEW, MANY, TOGETHER = 4, 16, 2**25
"""States added by one task, at least and at most; bytes of those that are more than few."""

SMALL_FRAME = 2**16
"""Rows of a Dask partition up to which a task may compute several of them."""

FRAMES, FRAME_TASKS, FRAME_ROWS = 16, 128, 2**18
"""Small Dask partitions of a task at most; tasks for them at least, if there are as many
partitions; rows of a task at most, by estimate.

How long Dask takes for a partition is not known, so that they are spread wider than files."""

SAMPLE_ROWS = 2**14
"""Rows whose keys are looked at."""

PIECES = 20_000
"""Tasks that take a shard of a state, at most."""

OVERLAP = 1.5
"""Parts that a key lies in the range of, on average, up to which keys count as clustered."""

RUN_ROWS = 1.5
"""Runs of a label in neighbouring rows, on average, up to which keys count as clustered."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What some rows tell of the keys.

    Attributes
    ----------
    groups
        estimate of the number of groups in all rows
    clustered
        rows of a group are neighbours, or in few parts
    share
        largest share of the rows under one key
    """

    groups: float
    clustered: bool
    share: float

    def met(self, rows: float, of: float) -> float:
        """Estimate of the groups that a run of rows, of so many in all, has."""
        if self.clustered:
            return self.groups * rows / max(of, 1.0)
        return self.groups * -math.expm1(-rows / max(self.groups, 1.0))


@dataclass(frozen=True, slots=True)
class Layout:
    """Tasks and shards of a pass.

    Attributes
    ----------
    runs
        parts that each task reads
    bunch
        states that are added before they are divided
    coarse
        shards that states are divided into first; all of them, unless there are too many
    shards
        a power of two
    fan
        states, or shards of them, that are added by one task
    expected
        estimate of the groups that a task meets
    """

    runs: tuple[range, ...]
    bunch: int
    coarse: int
    shards: int
    fan: int
    expected: int

    def __post_init__(self) -> None:
        assert self.shards & (self.shards - 1) == self.coarse & (self.coarse - 1) == 0
        assert self.coarse <= self.shards


@dataclass(frozen=True, slots=True)
class PassPlan:
    """What a pass is going to be.

    Attributes
    ----------
    parts
        to read
    rows
        in all parts, or an estimate; 0 where nothing tells
    counted
        whether metadata tell the rows
    nbytes
        compressed bytes to read, None where no metadata tells
    keys, layout
        see `Keys` and `Layout`
    group_bytes
        bytes of the sums of one group
    """

    parts: int
    rows: int
    counted: bool
    nbytes: int | None
    keys: Keys
    layout: Layout
    group_bytes: int

    @property
    def moments_bytes(self) -> float:
        """Bytes of all moments, by estimate."""
        return self.keys.groups * self.group_bytes

    @property
    def state_bytes(self) -> float:
        """Bytes of what a task holds of moments, by estimate."""
        return self.layout.expected * self.group_bytes


def keys_of(codes: np.ndarray, rows: int) -> Keys:
    """What the codes (m,) of some neighbouring rows tell of all rows."""
    codes = codes[codes >= 0]
    m = len(codes)
    if m == 0:
        return Keys(0.0, False, 0.0)
    counts = np.bincount(codes)
    d = int(np.count_nonzero(counts))
    share = float(counts.max()) / m
    runs = 1 + int(np.count_nonzero(codes[1:] != codes[:-1]))
    if m >= rows:
        return Keys(float(d), runs <= RUN_ROWS * d, share)
    if m >= 2 * d and runs <= RUN_ROWS * d:
        return Keys(d * rows / m, True, share)
    return Keys(min(_population(d, m), float(rows)), False, share)


def _population(distinct: int, drawn: int) -> float:
    """Groups of which so many draws meet so many: G (1 - exp(-m / G)) = d, by bisection."""
    if distinct >= drawn:
        return float(drawn) ** 2
    low, high = float(distinct), float(drawn) ** 2
    for _ in range(60):
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-drawn / middle) < distinct:
            low = middle
        else:
            high = middle
    return low


def sample_keys(spec: DesignSpec, sample: pa.Table, rows: int) -> Keys:
    """Keys of all rows, from some."""
    table = Rows(sample, spec.context, "")
    codes = LabelIndex(spec.group).encode([table.key(key.node) for key in spec.keys])
    return keys_of(codes, rows)


def with_ranges(keys: Keys, ranges: Sequence[tuple[Any, Any]]) -> Keys:
    """What the ranges of a key of whole numbers in each part tell besides.

    Parts whose ranges hardly overlap share few groups, in whatever order the rows of a part are.
    """
    if not all(isinstance(end, int) for pair in ranges for end in pair) or not ranges:
        return keys
    whole = max(high for _, high in ranges) - min(low for low, _ in ranges) + 1
    apart = sum(high - low + 1 for low, high in ranges) <= OVERLAP * whole and len(ranges) > 1
    groups = keys.groups
    if apart and not keys.clustered:  # the sample is of the first part
        groups *= len(ranges)
    return replace(keys, groups=min(groups, float(whole)), clustered=keys.clustered or apart)


def group_bytes(spec: DesignSpec, pilot: pa.Table) -> int:
    """Bytes of the sums of one group."""
    made = block(spec, pilot).block
    return 8 * (len(made.random) * len(made.columns) + 2)


def layout(
    spec: DesignSpec,
    parts: Sequence[Part],
    rows: int,
    keys: Keys,
    size: int,
    divided: bool = False,
) -> Layout:
    """Divide a pass.

    Parameters
    ----------
    rows
        in all parts, or an estimate
    size
        bytes of the sums of one group
    divided
        there are to be shards, however small
    """
    n = len(parts)
    shards = _shards(keys.groups * size) if divisible(spec) else 1
    if divided:
        shards = max(shards, SHARDS)
    if any(isinstance(part.task, Delayed) for part in parts):
        tasks = n  # a task would hold all the frames that it waits for
    elif any(isinstance(part.task, Partition) for part in parts):
        tasks = max(
            math.ceil(n / FRAMES), min(n, FRAME_TASKS), min(n, math.ceil(rows / FRAME_ROWS))
        )
    else:
        tasks = min(n, _tasks(rows, keys, size))
    ends = [round(n * (i + 1) / tasks) for i in range(tasks)]
    runs = tuple(range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True))
    expected = math.ceil(keys.met(rows / tasks, rows)) if rows else 0
    # adding states before they are divided saves pieces, while their sum is no larger than a state
    most = STATE // max(expected * size, 1) if rows else tasks
    bunch = max(1, min(math.ceil(tasks * shards / PIECES), most))
    coarse = shards
    if math.ceil(tasks / bunch) * shards > PIECES:
        coarse = 1 << shards.bit_length() // 2
    fan = TOGETHER * coarse // (expected * size) if expected else FEW
    return Layout(runs, bunch, coarse, shards, min(max(fan, FEW), MANY), expected)


def divisible(spec: DesignSpec) -> bool:
    """Whether every random term has all keys, so that any set of groups stands for itself."""
    return all(len(term.key) == len(spec.keys) and not term.reduced for term in spec.terms)


def _tasks(rows: int, keys: Keys, size: int) -> int:
    most = TASKS * max(1, math.ceil(rows / TASK_ROWS))
    tasks = most
    if not keys.clustered:
        tasks = min(most, max(FEW_TASKS, round(rows / max(REPEATS * keys.groups, 1.0))))
    while keys.met(rows / tasks, rows) * size > STATE:
        tasks *= 2
    return tasks


def _shards(nbytes: float) -> int:
    if nbytes <= WHOLE:
        return 1
    return max(SHARDS, 1 << (math.ceil(nbytes / SHARD) - 1).bit_length())
