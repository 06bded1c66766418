"""A summary as Markdown and as LaTeX."""

from __future__ import annotations

import re

from dist_reg.report.rows import Cell, cells, header, title
from dist_reg.report.summary import Summary

LEFT = ("methods", "set")

TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # behind \\ an open bracket would begin an argument
    "]": "{]}",
    '"': r"\textquotedbl{}",
    **{character: "\\" + character for character in "&%$#_"},
}


def markdown(summary: Summary) -> str:
    """A table a block, the notes behind them."""
    columns = header(summary)
    parts = []
    for table in summary.tables:
        rules = ["---" if column in LEFT else "---:" for column in columns]
        lines = [[markdown_cell(cell) for cell in line] for line in cells(summary, table)]
        drawn = ["| " + " | ".join(line) + " |" for line in (columns, rules, *lines)]
        parts += [f"**{escape_markdown(title(table.block))}**", "\n".join(drawn)]
    notes = "\n".join(f"- {escape_markdown(note)}" for note in (*summary.legend, *summary.notes))
    return "\n\n".join([*parts, notes]) + "\n"


def markdown_cell(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    return (f"**{text}**" if cell.bold else text) + (r"\*" if cell.mark else "")


def escape_markdown(text: str) -> str:
    """`text` on one line, in which nothing ends a cell or begins a format."""
    return re.sub(r"([\\|*`<_])", r"\\\1", one_line(text))


def latex(summary: Summary) -> str:
    r"""A `table` a block, with booktabs' rules and the notes below; to be taken in by \input."""
    columns = header(summary)
    layout = "".join("l" if column in LEFT else "r" for column in columns)
    heads = " & ".join(escape_latex(column) for column in columns)
    note = r" \\ ".join(escape_latex(note) for note in summary.legend)
    parts = [r"% needs \usepackage{booktabs} and \usepackage[T1]{fontenc}"]
    for table in summary.tables:
        lines = [" & ".join(latex_cell(cell) for cell in line) + r" \\" for line in cells(summary, table)]
        parts += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(title(table.block))}}}",
            rf"\begin{{tabular}}{{{layout}}}",
            r"\toprule",
            heads + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\smallskip",
            rf"\parbox{{\linewidth}}{{\footnotesize {note}}}",
            r"\end{table}",
            "",
        ]
    return "\n".join(parts)


def latex_cell(cell: Cell) -> str:
    text = escape_latex(cell.text)
    return (rf"\textbf{{{text}}}" if cell.bold else text) + (r"\textsuperscript{*}" if cell.mark else "")


def escape_latex(text: str) -> str:
    """`text` on one line, as LaTeX prints it in T1 encoding."""
    return "".join(TEX.get(character, character) for character in one_line(text))


def one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
