"""Results as files that other programs read: JSON, and Parquet of the random effects."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dmixed.records import new_directory
from dmixed.results import MixedLMResults

RESULT, RANDOM_EFFECTS = "result.json", "random_effects.parquet"


def write_result(result: MixedLMResults, out: Path) -> None:
    """Write ``result.json`` and ``random_effects.parquet``, all or nothing.

    With several factors there is a ``random_effects_FACTOR.parquet`` for each.

    Parameters
    ----------
    result
        what to write: `MixedLMResults.to_dict` as strict JSON (NaN and infinities are null), and
        `MixedLMResults.ranef` with the group labels as first columns
    out
        a directory, new or empty. A new one appears complete, by renaming; in one that exists
        (it may be a mount point) ``result.json`` appears last.

    Raises
    ------
    DataError
        there is something already
    OSError
        the directory cannot be written; nothing is left behind
    """
    with new_directory(out, RESULT) as folder:
        tables = _effect_tables(result)
        for name, effects in tables.items():
            taken = set(effects.columns)
            effects.index.names = [f"group {n}" if n in taken else n for n in effects.index.names]
            effects.reset_index().to_parquet(folder / name, index=False)
        (folder / RESULT).write_bytes(result_json(result, list(tables)))


def result_json(result: MixedLMResults, random_effects: Sequence[str]) -> bytes:
    """`MixedLMResults.to_dict` as strict JSON, with the names of the files of random effects."""
    return json_bytes({**result.to_dict(), "random_effects": list(random_effects)})


def json_bytes(record: dict[str, Any]) -> bytes:
    """A record as strict JSON: NaN and infinities are null."""
    text = json.dumps(_strict(record), indent=2, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


def _effect_tables(result: MixedLMResults) -> dict[str, pd.DataFrame]:
    """Tables of random effects by file name: one for each factor where there are several."""
    found = result.ranef()
    if isinstance(found, pd.DataFrame):
        return {RANDOM_EFFECTS: found}
    tables: dict[str, pd.DataFrame] = {}
    for label, table in found.items():
        stem = f"random_effects_{re.sub(r'[^A-Za-z0-9_.-]', '_', label)}"
        while f"{stem}.parquet" in tables:
            stem += "_"
        tables[f"{stem}.parquet"] = table
    return tables


def _strict(value: Any) -> Any:
    """The value with every NaN and infinity, which JSON has not, as None."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
