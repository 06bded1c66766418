"""Exact match and F1 of answers as SQuAD's official scripts define them, v1.1 and v2.0."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Lower case without punctuation and articles, with single blanks."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(found: str, wanted: str) -> float:
    """1.0 where both are the same once normalised."""
    return float(normalise(found) == normalise(wanted))


def token_f1(found: str, wanted: str, *, empty_agree: bool) -> float:
    """F1 of the words both share, each as often as in either.

    Args:
        empty_agree: whether two answers without a word agree, as v2.0 has it; in v1.1 they share nothing.
    """
    own, gold = normalise(found).split(), normalise(wanted).split()
    if empty_agree and not (own and gold):
        return float(own == gold)
    shared = sum((Counter(own) & Counter(gold)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(own), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def squad_scores(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over questions of the best score against any of a question's answers; "" says that there is none.

    By v2.0's definitions, with the parts `has_answer_*` and `no_answer_f1`, where some question has no answer; else by v1.1's.
    """
    unanswerable = [not answers for answers in wanted]
    second = any(unanswerable)
    exact, f1 = [], []
    for answer, own in zip(found, wanted, strict=True):
        gold = list(own)
        if second:
            gold = [text for text in gold if normalise(text)] or [""]
        exact.append(max(exact_match(answer, text) for text in gold))
        f1.append(max(token_f1(answer, text, empty_agree=second) for text in gold))
    scores = {"f1": _mean(f1), "exact_match": _mean(exact)}
    if second:
        scores["no_answer_f1"] = _mean([score for score, none in zip(f1, unanswerable) if none])
        if not all(unanswerable):
            scores["has_answer_f1"] = _mean([score for score, none in zip(f1, unanswerable) if not none])
            scores["has_answer_exact_match"] = _mean(
                [score for score, none in zip(exact, unanswerable) if not none]
            )
    return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
