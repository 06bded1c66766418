"""Summaries of runs, against results written by hand."""

from __future__ import annotations

import statistics

import pytest
from scipy import stats

from dist_reg.errors import UserError
from dist_reg.report import read_runs, summarise
from dist_reg.report.rows import cells, header, rows, title
from tests.report.made import HYPE, SETTINGS, result, scored, store

SCORES = {"plain": [0.80, 0.81, 0.85], "hype": [0.84, 0.86], "no dropout": [0.7]}
METHOD = {"methods": [{"hype": HYPE}]}


@pytest.fixture
def folder(tmp_path):
    runs = [result(s, seed=i, seconds=20 + i, **METHOD) for i, s in enumerate(SCORES["hype"])]
    runs += [result(s, seed=i, seconds=10 + i) for i, s in enumerate(SCORES["plain"])]
    runs += [result(s, model_config={"hidden_dropout_prob": 0.0}) for s in SCORES["no dropout"]]
    return store(tmp_path / "runs", runs)


def summary_of(folder, results, **options):
    return summarise(read_runs(store(folder, results)), **options)


def texts(summary, number=0):
    return [[cell.text for cell in line] for line in cells(summary, summary.tables[number])]


def columns(summary, *names, number=0):
    places = [header(summary).index(name) for name in names]
    return [[line[place] for place in places] for line in texts(summary, number)]


def test_means_and_deviations(folder):
    table = rows(summarise(read_runs(folder)))
    assert [row["methods"] for row in table] == ["plain", "plain, hidden_dropout_prob 0.0", "hype"]
    for row, name in zip(table, ("plain", "no dropout", "hype")):
        scores = SCORES[name]
        assert row["seeds"] == len(scores)
        assert row["dev_mean"] == pytest.approx(sum(scores) / len(scores))
        assert row["ood_mean"] == pytest.approx(sum(scores) / len(scores) - 0.1)
        assert row["dev_best"] == max(scores)
        if len(scores) > 1:
            assert row["dev_std"] == pytest.approx(statistics.stdev(scores))
        else:
            assert row["dev_std"] is None
        assert row["metric"] == "accuracy"
        assert (row["task"], row["model"], row["examples"]) == ("sst2", "bert-base", 500)
    # by hand: (0.80 + 0.81 + 0.85) / 3, and sqrt((0.02^2 + 0.01^2 + 0.03^2) / 2)
    assert table[0]["dev_mean"] == pytest.approx(0.82)
    assert table[0]["dev_std"] == pytest.approx(0.0264575, rel=1e-5)
    assert table[0]["train_seconds"] == pytest.approx(11.0)
    assert table[2]["train_seconds"] == pytest.approx(20.5)


def test_comparison_with_plain_on_paired_runs(folder):
    summary = summarise(read_runs(folder))
    plain, single, hype = rows(summary)
    assert not {"dev_p", "dev_difference"} & {key for key, value in plain.items() if value is not None}
    assert single["dev_difference"] == pytest.approx(-0.1)
    assert (single["dev_no_p_because"], single["dev_p"], single["dev_pairs"]) == ("one pair", None, 1)
    expected = stats.ttest_rel([0.84, 0.86], [0.80, 0.81])
    assert hype["dev_p"] == pytest.approx(expected.pvalue)
    assert hype["dev_difference"] == pytest.approx(0.045)
    assert (hype["dev_pairs"], hype["dev_unpaired"], hype["dev_comparisons"]) == (2, 0, 1)
    assert (hype["baseline"], hype["test"]) == ("plain", "t-test")
    assert hype["ood_p"] == pytest.approx(expected.pvalue)
    assert any("1 of plain: 0/2." in note for note in summary.notes)


def test_cells_for_people(folder):
    summary = summarise(read_runs(folder))
    assert title(summary.tables[0].block) == "sst2, bert-base, 500 examples: accuracy, %"
    assert header(summary) == [
        "methods",
        "seeds",
        "set",
        "mean (std)",
        "best",
        "difference [95 %]",
        "p",
        "train s",
    ]
    lines = texts(summary)
    assert lines[0] == ["plain", "3", "dev", "82.0 (2.6)", "85.0", "", "", "11"]
    assert lines[1] == ["", "", "ood", "72.0 (2.6)", "75.0", "", "", ""]
    assert lines[2][:7] == ["plain, hidden_dropout_prob 0.0", "1", "dev", "70.0", "70.0", "-10.0", "one pair"]
    # t of two differences 4 and 5: half an interval is 12.706 (97.5 %, 1 degree) x 0.7071 / sqrt(2)
    assert lines[4][:7] == ["hype", "2", "dev", "85.0 (1.4)", "86.0", "+4.5 [-1.9, +10.9]", "0.070"]
    bold = [cell.text for line in cells(summary, summary.tables[0]) for cell in line if cell.bold]
    assert bold == ["85.0 (1.4)", "75.0 (1.4)"]


def test_several_comparisons_are_corrected(tmp_path):
    plain = [0.80, 0.82, 0.78, 0.81, 0.79]
    steps = {
        1: [0.01, 0.02, 0.03, 0.04, 0.05],
        2: [0.02, -0.01, 0.0, 0.01, -0.01],
        3: [0.01, 0.03, 0.01, 0.03, 0.01],
    }
    results = scored(plain)
    for sigma, differences in steps.items():
        better = [a + b for a, b in zip(plain, differences)]
        results += scored(better, methods=[{"hype": {**HYPE, "sigma": sigma}}])
    summary = summary_of(tmp_path, results)
    p = [stats.ttest_1samp(differences, 0).pvalue for differences in steps.values()]
    table = rows(summary)[1:]
    assert [row["dev_p"] for row in table] == pytest.approx(p)
    assert p[0] < p[2] < p[1] or p[2] < p[0] < p[1]
    ordered = sorted(p)
    first, second = 3 * ordered[0], max(3 * ordered[0], 2 * ordered[1])
    expected = {ordered[0]: first, ordered[1]: second, ordered[2]: max(second, ordered[2])}
    assert [row["dev_p_holm"] for row in table] == pytest.approx([expected[value] for value in p])
    assert [row["dev_comparisons"] for row in table] == [3, 3, 3]
    assert "p Holm" in header(summary)
    marks = [line[header(summary).index("p Holm")].mark for line in cells(summary, summary.tables[0])]
    assert marks == [False, *(expected[value] < 0.05 for value in p)]
    assert "p Holm: corrected for the groups" in " ".join(summary.legend)


def test_the_star_stands_in_one_column_of_all_tables(tmp_path):
    plain, better = [0.5, 0.6, 0.7], [0.6, 0.71, 0.82]
    two = [{"methods": [{"hype": {**HYPE, "sigma": sigma}}]} for sigma in (1, 2)]
    runs = [*scored(plain), *scored(better, **two[0]), *scored(better, **two[1])]
    runs += [*scored(plain, task="cola"), *scored(better, task="cola", **METHOD)]
    summary = summary_of(tmp_path, runs)
    place = header(summary).index("p Holm")
    for table in summary.tables:
        marks = [[at for at, cell in enumerate(line) if cell.mark] for line in cells(summary, table)]
        assert marks == [[], *[[place]] * (len(marks) - 1)]


def test_a_metric_of_which_less_is_better_and_which_is_no_percentage(tmp_path):
    less = {"main_metric": "perplexity", "main_metric_scale": "number", "greater_is_better": False}
    summary = summary_of(tmp_path, [*scored([20.5, 22.25], **less), *scored([18.0, 19.0], **less, **METHOD)])
    assert title(summary.tables[0].block) == "sst2, bert-base, 500 examples: perplexity"
    plain, hype = rows(summary)
    assert (plain["dev_best"], hype["dev_best"]) == (20.5, 18.0)
    assert hype["dev_difference"] == -2.875
    lines = columns(summary, "mean (std)", "best")
    assert lines == [["21.38 (1.237)", "20.5"], ["18.5 (0.7071)", "18"]]
    assert [line[3].bold for line in cells(summary, summary.tables[0])] == [False, True]


def test_domains_are_further_lines(tmp_path):
    def domains(value):
        return {"metric": "f1", "in_domain": value, "out_of_domain": value - 0.25, "gap": 0.25}

    runs = [{**run, "domains": domains(run["metrics"]["dev"]["accuracy"])} for run in scored([0.5, 0.75])]
    summary = summary_of(tmp_path, [*runs, *scored([0.9], **METHOD)])
    plain, hype = rows(summary)
    assert plain["out_of_domain_mean"] == 0.375
    assert (plain["gap_mean"], plain["gap_best"]) == (0.25, None)
    assert "gap_mean" not in hype
    assert columns(summary, "set", "mean (std)", "best") == [
        ["dev", "62.5 (17.7)", "75.0"],
        ["in domain f1", "62.5 (17.7)", "75.0"],
        ["out of domain f1", "37.5 (17.7)", "50.0"],
        ["gap f1", "25.0 (0.0)", ""],
        ["dev", "90.0", "90.0"],
    ]
    assert summary.tables[0].block.axis_of("gap") == "gap f1: f1, %"
    assert "gap_mean" not in rows(summary_of(tmp_path / "other", scored([0.5])))[0]


def test_groups_with_different_evaluation_sets(tmp_path):
    summary = summary_of(
        tmp_path, [result(0.8), result(0.7, task="cola", metrics={"dev": {"accuracy": 0.7}})]
    )
    assert columns(summary, "set", "mean (std)") == [["dev", "70.0"]]
    assert columns(summary, "set", "mean (std)", number=1) == [["dev", "80.0"], ["ood", "70.0"]]


def test_without_the_baseline_the_report_says_so(tmp_path):
    summary = summary_of(tmp_path, scored([0.8, 0.9], **METHOD))
    assert header(summary) == ["methods", "seeds", "set", "mean (std)", "best", "train s"]
    assert (
        summary.notes[0]
        == "sst2, bert-base, 500 examples: no run of the baseline, plain; nothing is compared."
    )


def test_another_baseline(folder):
    summary = summarise(read_runs(folder), baseline="hype")
    table = rows(summary)
    assert table[0]["dev_difference"] == pytest.approx(-0.045)
    assert table[0]["baseline"] == "hype"
    assert table[2]["baseline"] is None
    assert "difference: from hype" in summary.legend[1]
    with pytest.raises(UserError, match="--baseline: no group is called 'hyppe'; did you mean 'hype'?"):
        summarise(read_runs(folder), baseline="hyppe")


def test_no_test_leaves_comparisons_out(folder):
    summary = summarise(read_runs(folder), test="none")
    assert "p" not in header(summary)
    assert not any("difference" in key or key == "baseline" for row in rows(summary) for key in row)
    assert not any("partner" in note for note in summary.notes)
    with pytest.raises(UserError, match="unknown test 'bootstap'; did you mean 'bootstrap'?"):
        summarise(read_runs(folder), test="bootstap")


def test_bootstrap_of_few_pairs_says_how_far_to_trust_it(folder):
    summary = summarise(read_runs(folder), test="bootstrap")
    hype = rows(summary)[2]
    assert (hype["test"], hype["dev_p"]) == ("bootstrap", 0.5)
    assert (hype["dev_difference_low"], hype["dev_difference_high"]) == pytest.approx((0.04, 0.05))
    assert "fewer than 20 pairs" in summary.legend[-1]


def test_mixed_settings_are_compared_with_their_own_baseline(tmp_path):
    other = {**SETTINGS, "batch_size": 32}
    runs = [
        *scored([0.5, 0.6]),
        *scored([0.7, 0.8], settings=other),
        *scored([0.75, 0.95], settings=other, **METHOD),
        *scored([0.1, 0.2], settings={**SETTINGS, "batch_size": 64}, **METHOD),
    ]
    summary = summary_of(tmp_path, runs, mix=True)
    found = {row["methods"]: (row["baseline"], row.get("dev_difference")) for row in rows(summary)}
    assert found["hype, batch_size 32"] == ("plain, batch_size 32", pytest.approx(0.1))
    assert found["hype, batch_size 64"] == (None, None)
    assert any("hype, batch_size 64 is compared with nothing" in note for note in summary.notes)
    named = rows(summarise(read_runs(tmp_path), mix=True, baseline="plain, batch_size 16"))
    assert [row["baseline"] for row in named] == [None, *["plain, batch_size 16"] * 3]


def test_unfinished_runs_are_counted(folder):
    assert (
        summarise(read_runs(folder), unfinished=3).notes[-1] == "run folders without results, passed over: 3."
    )
