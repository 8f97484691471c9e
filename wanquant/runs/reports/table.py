"""A table of text cells, which the terminal, Markdown, LaTeX and (by ``_tables.html.j2``) the reports show."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """``floors`` are the rows of the noise floor, below the others."""

    heads: list[str]
    rows: list[list[str]]
    floors: Sequence[list[str]] = ()

    def lines(self, right: Collection[int] = ()) -> list[str]:
        """For the terminal: columns as wide as their longest cell, those of numbers ``right`` aligned."""
        table = [line for line in (self.heads, *self.rows, *self.floors) if line]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return [
            "  ".join(
                cell.rjust(width) if place in right else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]


def markdown(heads: list[str], rows: list[list[str]], floors: Sequence[list[str]] = (), named: int = 1) -> str:
    """The names of the floors, which stand in the column ``named``, in italics."""

    def escaped(row: list[str]) -> list[str]:
        return [markdown_text(cell).replace("|", r"\|") for cell in row]

    below = [[f"*{cell}*" if place == named else cell for place, cell in enumerate(escaped(row))] for row in floors]
    lines = [escaped(heads), ["---"] * len(heads), *map(escaped, rows), *below]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """In one line, and none of it markup: emphasis, code, formulas, links, HTML. Underscores within words are none."""
    return re.sub(r"([\\`*<$]|\[(?=[^]]*\]\())", r"\\\1", _one_line(text))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """With the keys of all rows for columns. A text that a spreadsheet would take for a formula begins with a quote."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: no_formula(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def no_formula(value: Any) -> Any:
    """A mean with its interval is none, though it begins with a minus."""
    formula = isinstance(value, str) and re.match(r"[=+@\t\r]|-(?!\d+(\.\d+)? \[)", value)
    return f"'{value}" if formula else value


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "→": r"$\to$"}


def latex(heads: list[str], rows: list[list[str]], floors: Sequence[list[str]] = ()) -> str:
    """For the booktabs package; the floors behind a rule of their own."""

    def escaped(cell: str) -> str:
        return "".join(LATEX.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in _one_line(cell))

    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (heads, *rows, *floors)]
    if floors:
        lines.insert(1 + len(rows), r"\midrule")
    begin = rf"\begin{{tabular}}{{{'l' * len(heads)}}}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])
