"""What a fit is going to do, before it does it; and afterwards, how far that was right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dmixed.dispatch import find_client
from dmixed.executor import DRIVER, check_evaluate_on, plan_pass
from dmixed.formula import parse
from dmixed.markup import page
from dmixed.model import MixedLM, placed
from dmixed.planning import TASK_ROWS, TASKS, divisible
from dmixed.results import MixedLMResults
from dmixed.tabular import text_lines

EVALUATIONS = 7
"""Evaluations of the criterion that a fit takes, on average over hard models."""

SKEW = 0.2
"""Share of the rows under one key that a plan mentions."""

BUSY = 0.5
"""Share of a worker's memory that moments may take without a warning."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fit is going to do.

    Attributes
    ----------
    formula
        the model
    columns
        data columns that are read
    passes
        over the rows
    parts, tasks
        parts of the data, and tasks that read them
    rows, rows_counted
        rows, and whether metadata tell them (else an estimate; 0 where nothing tells)
    bytes_to_read
        compressed bytes of the columns; None where no metadata tells
    groups
        estimate of the groups (combinations of all keys)
    clustered
        rows of a group are neighbours, or in few parts
    bytes_per_group, moments_bytes, state_bytes
        sums of one group, of all groups, and what one task holds at a time
    shards
        that the moments are divided into
    evaluated
        "this process" or "workers"
    evaluations
        expected
    workers, threads, memory
        of the cluster; 0 and None without one
    warnings
        in words
    """

    formula: str
    columns: tuple[str, ...]
    passes: int
    parts: int
    tasks: int
    rows: int
    rows_counted: bool
    bytes_to_read: int | None
    groups: int
    clustered: bool
    bytes_per_group: int
    moments_bytes: int
    state_bytes: int
    shards: int
    evaluated: str
    evaluations: int
    workers: int
    threads: int
    memory: int | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {**asdict(self), "columns": list(self.columns), "warnings": list(self.warnings)}

    def compare(self, result: MixedLMResults) -> dict[str, tuple[Any, Any]]:
        """Planned and found of a fit: rows, groups, bytes of moments, evaluations, where."""
        moments = result._prepared.moments
        totals = moments.summary.totals
        return {
            "rows": (self.rows, result.nobs + sum(result.dropped.values())),
            "groups": (self.groups, totals.n_groups),
            "moments_bytes": (self.moments_bytes, totals.nbytes),
            "evaluations": (self.evaluations, result.optimizer_summary.evaluations),
            "evaluated": (
                self.evaluated,
                "workers" if result._prepared.problem.factors.elsewhere else "this process",
            ),
        }

    def _lines(self) -> list[tuple[str, str]]:
        about = "" if self.rows_counted else "about "
        read = "unknown" if self.bytes_to_read is None else _bytes(self.bytes_to_read)
        rows = f"{about}{self.rows:,}" if self.rows else "unknown"
        order = "neighbours or in few parts" if self.clustered else "spread over the data"
        where = self.evaluated
        if self.workers:
            where += f" ({_count(self.workers, 'worker')}, {_count(self.threads, 'thread')}"
            where += ")" if self.memory is None else f", {_bytes(self.memory)} each)"
        return [
            ("Model:", self.formula),
            ("Columns read:", ", ".join(self.columns)),
            ("Passes over the rows:", str(self.passes)),
            (
                "Rows:",
                f"{rows} in {_count(self.parts, 'part')}, read by {_count(self.tasks, 'task')}",
            ),
            ("Bytes to read:", read),
            ("Groups:", f"about {self.groups:,}, whose rows are {order}"),
            (
                "Moments:",
                f"{_bytes(self.moments_bytes)} ({self.bytes_per_group} bytes a group) in "
                f"{_count(self.shards, 'shard')}; a task holds {_bytes(self.state_bytes)}",
            ),
            ("Likelihood evaluated:", f"in {where}, about {self.evaluations} times"),
            *(("Warning:", text) for text in self.warnings),
        ]

    def __str__(self) -> str:
        return "\n".join(text_lines(self._lines()))

    def _repr_html_(self) -> str:
        return page("Plan", [(label.rstrip(":"), value) for label, value in self._lines()])


def plan(
    formula: str,
    data: Any,
    weights: str | None = None,
    offset: str | None = None,
    client: Any = None,
    context: Mapping[str, Any] | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    filters: Any = None,
    version: int | None = None,
    snapshot: int | None = None,
    evaluate_on: str = "auto",
) -> Plan:
    """What `lmer` with the same arguments is going to do; reads metadata and a sample only.

    Rows, bytes and the estimate of the groups come from metadata, the first rows, and ranges of
    the keys in each part; they are estimates, and what they decide (tasks, shards) changes how
    long a fit takes, not what it finds.

    Raises
    ------
    DataError
        as `lmer`, of what can be seen without reading the rows
    """
    check_evaluate_on(evaluate_on)
    place = placed(storage_options, filters, version, snapshot)
    parsed = parse(formula, context or ())
    model = MixedLM._of(parsed, data, weights, offset, "drop", client, context, place)
    spec, client = model.spec, find_client(client)
    remote = evaluate_on == "workers"
    _, found = plan_pass(spec, model.source, model._pilot, client, remote)
    info = client.scheduler_info(n_workers=-1)["workers"] if client is not None else {}
    memory = min((w["memory_limit"] for w in info.values()), default=0) or None
    large = found.layout.shards > 1 and found.moments_bytes > DRIVER
    there = client is not None and (remote or (evaluate_on == "auto" and large))
    made = Plan(
        formula=model.formula,
        columns=spec.columns,
        passes=1,
        parts=found.parts,
        tasks=len(found.layout.runs),
        rows=found.rows,
        rows_counted=found.counted,
        bytes_to_read=found.nbytes,
        groups=round(found.keys.groups),
        clustered=found.keys.clustered,
        bytes_per_group=found.group_bytes,
        moments_bytes=round(found.moments_bytes),
        state_bytes=round(found.state_bytes),
        shards=found.layout.shards,
        evaluated="workers" if there else "this process",
        evaluations=EVALUATIONS,
        workers=len(info),
        threads=sum(w["nthreads"] for w in info.values()),
        memory=memory,
        warnings=(),
    )
    return _with_warnings(made, found.keys.share, divisible(spec))


def _with_warnings(plan: Plan, share: float, one_factor: bool) -> Plan:
    said = []
    if share > SKEW and plan.groups > 1 / SKEW:
        said.append(
            f"{share:.0%} of the sampled rows have one key: harmless for the sums, but see whether "
            "that key stands for missing ones"
        )
    per_worker = plan.moments_bytes / max(plan.workers, 1)
    if plan.memory is not None and plan.evaluated == "workers":
        if 2 * per_worker + plan.state_bytes > BUSY * plan.memory:
            said.append(
                f"moments take about {_bytes(2 * per_worker + plan.state_bytes)} of each "
                f"worker's {_bytes(plan.memory)}: use more workers, or larger ones"
            )
    elif plan.evaluated == "this process" and plan.moments_bytes > 2**32:
        said.append(
            f"about {_bytes(plan.moments_bytes)} of moments come to this process"
            + (
                ': evaluate_on="workers" leaves them on a cluster'
                if one_factor
                else ": models of several factors are evaluated here"
            )
        )
    if plan.workers and plan.tasks < plan.threads and plan.rows > TASK_ROWS // TASKS:
        said.append(
            f"{plan.tasks} tasks leave some of the {plan.threads} threads idle: adding sums of "
            "that many groups costs more than reading fewer rows each saves"
        )
    return Plan(**{**{f: getattr(plan, f) for f in plan.__slots__}, "warnings": tuple(said)})


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _bytes(n: float) -> str:
    """A size in words."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError(n)
