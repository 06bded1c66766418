"""The embedded task: fixed, balanced, without leaks, not solved by single words."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from dist_reg.data.demo_task import DINING, GADGETS, LABEL_NAMES, demo_rows

ROWS = demo_rows()
SHA256 = "ac3a4afc401d41688ef56dcfad1f1a393091004ff0c9579444d84c410e175e83"


def test_the_rows_never_change():
    assert hashlib.sha256(json.dumps(ROWS).encode()).hexdigest() == SHA256


def test_sizes_balance_and_no_sentence_twice():
    assert {split: len(rows) for split, rows in ROWS.items()} == {"train": 600, "dev": 300, "ood": 300}
    for rows in ROWS.values():
        counts = Counter(label for _, label in rows)
        assert set(counts) == set(LABEL_NAMES)
        assert len(set(counts.values())) == 1
    texts = [text.lower() for rows in ROWS.values() for text, _ in rows]
    assert len(set(texts)) == len(texts)


def test_sentences_are_whole_and_short():
    for rows in ROWS.values():
        for text, _ in rows:
            assert text[0].isupper()
            assert text.endswith(".")
            assert "{" not in text
            assert len(text.split()) <= 20


def test_verdicts_follow_the_templates():
    labels = {text: label for rows in ROWS.values() for text, label in rows}
    for domain, verb in ((DINING, "was"), (GADGETS, "is")):
        for group in domain.groups:
            for thing in group.things:
                for word, sign in [(w, 1) for w in group.good] + [(w, 0) for w in group.bad]:
                    plain, negated = f"The {thing} {verb} {word}.", f"The {thing} {verb} not {word}."
                    assert labels.get(plain, LABEL_NAMES[sign]) == LABEL_NAMES[sign]
                    assert labels.get(negated, LABEL_NAMES[1 - sign]) == LABEL_NAMES[1 - sign]


def test_opinion_words_alone_do_not_give_the_label():
    good = {word for group in (*DINING.groups, *GADGETS.groups) for word in group.good}
    for split, rows in ROWS.items():
        right = 0
        for text, label in rows:
            words = text.lower().rstrip(".").replace(",", "").replace(";", "").split()
            right += ("positive" if good & set(words) else "negative") == label
        assert right / len(rows) < 0.7, split


def test_domains_share_no_opinion_word_but_the_plainest():
    words = [{w for group in domain.groups for w in group.good + group.bad} for domain in (DINING, GADGETS)]
    assert words[0] & words[1] <= {"excellent", "careless"}
