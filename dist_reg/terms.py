"""The methods' terms of a forward: weighed, checked, added to its loss, and averaged for the log."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from dist_reg.errors import UserError
from dist_reg.methods.base import Step


class NonFiniteTerm(UserError):
    """A method's term is NaN or infinite; `rows` are the examples of the micro-batch it came from."""

    def __init__(
        self, name: str, layer: int, rows: list[int], examples: str = "rows of the micro-batch"
    ) -> None:
        super().__init__(
            f"the term {name} is not a finite number at layer {layer} for the {examples} {rows}; the run stops before "
            "this step changes the weights. A smaller learning rate, sigma or weight is the first thing to try."
        )
        self.name, self.layer, self.rows = name, layer, rows


class Means:
    """Means of scalars by name since they were last taken, summed on their own device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def record(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


def weighed_terms(step: Step) -> dict[str, Tensor]:
    """The methods' terms by name. Raises NonFiniteTerm for the first part that is not a finite number."""
    terms: dict[str, Tensor] = {}
    for (name, _), per_example in step.terms.items():
        part = (per_example * step.weights).sum()
        terms[name] = terms[name] + part if name in terms else part
    if terms and not bool(torch.isfinite(torch.stack(list(terms.values()))).all()):
        for (name, layer), per_example in step.terms.items():
            rows = (~torch.isfinite(per_example * step.weights)).nonzero().flatten().tolist()
            if rows:
                raise NonFiniteTerm(name, layer, rows)
        raise NonFiniteTerm(", ".join(terms), 0, list(range(step.batch)))
    return terms


def add_terms(outputs: Any, step: Step, means: Means, alone: set[str] | None = None) -> Any:
    """`outputs` with the terms of `step` in their loss; terms, task loss and diagnostics go into `means`.

    `alone` names the terms that train; the rest of the loss then counts 0 times, so that every parameter still has a
    gradient: ZeRO-3 applies an old one again where there is none. Raises UserError where there are terms and no loss to add them to.
    """
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
    terms = weighed_terms(step)
    if loss is None or loss.dim() > 0:
        if terms:
            raise UserError(f"the model returned no loss to add {', '.join(terms)} to; pass it the labels.")
    else:
        task_loss = loss if step.task_loss is None else step.task_loss
        if step.task_weight is not None:
            task_loss = step.task_weight * task_loss
        means.record("task_loss", task_loss)
        for name, term in terms.items():
            means.record(name, term)
        if terms or step.task_weight is not None:
            loss = task_loss + torch.stack(list(terms.values())).sum() if terms else task_loss
            if alone is not None:
                loss = 0.0 * loss + torch.stack([terms[name] for name in terms if name in alone]).sum()
            if isinstance(outputs, dict):
                outputs["loss"] = loss
            else:
                outputs = (loss, *outputs[1:])
    for metric, value in diagnostics(step).items():
        means.record(metric, value)
    return outputs


def diagnostics(step: Step) -> dict[str, Tensor]:
    """Means over sites of what was measured in `step`, by metric."""
    by_metric: dict[str, list[Tensor]] = defaultdict(list)
    for (metric, _), value in step.values.items():
        by_metric[metric].append(value)
    return {metric: torch.stack(values).mean() for metric, values in by_metric.items()}
