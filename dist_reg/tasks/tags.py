"""Tags of tokens as files spell them: their set, their ids, and whether entities begin where they should."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dist_reg.data.table import Table, check_text
from dist_reg.errors import UserError, nearest

OUTSIDE = "O"
_ENTITY = re.compile(r"[BI]-(.+)")


def find_tag_names(table: Table, *, entities: bool) -> tuple[str, ...]:
    """The tags of a training table (column `tags`) in the order of their ids, sorted by name.

    With `entities`, O first, then B- and I- of every type, whether or not both are there.

    Raises:
        UserError: one tag only.
    """
    found = {tag for tags in table.columns["tags"] for tag in tags}
    if entities:
        types = sorted({match[1] for tag in found if (match := _ENTITY.fullmatch(tag))})
        if not types:
            raise UserError(
                f"{table.source}: no token is part of an entity; training needs tags such as B-person"
            )
        return OUTSIDE, *(f"{part}-{kind}" for kind in types for part in "BI")
    if len(found) == 1:
        raise UserError(
            f"{table.source}: every token has the tag {found.pop()!r}; training needs two or more"
        )
    return tuple(sorted(found))


def check_sentences(table: Table, *, entities: bool) -> None:
    """A tag for every token, and with `entities` tags of the BIO (IOB2) scheme.

    Raises:
        UserError: naming file, line and token of the first one that is wrong.
    """
    tokens, tags = table.columns["tokens"], table.columns["tags"]
    for row, (words, own) in enumerate(zip(tokens, tags)):
        if not words:
            raise UserError(f"{table.where(row)}: the sentence holds no token")
        if len(words) != len(own):
            raise UserError(f"{table.where(row)}: {len(words)} tokens, but {len(own)} tags")
        for place, word in enumerate(words):
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{table.where(row)}: token {place + 1} is {word!r}, no text")
            check_text(word, f"{table.where(row)}, token {place + 1}")
            if not isinstance(own[place], str) or not own[place].strip():
                raise UserError(
                    f"{table.where(row)}, token {place + 1} ({word!r}): its tag is {own[place]!r}, no text"
                )
        if entities:
            _check_entities(table, row, words, own)


def _check_entities(table: Table, row: int, words: Sequence[str], tags: Sequence[str]) -> None:
    before = OUTSIDE
    for place, tag in enumerate(tags):
        # A line of a CoNLL file is a token, so the sentence's line leads to it.
        where = f"{table.where(row)}, token {place + 1} ({words[place]!r})"
        if tag.isdecimal():
            raise UserError(f"{where}: the tag is the number {tag}; task ner needs names such as B-person")
        if tag != OUTSIDE and not _ENTITY.fullmatch(tag):
            raise UserError(
                f"{where}: {tag!r} is no tag of the BIO scheme (O, B-TYPE, I-TYPE); for other tags use task pos"
            )
        if tag.startswith("I-") and before[2:] != tag[2:]:
            raise UserError(
                f"{where}: {tag} follows {before}, but an entity begins with B-{tag[2:]} in the BIO scheme"
            )
        before = tag


def tag_ids(
    table: Table,
    names: tuple[str, ...],
    *,
    set_name: str,
    label_map: Mapping[str, str] | None = None,
) -> list[list[int]]:
    """The ids of every row's tags.

    Args:
        set_name: `train`, `dev` or the evaluation set's name, for messages.
        label_map: from this table's tags, or types of entities, to those of `names`; the others stay as they are.

    Raises:
        UserError: a tag that is not among `names`, or a `label_map` that names unknown ones.
    """
    ids = {name: i for i, name in enumerate(names)}
    renamed = _renamed(table, ids, set_name, label_map or {})
    found = []
    for row, tags in enumerate(table.columns["tags"]):
        for tag in tags:
            if renamed.get(tag, tag) not in ids:
                raise UserError(
                    f"set {set_name!r} ({table.where(row)}) has the tag {tag!r}, which training does not know (known: "
                    f"{', '.join(names)}); correct it, or map it with an evaluation set's label_map"
                )
        found.append([ids[renamed.get(tag, tag)] for tag in tags])
    if label_map and any(_ENTITY.fullmatch(name) for name in names):
        for row, tags in enumerate(table.columns["tags"]):
            _check_entities(table, row, table.columns["tokens"][row], [renamed.get(tag, tag) for tag in tags])
    return found


def _renamed(
    table: Table, ids: Mapping[str, int], set_name: str, label_map: Mapping[str, str]
) -> dict[str, str]:
    """Tags of `table` by what `label_map` makes of them."""
    tags = {tag for own in table.columns["tags"] for tag in own}
    types = {tag[2:] for tag in tags if _ENTITY.fullmatch(tag)}
    for old, new in label_map.items():
        where = f"data.eval.{set_name}.label_map"
        if old not in tags | types:
            known = sorted(tags | types)
            raise UserError(f"{where} names {old!r}, no tag of that set; {nearest(old, known)}")
        there = set(ids) if old in tags else {name[2:] for name in ids if _ENTITY.fullmatch(name)} | {OUTSIDE}
        if new not in there:
            kind = "tag" if old in tags else "type"
            raise UserError(
                f"{where} maps {old!r} to {new!r}, no {kind} of training; {nearest(new, sorted(there))}"
            )

    def rename(tag: str) -> str:
        if tag in label_map:
            return label_map[tag]
        match = _ENTITY.fullmatch(tag)
        new = label_map.get(match[1]) if match else None
        return tag if new is None else OUTSIDE if new == OUTSIDE else f"{tag[:2]}{new}"

    return {tag: rename(tag) for tag in tags}
