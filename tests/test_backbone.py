"""The parts of every supported family, as found by structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_reg.backbone import (
    find_backbone,
    first_output,
    hidden_argument,
    hidden_dropouts,
    replace_first_output,
    replace_hidden,
    select_layers,
)
from dist_reg.errors import UserError
from tests.models import FAMILIES, HIDDEN, VOCABULARY, batch, build

pytestmark = pytest.mark.compat

EVERY_HEAD = [(family, head) for family, entry in FAMILIES.items() for head in entry.heads]
ENCODER_OF_T5 = "transformer.encoder.block"

# Per family, relative to the base: embedding, between in layer 0, what reads the state between, final norm.
PARTS = {
    "bert": ("embeddings", "attention", "intermediate", None),
    "roberta": ("embeddings", "attention", "intermediate", None),
    "xlm-roberta": ("embeddings", "attention", "intermediate", None),
    "electra": ("embeddings", "attention", "intermediate", None),
    "deberta-v2": ("embeddings", "attention", "intermediate", None),
    "modernbert": ("embeddings", "attn", "mlp_norm", "final_norm"),
    "distilbert": ("embeddings", "sa_layer_norm", "ffn", None),
    "llama": ("embed_tokens", "self_attn", "post_attention_layernorm", "norm"),
    "qwen3": ("embed_tokens", "self_attn", "post_attention_layernorm", "norm"),
    "mistral": ("embed_tokens", "self_attn", "post_attention_layernorm", "norm"),
    "gpt2": ("drop", "attn", "ln_2", "ln_f"),
    "t5": ("embed_tokens", "layer.0", "layer.1.layer_norm", "final_layer_norm"),
}
LAYERS = {
    "modernbert": "layers",
    "distilbert": "transformer.layer",
    "llama": "layers",
    "qwen3": "layers",
    "mistral": "layers",
    "gpt2": "h",
    "t5": "block",
}
HEADS = {
    ("bert", "masked"): "cls",
    ("roberta", "masked"): "lm_head",
    ("xlm-roberta", "masked"): "lm_head",
    ("electra", "masked"): "generator_lm_head",
    ("deberta-v2", "masked"): "cls",
    ("modernbert", "masked"): "decoder",
    ("modernbert", "qa"): "classifier",
    ("distilbert", "masked"): "vocab_projector",
    ("gpt2", "classification"): "score",
    ("t5", "classification"): "classification_head",
}
# In three layers without a head; then what "classification" and "tokens" add.
DROPOUTS = {
    "bert": (7, 1, 1),
    "roberta": (7, 1, 1),
    "xlm-roberta": (7, 1, 1),
    "electra": (7, 1, 1),
    "deberta-v2": (10, 2, 1),
    "modernbert": (7, 1, 1),
    "distilbert": (4, 1, 1),
    "llama": (0, 0, 1),
    "qwen3": (0, 0, 1),
    "mistral": (0, 0, 1),
    "gpt2": (7, 0, 1),
    "t5": (10, None, 1),
}


def path_for(family: str, head: str) -> str | None:
    return ENCODER_OF_T5 if (family, head) == ("t5", "classification") else None


def head_name(family: str, head: str) -> str | None:
    decoder = family in ("llama", "qwen3", "mistral")
    usual = {
        "base": None,
        "classification": "score" if decoder else "classifier",
        "tokens": "score" if decoder else "classifier",
        "qa": "qa_outputs",
        "causal": "lm_head",
    }
    return HEADS[family, head] if (family, head) in HEADS else usual[head]


def record(module: nn.Module, inputs: bool = False) -> list[Tensor]:
    """The hidden states that `module` will receive or return, collected as it runs."""
    seen: list[Tensor] = []
    if inputs:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(hidden_argument(args, kwargs)), with_kwargs=True
        )
    else:
        module.register_forward_hook(lambda _, args, output: seen.append(first_output(output)))
    return seen


def shift_output(module: nn.Module, delta: Tensor) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_hook(
        lambda _, args, output: replace_first_output(output, first_output(output) + delta)
    )


def logits_of(output: Any) -> Tensor:
    return output[0]


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_parts(family: str, head: str) -> None:
    model = build(family, head)
    backbone = find_backbone(model, path_for(family, head))
    embedding, between, _, final_norm = PARTS[family]
    base = backbone.base
    assert backbone.model is model
    assert backbone.embedding is base.get_submodule(embedding)
    assert list(backbone.layers) == list(base.get_submodule(LAYERS.get(family, "encoder.layer")))
    assert list(backbone.layers) == list(model.get_submodule(backbone.layers_path))
    assert len(backbone.layers) == 3
    assert backbone.between == tuple(layer.get_submodule(between) for layer in backbone.layers)
    assert backbone.final_norm is (base.get_submodule(final_norm) if final_norm else None)
    name = head_name(family, head)
    assert backbone.head is (model.get_submodule(name) if name else None)
    assert backbone.hidden_size == HIDDEN


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_hidden_states_flow_through_the_parts(family: str, head: str) -> None:
    """What the embedding and each layer return is what the next layer reads: [B, T, D], padding included."""
    model = build(family, head)
    if family == "t5":
        # T5 applies dropout between the embedding and layer 0.
        model.eval()
    backbone = find_backbone(model, path_for(family, head))
    assert backbone.embedding is not None
    embedded = record(backbone.embedding)
    inputs = [record(layer, inputs=True) for layer in backbone.layers]
    outputs = [record(layer) for layer in backbone.layers]
    model(**batch(family, head=head))
    assert torch.equal(embedded[0], inputs[0][0])
    for layer_inputs, layer_outputs in zip(inputs, outputs):
        assert len(layer_inputs) == len(layer_outputs) == 1
        assert layer_inputs[0].shape == layer_outputs[0].shape == (4, 9, HIDDEN)
    assert torch.equal(outputs[0][0], inputs[1][0])
    assert torch.equal(outputs[1][0], inputs[2][0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_modernbert_keeps_padding(implementation: str) -> None:
    model = build("modernbert", attn_implementation=implementation)
    seen = record(find_backbone(model).layers[1], inputs=True)
    model(**batch("modernbert"))
    assert seen[0].shape == (4, 9, HIDDEN)


@pytest.mark.parametrize("family", FAMILIES)
def test_between_shifts_what_the_feed_forward_reads(family: str) -> None:
    model = build(family, "tokens").eval()
    backbone = find_backbone(model)
    inputs = batch(family, labels=False)
    read = record(backbone.layers[1].get_submodule(PARTS[family][2]), inputs=True)
    delta = torch.randn(4, 9, HIDDEN)
    model(**inputs)
    shift_output(backbone.between[1], delta)
    model(**inputs)
    torch.testing.assert_close(read[1], read[0] + delta)


def bert_layer(layer: nn.Module, hidden: Tensor, delta: Tensor, **kwargs: Any) -> Tensor:
    between = layer.attention(hidden, None)[0] + delta
    return layer.output(layer.intermediate(between), between)


def distilbert_layer(layer: nn.Module, hidden: Tensor, delta: Tensor, **kwargs: Any) -> Tensor:
    between = layer.sa_layer_norm(layer.attention(hidden)[0] + hidden) + delta
    return layer.output_layer_norm(layer.ffn(between) + between)


def llama_layer(layer: nn.Module, hidden: Tensor, delta: Tensor, **kwargs: Any) -> Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden), attention_mask=None, **kwargs)[0]
    between = hidden + attended + delta
    return between + layer.mlp(layer.post_attention_layernorm(between))


@pytest.mark.parametrize(
    ("family", "reference"), [("bert", bert_layer), ("distilbert", distilbert_layer), ("llama", llama_layer)]
)
def test_between_is_the_definition(family: str, reference: Any) -> None:
    backbone = find_backbone(build(family, "base").eval())
    layer = backbone.layers[1]
    hidden, delta = torch.randn(2, 5, HIDDEN), torch.randn(2, 5, HIDDEN)
    kwargs = {}
    if family == "llama":
        kwargs["position_embeddings"] = backbone.base.rotary_emb(hidden, position_ids=torch.arange(5)[None])
    expected = reference(layer, hidden, delta, **kwargs)
    plain = layer(hidden, None, **kwargs)
    shift_output(backbone.between[1], delta)
    torch.testing.assert_close(layer(hidden, None, **kwargs), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_electra_projects_its_embeddings() -> None:
    model = build("electra", embedding_size=16).eval()
    backbone = find_backbone(model)
    assert backbone.embedding is model.electra.embeddings_project
    first = record(backbone.layers[0], inputs=True)
    embedded = record(backbone.embedding)
    model(**batch("electra"))
    assert torch.equal(first[0], embedded[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer(family: str) -> None:
    backbone = find_backbone(build(family, "tokens", layers=1))
    assert len(backbone.layers) == len(backbone.between) == 1


def test_experts_are_not_layers() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    for layer in model.model.layers:
        layer.extra_experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    assert find_backbone(model).layers_path == "model.layers"


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_dropout_counts(family: str) -> None:
    bare, classification, tokens = DROPOUTS[family]
    assert len(hidden_dropouts(build(family, "base"))) == bare
    assert len(hidden_dropouts(build(family, "tokens"))) == bare + tokens
    if classification is not None:
        assert len(hidden_dropouts(build(family))) == bare + classification


@pytest.mark.parametrize(
    ("family", "inside", "outside"),
    [
        ("bert", "encoder.layer.0.attention.output.dropout", "encoder.layer.0.attention.self.dropout"),
        ("gpt2", "h.0.attn.resid_dropout", "h.0.attn.attn_dropout"),
        ("distilbert", "transformer.layer.0.ffn.dropout", "transformer.layer.0.attention.dropout"),
        (
            "deberta-v2",
            "encoder.layer.0.attention.self.pos_dropout",
            "encoder.layer.0.attention.self.dropout",
        ),
    ],
)
def test_attention_probabilities_are_left_out(family: str, inside: str, outside: str) -> None:
    model = build(family, "base")
    found = dict(hidden_dropouts(model))
    assert found[inside] is model.get_submodule(inside)
    assert isinstance(model.get_submodule(outside), nn.Dropout)
    assert outside not in found


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_dropouts_are_all_there_are(family: str) -> None:
    """With attention dropout off, the hidden dropouts are the only randomness left in training mode."""
    model = build(family, "tokens", dropout=0.5)
    found = hidden_dropouts(model)
    hidden = [module for _, module in found]
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module not in hidden:
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    inputs = batch(family, labels=False)
    expected = logits_of(model.eval()(**inputs))
    model.train()
    assert not torch.equal(logits_of(model(**inputs)), expected)
    for module in hidden:
        module.p = 0.0
    assert torch.equal(logits_of(model(**inputs)), expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lora(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = build(family)
    plain = find_backbone(model)
    expected = [path for path, _ in hidden_dropouts(model)]
    head = "classifier" if family == "bert" else "score"
    config = peft.LoraConfig(
        r=2, lora_dropout=0.1, target_modules="all-linear", modules_to_save=[head], task_type="SEQ_CLS"
    )
    wrapped = peft.get_peft_model(model, config)
    backbone = find_backbone(wrapped)
    prefix = "base_model.model."
    assert backbone.layers_path == prefix + plain.layers_path
    assert backbone.layers == plain.layers
    assert backbone.base is plain.base
    assert backbone.embedding is plain.embedding
    assert backbone.between == plain.between
    assert backbone.final_norm is plain.final_norm
    assert [path.removeprefix(prefix) for path, _ in hidden_dropouts(wrapped)] == expected
    assert backbone.head is not plain.head
    assert all(parameter.requires_grad for parameter in backbone.head.parameters())
    read = record(backbone.head)
    wrapped(**batch(family))
    assert len(read) == 1


def test_lora_on_a_projected_embedding() -> None:
    peft = pytest.importorskip("peft")
    model = build("electra", embedding_size=16)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embeddings_project", "query"]))
    assert find_backbone(wrapped).embedding is model.electra.embeddings_project


def test_saved_embedding_and_norm() -> None:
    peft = pytest.importorskip("peft")
    model = build("llama", "causal")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"])
    backbone = find_backbone(peft.get_peft_model(model, config))
    embedded, normed = record(backbone.embedding), record(backbone.final_norm)
    first = record(backbone.layers[0], inputs=True)
    model(**batch("llama", head="causal"))
    assert torch.equal(embedded[0], first[0])
    assert len(normed) == 1
    assert backbone.final_norm.weight.requires_grad


def test_layers_path() -> None:
    model = build("t5", "classification")
    with pytest.raises(
        UserError, match=r"several stacks .*layers_path=: transformer\.encoder\.block, .*decoder"
    ):
        find_backbone(model)
    encoder = find_backbone(model, ENCODER_OF_T5)
    assert encoder.base is model.transformer.encoder
    assert encoder.embedding is model.transformer.encoder.embed_tokens
    decoder = find_backbone(model, "transformer.decoder.block")
    assert decoder.base is model.transformer.decoder
    bert = build("bert")
    assert find_backbone(bert, "bert.encoder.layer") == find_backbone(bert)
    with pytest.raises(UserError, match=r"'encoder\.layers' .*did you mean 'bert\.encoder\.layer'"):
        find_backbone(bert, "encoder.layers")
    with pytest.raises(UserError, match=r"'bert\.encoder' is no filled ModuleList"):
        find_backbone(bert, "bert.encoder")


class Mixer(nn.Module):
    """A block without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(8, 8)
        self.channels = nn.Linear(8, 8)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.stack = nn.ModuleList([Mixer(), Mixer()])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh())


def test_unknown_model() -> None:
    toy = Toy()
    with pytest.raises(UserError, match=r"layers_path=, one of: stack \(2 x Mixer\), head \(2 x Linear\)"):
        find_backbone(toy)
    backbone = find_backbone(toy, "stack")
    assert backbone.layers == tuple(toy.stack)
    assert backbone.embedding is toy.table
    assert backbone.final_norm is toy.norm
    assert backbone.between == ()
    assert backbone.hidden_size == 8
    with pytest.raises(UserError, match="it has none"):
        find_backbone(nn.Linear(2, 2))
    with pytest.raises(UserError, match="it has none"):
        find_backbone(nn.Linear(2, 2), "layers")


def test_structures_that_do_not_tell_all() -> None:
    """Sandwich norms, parallel branches, summed embedding tables: nothing instead of a wrong module."""
    from transformers import AutoConfig, AutoModel

    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
    }
    widths = {"gemma2": {"num_key_value_heads": 2, "head_dim": 8}, "opt": {"word_embed_proj_dim": HIDDEN}}
    for name in ("gemma2", "olmo2", "gpt_neox", "opt"):
        config = AutoConfig.for_model(name, **sizes, **widths.get(name, {}))
        config.pad_token_id = 0
        backbone = find_backbone(AutoModel.from_config(config))
        assert len(backbone.layers) == 2
        assert backbone.between == ()
        assert backbone.final_norm is not None
        assert (backbone.embedding is None) == (name == "opt")


def test_shared_layers_are_refused() -> None:
    from transformers import AlbertConfig, AlbertModel

    model = AlbertModel(
        AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=16,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            num_hidden_layers=2,
        )
    )
    with pytest.raises(UserError, match=r"albert_layers holds 1 layer\(s\) where .* counts 2"):
        find_backbone(model)


def test_removed_layers_need_the_path() -> None:
    model = build("bert")
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    with pytest.raises(UserError, match="pass layers_path="):
        find_backbone(model)
    assert len(find_backbone(model, "bert.encoder.layer").layers) == 2


def test_hook_arguments() -> None:
    old, new, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2)
    assert hidden_argument((old, mask), {}) is old
    assert hidden_argument((), {"hidden_states": old, "mask": mask}) is old
    args, kwargs = replace_hidden((old, mask), {"use_cache": False}, new)
    assert args[0] is new
    assert args[1] is mask
    assert kwargs == {"use_cache": False}
    given = {"hidden_states": old, "mask": mask}
    args, kwargs = replace_hidden((), given, new)
    assert args == ()
    assert kwargs["hidden_states"] is new
    assert kwargs["mask"] is mask
    assert given["hidden_states"] is old
    for wrong in [((), {"mask": mask}), ((None,), {})]:
        with pytest.raises(UserError, match="without hidden states"):
            hidden_argument(*wrong)
        with pytest.raises(UserError, match="without hidden states"):
            replace_hidden(*wrong, new)


def test_hook_outputs() -> None:
    old, new = torch.zeros(2), torch.ones(2)
    assert first_output(old) is old
    assert first_output((old, None)) is old
    assert replace_first_output(old, new) is new
    replaced = replace_first_output((old, None, 3), new)
    assert replaced[0] is new
    assert replaced[1:] == (None, 3)
    for wrong in [None, (), ("text",)]:
        with pytest.raises(UserError, match="should return hidden states"):
            first_output(wrong)
        with pytest.raises(UserError, match="should return hidden states"):
            replace_first_output(wrong, new)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("0-5", (0, 1, 2, 3, 4, 5)),
        ("2-2", (2,)),
        ("last:2", (4, 5)),
        ("first:2", (0, 1)),
        ("last:6", (0, 1, 2, 3, 4, 5)),
        (" 3 ", (3,)),
        (3, (3,)),
        (-1, (5,)),
        ([5, 0, 0], (0, 5)),
        ([-6, -1], (0, 5)),
        (["first:1", 3, "4-5", -1, "-2"], (0, 3, 4, 5)),
        ((1, 2), (1, 2)),
    ],
)
def test_select_layers(selector: Any, expected: tuple[int, ...]) -> None:
    assert select_layers(selector, 6) == expected


@pytest.mark.parametrize(
    ("selector", "reason"),
    [
        ("6", "out of range"),
        (6, "out of range"),
        (-7, "out of range"),
        ("4-6", "out of range"),
        ("last:7", "out of range"),
        ("first:7", "out of range"),
        ([0, 9], "9 is out of range"),
        ("3-1", "selects no layer"),
        ("last:0", "selects no layer"),
        ([], "selects no layer"),
        ("", "not a layer selector"),
        ("lats:2", "not a layer selector"),
        ("last:-2", "not a layer selector"),
        ("1,2", "not a layer selector"),
        ([0, "x"], "'x' is not a layer selector"),
        (True, "not a layer selector"),
        (1.0, "not a layer selector"),
        (None, "not a layer selector"),
        ([[0]], "not a layer selector"),
    ],
)
def test_select_layers_errors(selector: Any, reason: str) -> None:
    with pytest.raises(UserError) as error:
        select_layers(selector, 6)
    message = str(error.value)
    assert reason in message
    assert repr(selector) in message
    assert "6 layer" in message
    assert '"last:4"' in message


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_the_models_of_the_tests(family: str, head: str) -> None:
    """The shared models repeat under a seed, and their batches give a loss for either padding."""
    first, again = build(family, head).state_dict(), build(family, head).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    model = build(family, head).eval()
    for padding in ("right", "left"):
        inputs = batch(family, head=head, padding=padding)
        assert inputs["attention_mask"].sum(1).tolist() == [9, 7, 5, 3]
        output = model(**inputs)
        assert (head == "base") == (getattr(output, "loss", None) is None)
        assert torch.isfinite(output[0]).all()
