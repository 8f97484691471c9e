"""A table of text cells, which the terminal, Markdown, LaTeX and (by ``_tables.html.j2``) the reports show."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple


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
        return [re.sub(r"([|*])", r"\\\1", cell) for cell in row]

    below = [[f"*{cell}*" if place == named else cell for place, cell in enumerate(escaped(row))] for row in floors]
    lines = [escaped(heads), ["---"] * len(heads), *map(escaped, rows), *below]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "→": r"$\to$"}


def latex(heads: list[str], rows: list[list[str]], floors: Sequence[list[str]] = ()) -> str:
    """For the booktabs package; the floors behind a rule of their own."""

    def escaped(cell: str) -> str:
        return "".join(LATEX.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in cell)

    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (heads, *rows, *floors)]
    if floors:
        lines.insert(1 + len(rows), r"\midrule")
    begin = rf"\begin{{tabular}}{{{'l' * len(heads)}}}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])
