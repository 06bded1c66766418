"""An embedded low-resource task: is the writer's verdict positive or negative?

The sentences are generated from the templates and word lists below, the same on every machine and Python
version. Training and development rows are about eating out; the out-of-domain rows are about gadgets, with
other words and partly other constructions. Every template is used with words of both polarities, and about a
third of the sentences reverse the polarity of their opinion word, so that a bag of words does not solve the
task: negation, contrast, comparison, disappointed or exceeded expectation and denial have to be read.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

LABEL_NAMES = ("negative", "positive")
SPLITS = {"train": 600, "dev": 300, "ood": 300}
TRAIN_SHARE = 0.6
"""Training rows use the first part of every list, so that the others also ask for words not trained on."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Things of one sort and the opinion words that suit all of them."""

    things: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What one domain is written with."""

    groups: tuple[Group, ...]
    openings: tuple[str, ...]
    keeps: tuple[str, ...]
    """Templates whose verdict has the polarity of `{a}`; `{b}` has the opposite one."""
    flips: tuple[str, ...]
    """Templates whose verdict is opposite to `{a}`."""
    affirms: tuple[str, ...]
    """Frames around a whole sentence that leave its verdict."""
    denies: tuple[str, ...]
    """Frames that reverse it."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


DINING = Domain(
    groups=(
        Group(
            things=_words("soup, bread, pasta, fish, curry, salad, dessert, steak, cake, risotto, stew, pie"),
            good=_words(
                "tasty, fresh, superb, satisfying, excellent, splendid, delicious, appetising, wonderful"
            ),
            bad=_words("bland, greasy, dreadful, tasteless, cold, horrible, soggy, awful, burnt, inedible"),
        ),
        Group(
            things=_words("waiter, chef, host, manager, staff, waitress, cashier, barman"),
            good=_words(
                "friendly, polite, patient, welcoming, thoughtful, quick, gracious, charming, cheerful"
            ),
            bad=_words("rude, careless, impatient, hostile, lazy, sloppy, sullen, arrogant, grumpy"),
        ),
        Group(
            things=_words("terrace, garden, bar, lobby, room, courtyard, hall"),
            good=_words("pleasant, comfortable, lovely, relaxing, beautiful, calm, cosy, inviting, elegant"),
            bad=_words("dirty, gloomy, cramped, unpleasant, ugly, shabby, dull, dreary, depressing"),
        ),
    ),
    openings=_words("today, again, frankly, overall"),
    keeps=_lines(
        """
        the {n} was {a}
        the {n} was {a}, not {b}
        the {n} was really {a}
        the {n} was {a} and the {m} {ma}
        the {n} was {b} once but is {a} now
        the {n} was even more {a} than I had {hoped}
        the {mb} {m} mattered less than the {a} {n}
        nobody could call the {n} {b}
        I {expected} the {n} would be {b}, and was wrong
        nothing {b} about the {n}
        friends call the {n} {b}, yet it was {a}
        the {n} ceased to be {b}
        """
    ),
    flips=_lines(
        """
        the {n} was not {a}
        the {n} was hardly {a}
        the {n} was anything but {a}
        the {n} was not as {a} as I had {hoped}
        the {n} used to be {a}
        the {n} looked {a} but was {b}
        the {n} would be {a} were it not so {b}
        the {n} was {a} at first and {b} in the end
        whoever calls the {n} {a} is wrong
        the {n} is {a} no more
        """
    ),
    affirms=_lines(
        """
        it is true that {clause}
        I still say {clause}
        as the reviews say, {clause}
        """
    ),
    denies=_lines(
        """
        it is not true that {clause}
        whoever says {clause} is wrong
        my sister claims {clause}; I disagree
        """
    ),
)

GADGETS = Domain(
    groups=(
        Group(
            things=_words("keyboard, charger, case, battery, camera, screen, headset, cable, laptop"),
            good=_words("sturdy, reliable, durable, solid, precise, impressive, excellent"),
            bad=_words("flimsy, wobbly, unreliable, faulty, fragile, defective, useless"),
        ),
        Group(
            things=_words("app, menu, update, website, software, manual"),
            good=_words("intuitive, efficient, helpful, clear, smooth, handy"),
            bad=_words("buggy, slow, confusing, clumsy, frustrating, broken"),
        ),
        Group(
            things=_words("help desk, seller, repair shop, courier, support team"),
            good=_words("honest, prompt, generous, capable, responsive, kind"),
            bad=_words("dishonest, evasive, sluggish, incompetent, careless, unhelpful"),
        ),
    ),
    openings=_words("so far, after a week, for the price, since March"),
    keeps=_lines(
        """
        the {n} is {a}
        the {n} feels very {a}
        {a} {n}, {ma} {m}
        the {n} is still {a} after months
        the {n} proved {a}, whatever the {mb} {m} suggests
        the {n} is more {a} than the advert makes it look
        I {expected} the {n} would be {b}, and I was mistaken
        the {n} has stopped being {b}
        nobody would call this {n} {b}
        """
    ),
    flips=_lines(
        """
        the {n} is not {a}
        the {n} is far from {a}
        the {n} is no longer {a}
        the {n} is less {a} than the advert makes it look
        critics call the {n} {a}, and they are wrong
        the {n} is {a} on paper and {b} in practice
        the {n} was {a} before the last overhaul
        """
    ),
    affirms=_lines(
        """
        there is no doubt that {clause}
        everybody agrees that {clause}
        """
    ),
    denies=_lines(
        """
        it is a myth that {clause}
        nobody believes that {clause}
        """
    ),
)


class _Draws:
    """A stream of choices from a hash, because `random.choice` may change between Python versions."""

    def __init__(self, name: str, share: float) -> None:
        self.name, self.share, self.count = name, share, 0

    def below(self, bound: int) -> int:
        self.count += 1
        digest = hashlib.blake2b(f"{self.name}:{self.count}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % bound

    def pick(self, options: tuple[str, ...]) -> str:
        return options[self.below(math.ceil(self.share * len(options)))]


def _sentence(domain: Domain, draws: _Draws, positive: bool) -> str:
    dressing = draws.below(20)  # 0-5 a frame, 6-9 an opening, else plain
    framed, denied = dressing < 6, dressing < 3
    keeps = draws.below(10) < 7
    templates = domain.keeps if keeps else domain.flips
    if framed:
        templates = tuple(template for template in templates if template.startswith("the {n}"))
    good = (positive != denied) == keeps  # the polarity of {a}
    clause = _clause(domain, draws, draws.pick(templates), good)
    if framed:
        clause = draws.pick(domain.denies if denied else domain.affirms).format(clause=clause)
    elif dressing < 10:
        clause = f"{draws.pick(domain.openings)}, {clause}"
    return clause[0].upper() + clause[1:] + "."


def _clause(domain: Domain, draws: _Draws, template: str, good: bool) -> str:
    first = draws.below(len(domain.groups))
    second = (first + 1 + draws.below(len(domain.groups) - 1)) % len(domain.groups)
    group, other = domain.groups[first], domain.groups[second]
    same, opposite = (group.good, group.bad) if good else (group.bad, group.good)
    return template.format(
        n=draws.pick(group.things),
        m=draws.pick(other.things),
        a=draws.pick(same),
        b=draws.pick(opposite),
        ma=draws.pick(other.good if good else other.bad),
        mb=draws.pick(other.bad if good else other.good),
        hoped="hoped" if good else "feared",
        expected="feared" if good else "was sure",
    )


def demo_rows() -> dict[str, list[tuple[str, str]]]:
    """All rows of the embedded task, by split: `train` (600), `dev` (300) and `ood` (300, out of domain).

    A row is (sentence, label name). Every split holds as many positive as negative rows, and no sentence
    occurs twice.
    """
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, str]]] = {}
    for split, size in SPLITS.items():
        draws = _Draws(split, TRAIN_SHARE if split == "train" else 1.0)
        domain = GADGETS if split == "ood" else DINING
        rows: list[tuple[str, str]] = []
        while len(rows) < size:
            label = len(rows) % 2
            text = _sentence(domain, draws, positive=label == 1)
            if text not in seen:
                seen.add(text)
                rows.append((text, LABEL_NAMES[label]))
        splits[split] = rows
    return splits
