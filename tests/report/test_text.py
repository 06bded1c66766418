"""Markdown and LaTeX of summaries, with labels made to break them."""

from __future__ import annotations

import re

import pytest

from dist_reg.report import read_runs, summarise
from dist_reg.report.text import escape_latex, escape_markdown, latex, markdown
from tests.report.made import HYPE, result, scored, store

HOSTILE = r"a_b 50% & c\d {e} #1 $x$ ~ ^2 <b> | [z]"


def summary_of(folder, results, **options):
    return summarise(read_runs(store(folder, results)), **options)


@pytest.fixture
def summary(tmp_path):
    better = [0.8, 0.75, 0.875, 0.8125, 0.9]
    plain = [score - step for score, step in zip(better, (0.02, 0.03, 0.02, 0.04, 0.03))]
    return summary_of(tmp_path, [*scored(plain), *scored(better, methods=[{"hype": HYPE}])])


def test_markdown_tables(summary):
    lines = markdown(summary).splitlines()
    assert lines[0] == "**sst2, bert-base, 500 examples: accuracy, %**"
    assert lines[2] == "| methods | seeds | set | mean (std) | best | difference [95 %] | p | train s |"
    assert lines[3] == "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[4] == "| plain | 5 | dev | 80.0 (6.2) | 87.0 |  |  | 10 |"
    # differences 2, 3, 2, 4, 3: mean 2.8, standard deviation sqrt(0.7), half an interval 2.7764 sqrt(0.7 / 5)
    assert lines[5] == r"| hype | 5 | dev | **82.8 (6.0)** | 90.0 | +2.8 [+1.8, +3.8] | 0.002\* | 10 |"
    legend = next(line for line in lines if line.startswith("- difference"))
    assert legend.endswith(r"p: two-sided paired t-test, not corrected; \* p \< 0.05.")


def test_latex_tables(summary):
    text = latex(summary)
    assert r"\caption{sst2, bert-base, 500 examples: accuracy, \%}" in text
    assert r"\begin{tabular}{lrlrrrrr}" in text
    assert r"plain & 5 & dev & 80.0 (6.2) & 87.0 &  &  & 10 \\" in text
    bold = r"hype & 5 & dev & \textbf{82.8 (6.0)} & 90.0 & +2.8 {[}+1.8, +3.8{]} & 0.002\textsuperscript{*} & 10 \\"
    assert bold in text
    assert "difference: from plain, mean over pairs" in text
    assert r"two-sided paired t-test, not corrected; * p \textless{} 0.05." in text
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count("\\" + rule) == 1
    assert text.count(r"\begin") == text.count(r"\end") == 2


def test_hostile_labels_stay_in_their_cells(tmp_path):
    results = scored([0.8], methods=[{HOSTILE: {}}], task="t_1 & 2%", metrics={"x_y|z": {"accuracy": 0.8}})
    summary = summary_of(tmp_path, results)
    text = latex(summary)
    cell = r"a\_b 50\% \& c\textbackslash{}d \{e\} \#1 \$x\$ \textasciitilde{} \textasciicircum{}2 \textless{}b\textgreater{} \textbar{} {[}z{]}"
    assert cell in text
    assert r"x\_y\textbar{}z" in text
    assert r"\caption{t\_1 \& 2\%, bert-base" in text
    (line,) = (line for line in text.splitlines() if cell in line)
    assert len(re.split(r"(?<!\\)&", line)) == 6
    drawn = next(line for line in markdown(summary).splitlines() if "50%" in line)
    assert len(re.findall(r"(?<!\\)\|", drawn)) == 7
    assert r"c\\d" in drawn
    assert r"\<b>" in drawn


@pytest.mark.parametrize("escape", [escape_latex, escape_markdown])
def test_a_text_stays_on_one_line(escape):
    assert escape("two\nlines\tand\x1b a bell\x07") == "two lines and a bell"


def test_a_line_of_a_table_never_begins_with_an_argument(tmp_path):
    text = latex(summary_of(tmp_path, [result(0.5, methods=[{"[2ex]": {}}])]))
    assert "{[}2ex{]} & 1" in text
