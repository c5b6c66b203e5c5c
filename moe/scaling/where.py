"""Conditions on a table's rows, such as "router == 'Switch' and k in (1, 2)": parsed, never run."""

from collections.abc import Mapping, Sequence
import operator
import re
from typing import Any

import numpy as np

from moe.errors import UserError, nearest

TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))"
    r"|(?P<text>'[^']*'|\"[^\"]*\")|(?P<sign>==|!=|<=|>=|<|>|=|\(|\)|,)|(?P<name>[A-Za-z_][\w./]*))"
)
COMPARE = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
CONSTANTS = {"True": True, "False": False, "true": True, "false": False}
DEEPEST = 100
Columns = Mapping[str, Sequence[Any]]


def rows_where(condition: str, columns: Columns) -> np.ndarray:
    """A mask of the rows for which the condition holds.

    A comparison has a column on its left and a number, a text in quotes, True or False on its
    right; `in` and `not in` take several in parentheses. They are joined by and, or, not and
    parentheses. A cell that is no number fulfils no comparison with one but !=.

    Raises:
        UserError: the condition can't be read, with the place.
    """
    return _Parser(condition, columns).parse()


class _Parser:
    """Recursive descent; the loosest binding first."""

    def __init__(self, text: str, columns: Columns):
        self.text, self.columns = text, columns
        self.tokens = self._tokens()
        self.place, self.depth = 0, 0

    def parse(self) -> np.ndarray:
        mask = self.either()
        if self.peek() is not None:
            raise self.mistake("expected and, or, or the end")
        return mask

    def either(self) -> np.ndarray:
        mask = self.both()
        while self.take("or"):
            mask = mask | self.both()
        return mask

    def both(self) -> np.ndarray:
        mask = self.negated()
        while self.take("and"):
            mask = mask & self.negated()
        return mask

    def negated(self) -> np.ndarray:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.mistake(f"more than {DEEPEST} parentheses and nots within each other")
        if self.take("not"):
            mask = ~self.negated()
        elif self.take("("):
            mask = self.either()
            self.need(")")
        else:
            mask = self.comparison()
        self.depth -= 1
        return mask

    def comparison(self) -> np.ndarray:
        token = self.peek()
        if token is None or token[0] != "name":
            raise self.mistake("expected a column")
        name = token[1]
        if name not in self.columns:
            hint = nearest(name, self.columns) or f"; there are {', '.join(self.columns)}"
            raise UserError(f"--where: no column {name!r}{hint}")
        self.place += 1
        cells = self.columns[name]
        negate = self.take("not")
        if self.take("in"):
            found = np.any([_compare(cells, "==", v) for v in self.several()], axis=0)
            return ~found if negate else found
        sign = self.peek()
        if negate or sign is None or sign[1] not in COMPARE:
            hint = "; write ==" if sign and sign[1] == "=" else ""
            raise self.mistake(f"expected {', '.join(COMPARE)} or in{hint}")
        self.place += 1
        return _compare(cells, sign[1], self.literal())

    def several(self) -> list:
        self.need("(")
        values = [self.literal()]
        while self.take(","):
            if self.peek() == ("sign", ")"):
                break
            values.append(self.literal())
        self.need(")")
        return values

    def literal(self) -> Any:
        token = self.peek()
        word = token is not None and token[0] == "name"
        if token is None or token[0] == "sign" or (word and token[1] not in CONSTANTS):
            hint = f"; write '{token[1]}'" if token and word else ""
            raise self.mistake(f"expected a number, a text in quotes, True or False{hint}")
        self.place += 1
        kind, value = token
        if kind == "number":
            return float(value)
        return value[1:-1] if kind == "text" else CONSTANTS[value]

    def peek(self) -> tuple[str, str] | None:
        return self.tokens[self.place][:2] if self.place < len(self.tokens) else None

    def take(self, word: str) -> bool:
        token = self.peek()
        found = token is not None and token[0] != "text" and token[1] == word
        self.place += found
        return found

    def need(self, word: str) -> None:
        if not self.take(word):
            raise self.mistake(f"expected {word!r}")

    def mistake(self, why: str) -> UserError:
        """The error for what stands at this place."""
        at = self.tokens[self.place][2] if self.place < len(self.tokens) else len(self.text)
        rest = f"at {self.text[at : at + 20]!r}" if at < len(self.text) else "at its end"
        text = self.text if len(self.text) <= 200 else f"{self.text[:200]}..."
        return UserError(f"--where={text!r}: {why}, {rest}")

    def _tokens(self) -> list[tuple[str, str, int]]:
        found, at = [], 0
        end = len(self.text.rstrip())
        while at < end:
            match = TOKEN.match(self.text, at)
            if match is None or match.lastgroup is None:
                raise UserError(
                    f"--where={self.text!r}: can't be read at {self.text[at : at + 20]!r}"
                )
            found.append((match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            at = match.end()
        return found


def _compare(cells: Sequence[Any], sign: str, value: Any) -> np.ndarray:
    """A mask of the cells, which may be text for numbers, as in a CSV."""
    compare = COMPARE[sign]
    if isinstance(value, str):
        return np.array([compare(str(cell), value) for cell in cells], bool)
    return np.array([_holds(compare, cell, value) for cell in cells], bool)


def _holds(compare: Any, cell: Any, value: float) -> bool:
    if isinstance(cell, str) and cell.casefold() in ("true", "false"):
        cell = cell.casefold() == "true"
    try:
        return bool(compare(float(cell), value))
    except (TypeError, ValueError):
        return compare is operator.ne
