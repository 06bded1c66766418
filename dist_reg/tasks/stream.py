"""A training set that is read, tokenized and shuffled as the run goes: the same rows in the same order at every topology."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dist_reg.data.stream import Source
from dist_reg.data.table import Table
from dist_reg.errors import UserError
from dist_reg.tasks.base import EXAMPLE_ID

CHUNK = 256
"""Rows that are tokenized at once."""
PACKED_AT_ONCE = 1000
"""Examples among which those of a packed row are chosen."""
PASS = 40
"""In pass p an example has the id id + (p << 40), so its noise is another one."""


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
        *,
        seed: int,
        buffer: int,
        pack: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
    ) -> None:
        super().__init__()
        self.source, self.encode, self.keep, self.pack = source, encode, keep, pack
        self.seed, self.buffer = seed, buffer
        self.counts = {"rows": 0, "rows_left_out": 0, "passes": 0}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.counts.update(dict.fromkeys(self.counts, 0))
        for number in itertools.count():
            yield from self._shuffled(number)
            if self.counts["rows"] == self.counts["rows_left_out"]:
                raise UserError(f"{self.source.name} holds no row that can be learnt from")
            self.counts["passes"] = number + 1

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
                self.counts["rows"] += number == 0
                if self.keep(row):
                    yield row
                else:
                    self.counts["rows_left_out"] += number == 0
