"""Summaries of finished runs: means over seeds, comparisons with a baseline, tables and pictures.

runs.py        what a results.json says
blocks.py      runs that can be compared, in groups that differ in their seeds alone
comparison.py  a group against the baseline, on paired runs
summary.py     all of it for a folder, and what a reader must be told
rows.py        the numbers as csv has them, and as people read them
text.py        Markdown and LaTeX
curves.py      what the logs say over steps
plots.py       the pictures
files.py       what is written, whole or not at all
"""

from __future__ import annotations

from dist_reg.report.files import write
from dist_reg.report.runs import read_runs
from dist_reg.report.summary import Summary, summarise

__all__ = ["Summary", "read_runs", "summarise", "write"]
