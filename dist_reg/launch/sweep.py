"""A sweep: every combination of some values of a run file, one run and one folder each."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_reg.config import RunConfig, load_run, read_yaml
from dist_reg.errors import UserError


@dataclass(frozen=True)
class Member:
    """One run of a sweep; `name` is its folder's."""

    name: str
    run: RunConfig


def read_members(run_file: Path, overrides: Sequence[str], sweep_file: Path) -> list[Member]:
    """Every run of the sweep in `sweep_file`, whose keys are those of an override and whose values are lists.

    Each is `run_file` with `overrides` and one combination, in the folder `train.output_dir/NAME`. A name depends on its own
    values alone, so that a sweep can grow. Raises UserError naming file and key.
    """
    sweep = read_yaml(sweep_file)
    if not isinstance(sweep, dict) or not sweep:
        raise UserError(
            f"{sweep_file}: a sweep holds keys with lists of values, such as train.seed: [0, 1, 2]."
        )
    for key, values in sweep.items():
        if not isinstance(key, str) or not isinstance(values, list) or not values:
            raise UserError(f"{sweep_file}: {key} must be a list of values, such as train.seed: [0, 1, 2].")
        if key == "train.output_dir":
            raise UserError(
                f"{sweep_file}: train.output_dir cannot vary; every run has a folder of its own below it."
            )
    root = load_run(run_file, overrides).output_dir
    members: dict[str, Member] = {}
    for values in itertools.product(*sweep.values()):
        combination = dict(zip(sweep, values))
        name = member_name(combination)
        if name in members:
            raise UserError(f"{sweep_file}: {name} is there twice; list every value once.")
        chosen = [f"{key}={json.dumps(value)}" for key, value in combination.items()]
        try:
            run = load_run(
                run_file, [*overrides, *chosen, f"train.output_dir={json.dumps(str(root / name))}"]
            )
        except UserError as error:
            raise UserError(f"{sweep_file}: {name}: {error}") from None
        members[name] = Member(name, run)
    return list(members.values())


def member_name(combination: dict[str, Any]) -> str:
    """A folder name for one combination of values, such as `sst2_hype_seed-1`.

    What a name cannot hold is replaced, and a hash of the values keeps it apart from the others.
    """
    parts = [_part(key, value) for key, value in combination.items()]
    text = "_".join(parts)
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")
    if not name or name != text or len(name) > 100:
        digest = hashlib.sha256(json.dumps(combination, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{name[:90]}-{digest}".lstrip("-")
    return name


def _part(key: str, value: Any) -> str:
    if key == "methods" and isinstance(value, list):
        return "+".join(_method(entry) for entry in value) or "plain"
    last = key.rpartition(".")[2]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if last in ("task", "model") else f"{last}-{text}"


def _method(entry: Any) -> str:
    """One entry of `methods` with its options, as `hype-sigma-0.0001`."""
    if not isinstance(entry, dict):
        return str(entry)
    words = []
    for name, options in entry.items():
        words.append(str(name))
        if isinstance(options, dict):
            words += [f"{option}-{value}" for option, value in options.items()]
    return "-".join(words)
