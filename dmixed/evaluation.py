"""Evaluations: sums over all groups at one covariance, in threads here or on a cluster's workers.

What one task evaluates is set by the data, and sums are added slice by slice, then shard by shard,
so that they do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import Any
from weakref import WeakSet

from dmixed.bases import Coordinates
from dmixed.blocks import Floats
from dmixed.cellmoments import CellMoments, Summary
from dmixed.covariance import Blocks
from dmixed.design import DesignSpec
from dmixed.dispatch import RETRIES, gather, in_threads, one_blas_thread, unique_key
from dmixed.errors import DmixedError, NotSupportedError
from dmixed.factors import Factors, Shard, Within, one_level
from dmixed.keys import Labels
from dmixed.likelihood import profile_terms
from dmixed.nested import Bucket
from dmixed.onelevel import GROUPS, OneLevel
from dmixed.terms import ProfileTerms

SLICE = 16 * GROUPS
"""Groups of one factor evaluated by one task."""

FEW_CLUSTERS = 1024
"""Clusters in all that are not worth the threads, if every bucket is a single chunk."""

FEW_GROUPS = GROUPS
"""Groups of one factor in all that are not worth the threads."""

TASK_CHUNKS = 16
"""Chunks of clusters evaluated by one task."""


class Evaluator:
    """`ProfileTerms` of all groups at a root of Psi."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        parts = factors.evaluated
        n_groups = sum(part.n_groups for part in parts)
        self.small = all(isinstance(part, OneLevel) for part in parts) and n_groups <= FEW_GROUPS
        self.small |= n_groups <= FEW_CLUSTERS and all(
            isinstance(part, Bucket) and part.step >= part.n_groups for part in parts
        )

    def __call__(self, root: Floats, order: int = 2) -> ProfileTerms:
        """Terms up to derivatives of an order."""
        factors = self.factors
        if factors.elsewhere is not None:
            return factors.elsewhere.terms(factors.blocks, root, order)
        evaluate = partial(_slice_terms, factors.blocks, root, order)
        calls = [(part, groups) for part in factors.evaluated for groups in slices(part)]
        if self.small:
            return reduce(add, map(evaluate, calls))
        found = iter(in_threads(evaluate, calls))
        return reduce(
            add,
            (reduce(add, (next(found) for _ in slices(part))) for part in factors.evaluated),
        )


def slices(part: OneLevel | Bucket) -> list[slice]:
    """Groups or clusters that one task evaluates."""
    step = TASK_CHUNKS * part.step if isinstance(part, Bucket) else SLICE
    n = part.n_groups
    return [slice(start, min(start + step, n)) for start in range(0, max(n, 1), step)]


def _slice_terms(
    blocks: Blocks, root: Floats, order: int, call: tuple[OneLevel | Bucket, slice]
) -> ProfileTerms:
    part, groups = call
    return profile_terms(blocks, part, root, order, groups)


def part_terms(blocks: Blocks, root: Floats, order: int, part: OneLevel) -> ProfileTerms:
    """Terms of a whole part, summed as an `Evaluator` does."""
    evaluate = partial(_slice_terms, blocks, root, order)
    return reduce(add, (evaluate((part, groups)) for groups in slices(part)))


# --------------------------------------------------------------- moments that stay on workers


@dataclass(frozen=True, eq=False)
class RemoteMoments:
    """Moments in shards on the workers of a cluster, which hold them as long as this is held.

    They are results of pure tasks: a worker that is lost costs the time to make its shards again.

    Attributes
    ----------
    summary
        what is known of all cells together
    futures
        of the `CellMoments` of each shard
    """

    summary: Summary
    futures: tuple[Any, ...]
    client: Any
    _made: WeakSet[Any] = field(default_factory=WeakSet, repr=False)

    @property
    def spec(self) -> DesignSpec:
        """What was evaluated on the rows."""
        return self.summary.spec

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows dropped, by reason."""
        return self.summary.dropped

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self.summary.totals.nobs

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.summary.totals.n_groups

    def no_labels(self) -> Labels:
        """Labels of none of the cells, in their types."""
        first = self.client.submit(_no_labels, self.futures[0], pure=False)
        found: Labels = gather(self.client, [first])[0]
        return found

    def each(self, function: Callable[..., Any], *others: Sequence[Any], **options: Any) -> Any:
        """Futures of ``function(moments, *other, **options)`` of every shard.

        Raises
        ------
        DmixedError
            the client is closed, and the moments are gone with it
        """
        if self.client.status != "running":
            raise DmixedError(
                "the groups of this fit were on the workers of a cluster whose client is closed: "
                'keep it open, or fit again with checkpoint= or evaluate_on="driver"'
            )
        made = self.client.map(
            function, self.futures, *others, pure=False, retries=RETRIES, **options
        )
        self._made.update(made)
        return made

    def release(self) -> None:
        """Let the workers forget these moments and what `each` has made of them.

        Of use where an exception ends the work: an interpreter keeps the last one, and with it
        whatever its frames hold.
        """
        for future in (*self.futures, *self._made):
            future.release()

    def __reduce__(self) -> Any:
        raise NotSupportedError(
            "moments on the workers of a cluster cannot be pickled: fit with "
            'evaluate_on="driver", or write what you need (`ranef_table(out=...)`, `to_dict()`)'
        )


def _no_labels(moments: CellMoments) -> Labels:
    return moments.labels.first(0)


@dataclass(frozen=True, eq=False)
class RemoteFactors:
    """Factors of shards on the workers; evaluations travel there, `ProfileTerms` come back."""

    futures: tuple[Any, ...]
    client: Any

    def first(self) -> RemoteFactors:
        """The first shard alone."""
        return replace(self, futures=self.futures[:1])

    def terms(self, blocks: Blocks, root: Floats, order: int) -> ProfileTerms:
        """Terms of all groups, added shard by shard in order.

        Each thread of a worker gets one task for the shards that are there.
        """
        runs = _by_thread(self.client, self.futures)
        tasks = [
            self.client.submit(
                *(_shards_terms, blocks, root, order, [self.futures[i] for i in run]),
                key=unique_key("dmixed-evaluate"),
                pure=False,
                retries=RETRIES,
            )
            for run in runs
        ]
        found: dict[int, ProfileTerms] = {}
        for run, terms in zip(runs, gather(self.client, tasks), strict=True):
            found.update(zip(run, terms, strict=True))
        return reduce(add, (found[i] for i in range(len(self.futures))))


@one_blas_thread
def _shards_terms(
    blocks: Blocks, root: Floats, order: int, shards: Sequence[Shard]
) -> list[ProfileTerms]:
    return [part_terms(blocks, root, order, shard.evaluated) for shard in shards]


def _by_thread(client: Any, futures: Sequence[Any]) -> list[list[int]]:
    """Positions of futures by the worker that has them, one list for each of its threads."""
    holders, threads = client.who_has(list(futures)), client.nthreads()
    place: dict[str, list[int]] = {}
    for i, future in enumerate(futures):
        place.setdefault(next(iter(holders.get(future.key, ())), ""), []).append(i)
    runs = []
    for worker, own in place.items():
        # shards that were lost are made again wherever there is room, not all in one place
        n = len(own) if worker not in threads else max(1, min(threads[worker], len(own)))
        runs += [own[j::n] for j in range(n)]
    return runs


def remote_shards(moments: RemoteMoments, model: Coordinates) -> tuple[Any, list[ShardFacts]]:
    """Futures of the factors of every shard, and what is to be known of them here."""
    futures = moments.each(_factored, model=model)
    facts = gather(moments.client, moments.client.map(_facts, futures, pure=False))
    return tuple(futures), facts


@one_blas_thread
def _factored(moments: CellMoments, model: Coordinates) -> Shard:
    return one_level(moments.group, model)


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What is known of a shard's factors: what its groups explain, and bytes to evaluate."""

    within: Within
    nbytes: int


def _facts(shard: Shard) -> ShardFacts:
    return ShardFacts(shard.within, shard.evaluated.RT.nbytes)


def _evaluated(shard: Shard) -> OneLevel:
    return shard.evaluated


def evaluated_here(client: Any, futures: Sequence[Any]) -> tuple[OneLevel, ...]:
    """What is evaluated of some shards, brought to this process."""
    return tuple(gather(client, client.map(_evaluated, list(futures), pure=False)))
