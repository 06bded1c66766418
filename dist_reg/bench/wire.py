"""What a training step sends: calls and bytes of every collective, counted where torch.distributed is called.

    torchrun --nproc-per-node 2 -m dist_reg.bench.wire

trains MiniLM under ZeRO-3 and prints a step's traffic for plain fine-tuning, each method and its two-pass form.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = {
    "all_gather_into_tensor": 0,
    "all_gather": 0,
    "all_reduce": 0,
    "all_to_all_single": 0,
    "broadcast": 0,
    "reduce": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
}
"""The collectives that are counted, and the argument whose size is that of the whole: a gather's result, a scatter's input."""


RELEASE_AT_ONCE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""A small model would stay gathered through the whole step; one that needs ZeRO-3 does not."""


class Traffic:
    """Calls and bytes by collective since the last `clear`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._within = False

    def count(self) -> None:
        """Wrap torch.distributed's functions; call it before DeepSpeed is imported, which keeps some of them."""
        for name, position in COLLECTIVES.items():
            counted = self._counted(name, position, getattr(dist, name))
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, counted)

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def as_dict(self) -> dict[str, Any]:
        """{collective: [calls, bytes]}."""
        return {name: [self.calls[name], self.bytes[name]] for name in sorted(self.calls)}

    def _counted(self, name: str, position: int, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._within:  # one collective may be made of another
                return function(*args, **kwargs)
            given = [*args, *kwargs.values()][position]
            tensors = given if isinstance(given, list) else [given]
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self._within = True
            try:
                return function(*args, **kwargs)
            finally:
                self._within = False

        return counted


def step_traffic(
    model: torch.nn.Module, batch: dict[str, Any], traffic: Traffic, stage: int
) -> dict[str, Any]:
    """The traffic of one training step of `model` under ZeRO `stage`, after two that settle the order of gathers."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": len(batch["labels"]),
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **RELEASE_AT_ONCE},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found = {}
    for _ in range(3):
        traffic.clear()
        engine.backward(engine(**batch).loss)
        engine.step()
        found = traffic.as_dict()
    engine.destroy()
    return found


def main() -> None:
    """Print the table as JSON on the first process; `--tiny` takes a small random model, for the test."""
    traffic = Traffic()
    traffic.count()
    from dist_reg.runtime import leave, prepare_process

    prepare_process(deepspeed=True)
    from dist_reg import LNSR, R3F, HyPe, RDrop
    from dist_reg.attach import regularize
    from dist_reg.bench.peers import PEERS

    methods = [HyPe(), LNSR(), LNSR(layer=1), RDrop(), R3F()]
    variants: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {"plain": lambda model: model}
    for method in methods:
        name = method.name + (f" layer {method.layer}" if isinstance(method, LNSR) else "")
        variants[name] = lambda model, method=method: regularize(model, [method]).model
        if method.name in PEERS:
            variants[f"{name}, straightforward"] = functools.partial(_peer, method=method)
    rows = {}
    for name, build in variants.items():
        model, batch = _model_and_batch(tiny="--tiny" in sys.argv)
        rows[name] = step_traffic(build(model), batch, traffic, stage=3)
    if dist.get_rank() == 0:
        print(json.dumps({"processes": dist.get_world_size(), "stage": 3, "traffic": rows}, indent=1))
    leave()


def _peer(model: torch.nn.Module, method: Any) -> torch.nn.Module:
    from dist_reg.bench.peers import PEERS

    return PEERS[method.name](model, method)


def _model_and_batch(*, tiny: bool) -> tuple[Any, dict[str, Any]]:
    import transformers

    from dist_reg.config import ModelConfig
    from dist_reg.model import load_model

    torch.manual_seed(0)
    if tiny:
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 100}
        config = transformers.BertConfig(num_hidden_layers=3, **sizes)
        model: Any = transformers.BertForSequenceClassification(config)
    else:
        model, _ = load_model(
            ModelConfig(name="minilm"), "AutoModelForSequenceClassification", 0, num_labels=2
        )
    ids = torch.randint(5, 100, (4, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}
    return model.train(), batch


if __name__ == "__main__":
    main()
