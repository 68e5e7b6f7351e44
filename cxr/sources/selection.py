"""`--select`: an expression over the manifest's columns that says which images to use.

    view in PA,AP and (age_years >= 18 or sex == F)

The grammar, from the weakest to the strongest binding:

    expression: and-expression {"or" and-expression}
    and-expression: term {"and" term}
    term: "not" term | "(" expression ")" | column comparison
    comparison: ("==" | "!=" | "<" | "<=" | ">" | ">=") value | ["not"] "in" value {"," value}

A value is a word, a number or a quoted text. Text is compared without regard to case. The value `unknown` stands for
an unknown one: `view in PA,unknown`. Otherwise an unknown value equals nothing and is neither less nor greater than
anything, so that `view in PA,AP` leaves out images of unknown view, and `view not in LL,LATERAL` keeps them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from cxr import schema
from cxr.errors import UserError
from cxr.imaging import dicom_terms
from cxr.wording import counted

TEXTS = (
    schema.IMAGE_ID,
    schema.PATIENT_ID,
    schema.SPLIT,
    schema.STUDY_ID,
    schema.SERIES_ID,
    schema.SEX,
    schema.VIEW,
    schema.BODY_PART,
    schema.MODALITY,
)
NUMBERS = (schema.AGE_YEARS,)
COLUMNS = (*TEXTS, *NUMBERS, schema.EXTRA)
"""The columns that an expression may need; the keys of `schema.EXTRA` are columns too."""

_IDS = (schema.IMAGE_ID, schema.PATIENT_ID, schema.STUDY_ID, schema.SERIES_ID)  # never quoted in messages
_CODES = {  # values that are correct even if no image has them
    schema.SPLIT: schema.SPLITS,
    schema.SEX: ("F", "M", "O"),
    schema.VIEW: dicom_terms.VIEWS,
    schema.BODY_PART: dicom_terms.BODY_PARTS,
    schema.MODALITY: dicom_terms.MODALITIES,
}
_UNKNOWN = "unknown"
_TOKEN = re.compile(r"""\s*(?:(==|!=|<=|>=|[=<>(),])|"([^"]*)"|'([^']*)'|([^\s=!<>(),"']+))""")
_ORDERS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
_MOST_VALUES = 30  # listed in a message


@dataclass(frozen=True)
class Comparison:
    """A column compared with values; `operator` is "in" or one of `_ORDERS`, which have a single value."""

    column: str
    operator: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Not:
    """The images that the operand leaves out."""

    operand: Expression


@dataclass(frozen=True)
class AllOf:
    """The images that every operand selects."""

    operands: tuple[Expression, ...]


@dataclass(frozen=True)
class AnyOf:
    """The images that some operand selects."""

    operands: tuple[Expression, ...]


Expression = Comparison | Not | AllOf | AnyOf


def parse(text: str) -> Expression:
    """Parse an expression.

    Raises:
        UserError: it does not follow the grammar.
    """
    return _Parser(text).whole()


def select(table: pa.Table, text: str, source: str) -> tuple[pa.Table, list[str]]:
    """The rows of a manifest or of shards that an expression selects, and a note that counts the others.

    Args:
        table: has `COLUMNS`.
        source: name of the origin of the columns, for messages, such as "source folder".

    Raises:
        UserError: the expression is invalid, names a column or a value that is not known, or selects nothing.
    """
    if not text.strip():
        return table, []
    expression = parse(text)
    columns = _Columns(table, source)
    chosen = _evaluate(expression, columns)
    left_out = int((~chosen).sum())
    reasons = "; ".join(filter(None, (columns.count(name, ~chosen) for name in _names(expression))))
    summary = f"--select {text!r} left out {left_out:,} of {counted(len(chosen), 'image')}"
    summary += f" ({reasons})" if left_out and reasons else ""
    if left_out == len(chosen):
        raise UserError(f"{summary}: use an expression that some image meets")
    return table.filter(pa.array(chosen)), [summary]


def _evaluate(expression: Expression, columns: _Columns) -> np.ndarray:
    """(N,) bool: the selected images."""
    match expression:
        case Comparison():
            return columns.compare(expression)
        case Not(operand):
            return ~_evaluate(operand, columns)
        case AllOf(operands):
            return np.logical_and.reduce([_evaluate(operand, columns) for operand in operands])
        case AnyOf(operands):
            return np.logical_or.reduce([_evaluate(operand, columns) for operand in operands])


def _names(expression: Expression) -> list[str]:
    """The columns of an expression, each once, in order."""
    match expression:
        case Comparison(column):
            return [column]
        case Not(operand):
            return _names(operand)
        case AllOf(operands) | AnyOf(operands):
            return list(dict.fromkeys(name for operand in operands for name in _names(operand)))


class _Columns:
    """The columns of a table, read as they are needed."""

    def __init__(self, table: pa.Table, source: str) -> None:
        self._table, self._source = table, source
        self._values: dict[str, np.ndarray] = {}
        self._extra: list[dict[str, Any]] | None = None

    def compare(self, comparison: Comparison) -> np.ndarray:
        """(N,) bool: the rows for which the comparison is true."""
        name, compared = comparison.column, comparison.values
        values = self.values(name)
        if values.dtype.kind == "f":
            numbers = np.array([self._number(name, value) for value in compared])
            if comparison.operator in _ORDERS:
                return _ORDERS[comparison.operator](values, numbers[0])  # false for NaN
            return np.isin(values, numbers) | (np.isnan(values) & bool(np.isnan(numbers).any()))
        if comparison.operator in _ORDERS:
            raise UserError(
                f"--select: expected == or in after {name}, which is text, got {comparison.operator}: list the "
                f"values, as in {name} in A,B"
            )
        folded = [None if value.casefold() == _UNKNOWN else value.casefold() for value in compared]
        different, index = self._different(name)
        self._check_values(name, compared, different)
        matches = np.array([value in folded for value in different], bool)
        return matches[index]

    def values(self, name: str) -> np.ndarray:
        """(N,) float64 with NaN, or objects: lowercase text and None.

        Raises:
            UserError: there is no such column, or it is unknown for every image.
        """
        if name not in self._values:
            self._values[name] = self._read(name)
        return self._values[name]

    def count(self, name: str, rows: np.ndarray) -> str:
        """Summary of a column's values in these rows, such as "view: LATERAL 3, unknown 1"; "" if there are many."""
        values = self.values(name)[rows]
        if name in _IDS or values.dtype.kind == "f":
            return ""
        counts = Counter(str(_UNKNOWN if value is None else value) for value in values)
        listed = ", ".join(f"{_shown(name, value)} {count:,}" for value, count in counts.most_common(_MOST_VALUES))
        return f"{name}: {listed}"

    def _read(self, name: str) -> np.ndarray:
        if name in NUMBERS:
            values = self._table[name].to_numpy().astype(np.float64)
            known = not np.isnan(values).all()
        elif name in TEXTS:
            values = _folded(self._table[name].to_pylist())
            known = any(value is not None for value in values)
        else:
            values = self._read_extra(name)
            known = True
        if not known:
            raise UserError(
                f"--select names {name}, which {self._source} does not know before the images are decoded: use a "
                f"source that reads it from a list or from DICOM headers, such as --source dicom, or leave {name} out"
            )
        return values

    def _read_extra(self, name: str) -> np.ndarray:
        if self._extra is None:
            texts = self._table[schema.EXTRA].to_pylist() if schema.EXTRA in self._table.column_names else []
            self._extra = [json.loads(text) if text else {} for text in texts]
        values = [row.get(name) for row in self._extra]
        if not any(value is not None for value in values):
            known = [column for column in (*TEXTS, *NUMBERS) if self._known(column)]
            known += sorted({key for row in self._extra for key, value in row.items() if _is_scalar(value)})
            raise UserError(
                f"--select names {name!r}, which {self._source} does not have: expected one of {', '.join(known)}"
            )
        if all(isinstance(value, (int, float)) or value is None for value in values):
            return np.array([math.nan if value is None else value for value in values], np.float64)
        return _folded([str(value) if _is_scalar(value) else None for value in values])

    def _known(self, name: str) -> bool:
        column = self._table[name]
        return column.null_count < len(column)

    def _different(self, name: str) -> tuple[list[str | None], np.ndarray]:
        """The different values of a column, and (N,) which of them each row has."""
        index: dict[str | None, int] = {}
        rows = [index.setdefault(value, len(index)) for value in self.values(name)]
        return list(index), np.array(rows, np.int64)

    def _number(self, name: str, value: str) -> float:
        try:
            return math.nan if value.casefold() == _UNKNOWN else float(value)
        except ValueError:
            raise UserError(
                f"--select: expected a number after {name}, got {value!r}: write, for example, 65 or unknown"
            ) from None

    def _check_values(self, name: str, values: Sequence[str], different: Sequence[str | None]) -> None:
        """Raise UserError for a value that neither an image nor the standard has: it is most likely misspelled."""
        allowed = {*different, _UNKNOWN, *(code.casefold() for code in _CODES.get(name, ()))}
        for value in values:
            if value.casefold() not in allowed:
                listed = sorted(_shown(name, text) for text in different if text is not None)
                there = "" if name in _IDS else f"; the images have {', '.join(listed[:_MOST_VALUES])}"
                raise UserError(f"--select: no image has {name} {value!r}{there}: use a value that occurs")


def _shown(name: str, folded: str) -> str:
    return folded.upper() if name in _CODES and name != schema.SPLIT and folded != _UNKNOWN else folded


def _folded(values: Sequence[str | None]) -> np.ndarray:
    folded = np.empty(len(values), object)
    folded[:] = [None if value is None else value.casefold() for value in values]
    return folded


def _is_scalar(value: object) -> bool:
    return isinstance(value, (str, int, float, bool))


class _Parser:
    """Recursive descent over the tokens of an expression."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._tokens: list[tuple[str, str]] = []  # (kind, text): "sign", "quoted" or "word"
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise UserError(
                    f"--select {text!r}: cannot read {text[position:].strip()!r}: put texts with special characters "
                    "in quotes"
                )
            sign, double, single, word = match.groups()
            quoted = double if double is not None else single
            self._tokens.append(
                ("sign", sign) if sign else ("quoted", quoted) if quoted is not None else ("word", word)
            )
            position = match.end()

    def whole(self) -> Expression:
        expression = self._any_of()
        if self._at < len(self._tokens):
            self._fail("and, or, or the end")
        return expression

    def _any_of(self) -> Expression:
        operands = [self._all_of()]
        while self._take("or"):
            operands.append(self._all_of())
        return operands[0] if len(operands) == 1 else AnyOf(tuple(operands))

    def _all_of(self) -> Expression:
        operands = [self._term()]
        while self._take("and"):
            operands.append(self._term())
        return operands[0] if len(operands) == 1 else AllOf(tuple(operands))

    def _term(self) -> Expression:
        if self._take("not"):
            return Not(self._term())
        if self._take("("):
            expression = self._any_of()
            if not self._take(")"):
                self._fail(")")
            return expression
        kind, column = self._next("a column")
        if kind != "word" or column.lower() in ("and", "or", "in"):
            self._at -= 1
            self._fail("a column")
        return self._comparison(column.lower())

    def _comparison(self, column: str) -> Expression:
        if self._take("not"):
            if not self._take("in"):
                self._fail("in")
            return Not(Comparison(column, "in", self._values()))
        if self._take("in"):
            return Comparison(column, "in", self._values())
        operator = next((sign for sign in ("==", "=", "!=", *_ORDERS) if self._take(sign)), None)
        if operator is None:
            self._fail(f"a comparison after {column}, such as == or in")
        if operator in _ORDERS:
            return Comparison(column, operator, (self._value(),))
        equal = Comparison(column, "in", (self._value(),))
        return Not(equal) if operator == "!=" else equal

    def _values(self) -> tuple[str, ...]:
        in_parentheses = self._take("(")
        values = [self._value()]
        while self._take(","):
            values.append(self._value())
        if in_parentheses and not self._take(")"):
            self._fail(")")
        return tuple(values)

    def _value(self) -> str:
        kind, text = self._next("a value")
        if kind == "sign":
            self._at -= 1
            self._fail("a value")
        return text

    def _next(self, expected: str) -> tuple[str, str]:
        if self._at == len(self._tokens):
            self._fail(expected)
        self._at += 1
        return self._tokens[self._at - 1]

    def _take(self, token: str) -> bool:
        """Whether the next token is this sign or keyword, which is then consumed."""
        there = self._at < len(self._tokens) and self._tokens[self._at][0] != "quoted"
        if there and self._tokens[self._at][1].lower() == token:
            self._at += 1
            return True
        return False

    def _fail(self, expected: str) -> NoReturn:
        got = repr(self._tokens[self._at][1]) if self._at < len(self._tokens) else "the end"
        raise UserError(
            f"--select {self._text!r}: expected {expected}, got {got}: write it as in "
            f"'view in PA,AP and age_years >= 18'"
        )
