"""Exact match and F1 by SQuAD's official definitions, on cases worked out by hand."""

from __future__ import annotations

import pytest

from dist_reg.tasks.squad_scores import exact_match, normalise, squad_scores, token_f1


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The  Cat!", "cat"),
        ("an apple, a day", "apple day"),
        ("U.S.", "us"),
        ("theatre", "theatre"),
        ("a", ""),
        ("\u201cyes\u201d", "\u201cyes\u201d"),  # only ASCII punctuation goes
        ("1,000", "1000"),
    ],
)
def test_normalise(answer, same):
    assert normalise(answer) == same


def test_f1_counts_repeated_words_as_often_as_both_have_them():
    # 2 of 3 words are shared: found "new new york", wanted "new york york" share new and york once each
    assert token_f1("new new york", "new york york", empty_agree=False) == pytest.approx(2 / 3)
    assert token_f1("york", "new york", empty_agree=False) == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert token_f1("rome", "paris", empty_agree=False) == 0.0


def test_empty_answers_share_nothing_in_v1_and_agree_in_v2():
    assert exact_match("the", "a") == 1.0
    assert token_f1("the", "a", empty_agree=False) == 0.0
    assert token_f1("the", "a", empty_agree=True) == 1.0
    assert token_f1("", "rome", empty_agree=True) == token_f1("", "rome", empty_agree=False) == 0.0


def test_the_best_of_several_answers_counts():
    scores = squad_scores(["in Rome", "x"], [["Rome", "in rome."], ["Paris", "the city of Paris"]])
    assert scores == {"f1": 0.5, "exact_match": 0.5}


def test_unanswerable_questions():
    found = ["", "Rome", "Rome", ""]
    wanted = [[], [], ["Rome"], ["Paris"]]
    assert squad_scores(found, wanted) == {
        "f1": 0.5,
        "exact_match": 0.5,
        "no_answer_f1": 0.5,
        "has_answer_f1": 0.5,
        "has_answer_exact_match": 0.5,
    }
    # an answer of articles alone is none in v2.0: the empty string is right
    assert squad_scores(["", ""], [["the"], []])["has_answer_f1"] == 1.0
    assert "has_answer_f1" not in squad_scores([""], [[]])
