"""From a formula and batches of rows to carried columns, and back to the model's columns.

`specify` decides, from a pilot sample, what every batch is turned into (`specification`: from the
types of the columns alone); `block` does it, on the workers; `learn` says after the pass which
linear combinations of the carried columns are the columns of the model; `matrix` evaluates those
on any rows.
"""

from dmixed.design.batches import Batch, block
from dmixed.design.matrices import ModelRows, fixed_rows, matrix
from dmixed.design.recoding import (
    BarDesign,
    Design,
    FactorLevels,
    TermDesign,
    component_column,
    learn,
    merge_levels,
)
from dmixed.design.spec import (
    DesignSpec,
    Key,
    RandomTerm,
    carried_names,
    specification,
    specify,
)

__all__ = [
    "BarDesign",
    "Batch",
    "Design",
    "DesignSpec",
    "FactorLevels",
    "Key",
    "ModelRows",
    "RandomTerm",
    "TermDesign",
    "block",
    "carried_names",
    "component_column",
    "fixed_rows",
    "learn",
    "matrix",
    "merge_levels",
    "specification",
    "specify",
]
