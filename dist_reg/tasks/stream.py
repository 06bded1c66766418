"""A training set that is read, tokenized and shuffled as the run goes: the same rows in the same order at every topology."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dist_reg.data.stream import Source
from dist_reg.data.table import Table
from dist_reg.errors import UserError
from dist_reg.tasks.base import EXAMPLE_ID

logger = logging.getLogger(__name__)

LOST = {
    "rows_left_out": "has nothing to learn from and is left out",
    "rows_cut": "is longer than data.max_length and loses a part of what is to be learnt",
    "turns_left_out": "has turns of the assistant that the chat template rewrites, which do not count",
}
CHUNK = 256
"""Rows that are tokenized at once."""
PACKED_AT_ONCE = 1000
"""Examples among which those of a packed row are chosen."""
PASS = 48
"""In pass p an example has the id id + (p << 48), so its noise is another one."""


class Stream(torch.utils.data.IterableDataset):
    """Tokenized rows of `source`, pass after pass without end, shuffled in a buffer: a function of the seed alone.

    Every process reads all rows and takes its share of every batch, so that a run is the same on any number of them. `counts`
    says how many rows the first pass has read so far, how many of them it left out, and how many passes are over.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
        keep: Callable[[dict[str, Any]], bool],
        tally: Callable[[dict[str, Any]], dict[str, int]],
        *,
        seed: int,
        buffer: int,
        pack: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
    ) -> None:
        super().__init__()
        self.source, self.encode, self.keep, self.tally, self.pack = source, encode, keep, tally, pack
        self.seed, self.buffer = seed, buffer
        self.counts = {"rows": 0, "rows_left_out": 0, "passes": 0}
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.counts.update(dict.fromkeys(self.counts, 0))
        self._told.clear()
        for number in itertools.count():
            yield from self._shuffled(number)
            if self.counts["rows"] == self.counts["rows_left_out"]:
                raise UserError(f"{self.source.name} holds no row that can be learnt from")
            self.counts["passes"] = number + 1
            if number == 0 and self._told:
                told = ", ".join(f"{name} {self.counts[name]}" for name in sorted(self._told))
                logger.warning("%s, read once: of %d rows %s.", self.source.name, self.counts["rows"], told)

    def _shuffled(self, number: int) -> Iterator[dict[str, Any]]:
        """Every row leaves the buffer when another one takes its place."""
        generator = np.random.default_rng((self.seed, number))
        held: list[dict[str, Any]] = []
        for row in self._rows(number):
            if len(held) < self.buffer:
                held.append(row)
                continue
            place = int(generator.integers(self.buffer))
            held[place], row = row, held[place]
            yield row
        for place in generator.permutation(len(held)):
            yield held[place]

    def _rows(self, number: int) -> Iterator[dict[str, Any]]:
        rows = self._tokenized(number)
        if self.pack is None:
            yield from rows
            return
        while some := list(itertools.islice(rows, PACKED_AT_ONCE)):
            yield from self.pack(some)

    def _tokenized(self, number: int) -> Iterator[dict[str, Any]]:
        numbered = enumerate(self.source.read())
        while chunk := list(itertools.islice(numbered, CHUNK)):
            ids = [place for place, _ in chunk]
            names = dict.fromkeys(name for _, row in chunk for name in row)
            table = Table(
                source=self.source.name,
                columns={name: [row.get(name) for _, row in chunk] for name in names},
                lines=[place + 1 for place in ids],
            )
            columns = {**self.source.prepare(table), EXAMPLE_ID: ids}
            encoded = {EXAMPLE_ID: ids, **self.encode(columns)}
            for values in zip(*encoded.values(), strict=True):
                row = dict(zip(encoded, values))
                row[EXAMPLE_ID] += number << PASS
                kept = self.keep(row)
                if number == 0:
                    self._count({"rows": 1, "rows_left_out": int(not kept), **self.tally(row)})
                if kept:
                    yield row

    def _count(self, found: dict[str, int]) -> None:
        """Add to the counts, with a warning at the first row of which something is lost."""
        for name, count in found.items():
            self.counts[name] = self.counts.get(name, 0) + count
            if count and name in LOST and name not in self._told:
                self._told.add(name)
                logger.warning(
                    "%s: row %d %s; results.json counts them.",
                    self.source.name,
                    self.counts["rows"],
                    LOST[name],
                )
