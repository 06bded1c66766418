"""The low-resource protocol: the same rows on every machine, whatever the versions of the libraries."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Hashable, Sequence

from dist_reg.data.table import Table
from dist_reg.errors import UserError

_QUANTILE_BINS = 5
_HELD_OUT = -1
"""In place of a seed: no sample is drawn with it."""


def sample_rows(
    labels: Sequence[object], samples: int, *, seed: int, name: str = "the data set"
) -> list[int]:
    """Choose `samples` row indices, stratified by label, in ascending order.

    Every label gets one row; the others go one at a time to the label with the largest quotient
    size / (2 * chosen + 1) (Webster's method: proportional shares, with two labels the same as largest
    remainder; unlike that it never takes a row back when the sample grows). Within a label the rows are
    ranked by a hash of (seed, row). So a smaller sample with the same seed is a subset of a larger one.

    Raises:
        UserError: more samples than rows, or fewer than labels.
    """
    if samples > len(labels):
        raise UserError(f"{name} holds {len(labels)} rows, fewer than the {samples} samples asked for")
    strata: dict[object, list[int]] = {}
    for row, label in enumerate(labels):
        strata.setdefault(label, []).append(row)
    if samples < len(strata):
        raise UserError(
            f"a sample of {samples} rows of {name} cannot hold each of its {len(strata)} labels; "
            f"ask for {len(strata)} or more"
        )
    counts = _allocate([len(rows) for rows in strata.values()], samples)
    chosen: list[int] = []
    for rows, count in zip(strata.values(), counts):
        chosen += sorted(rows, key=lambda row: _rank(seed, row))[:count]
    return sorted(chosen)


def hold_out(table: Table, fraction: float, groups: Sequence[Hashable] | None = None) -> tuple[Table, Table]:
    """`table` without about `fraction` of its rows, and those: the same ones whatever the seed of the samples.

    Args:
        groups: of every row; the rows of a group stay together, as the questions on one passage must.

    Raises:
        UserError: either part would be empty.
    """
    of_row = list(range(len(table))) if groups is None else list(groups)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(of_row))}
    held: set[Hashable] = set()
    count, sizes = 0, dict.fromkeys(numbers, 0)
    for group in of_row:
        sizes[group] += 1
    for group in sorted(numbers, key=lambda group: _rank(_HELD_OUT, numbers[group])):
        if count >= fraction * len(table):
            break
        held.add(group)
        count += sizes[group]
    if not 0 < count < len(table):
        raise UserError(
            f"{table.source} has too few rows ({len(table)}) to hold out data.dev_fraction {fraction} of them"
        )
    parts = [
        [row for row, group in enumerate(of_row) if (group in held) == wanted] for wanted in (False, True)
    ]
    return table.take(parts[0]), table.take(parts[1])


def quantile_bins(values: Sequence[float], samples: int) -> list[int]:
    """The quantile bin (0 to 4) of each value, to stratify a sample of a regression set by.

    Equal values may fall into two bins (the earlier row into the lower one), so that bins are equally full.
    """
    bins = min(_QUANTILE_BINS, samples, len(values))
    result = [0] * len(values)
    for rank, row in enumerate(sorted(range(len(values)), key=lambda row: values[row])):
        result[row] = rank * bins // len(values)
    return result


def _rank(seed: int, row: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=16).digest()


def _allocate(sizes: Sequence[int], samples: int) -> list[int]:
    counts = [1] * len(sizes)
    queue = [(-size / 3, stratum) for stratum, size in enumerate(sizes) if size > 1]
    heapq.heapify(queue)
    for _ in range(samples - len(sizes)):
        _, stratum = heapq.heappop(queue)
        counts[stratum] += 1
        if counts[stratum] < sizes[stratum]:
            heapq.heappush(queue, (-sizes[stratum] / (2 * counts[stratum] + 1), stratum))
    return counts
