"""Which training rows a run file wants streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dist_reg.data.config import DataConfig
from dist_reg.data.stream import read_hub_stream, read_shards, shards
from dist_reg.errors import UserError

STREAMED = ("classification", "regression", "lm")
"""Tasks whose training rows may be streamed."""


def training_stream(config: DataConfig) -> tuple[Callable[[], Iterator[dict[str, Any]]], str]:
    """What reads the training rows that `config` names, and their name."""
    if config.hub is not None:
        split = config.train or "train"
        return read_hub_stream(config.hub, config.hub_config, split), f"{config.hub}, split {split}"
    if config.train is None:
        raise UserError("data.streaming needs data.train, the path of jsonl, csv, tsv or parquet files")
    files = shards(config.train, config.data_dir)
    name = str(files[0]) if len(files) == 1 else f"{files[0].parent}, {len(files)} files"
    return read_shards(files, config.quoting), name
