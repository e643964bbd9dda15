"""Formulas: text to terms and bars, without data and without running any of it."""

from dmixed.formula.bars import Bar
from dmixed.formula.parsing import ParsedFormula, Words, parse, parse_parts, parse_terms

__all__ = ["Bar", "ParsedFormula", "Words", "parse", "parse_parts", "parse_terms"]
