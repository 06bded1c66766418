"""What a causal language model is fine-tuned on: plain text, prompts with completions, or chats."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from dist_reg.data.files import FORMATS, check_file, read_table, read_text
from dist_reg.data.table import Table, check_text
from dist_reg.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")
TEXT, COMPLETION, CHAT = "text", "completion", "chat"
"""The three forms of examples."""


@dataclass(frozen=True, kw_only=True)
class LMOptions:
    """What the rows of a language-model task are, and how they are laid out. Raises UserError for options that contradict."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    prompt: str | None = None
    """Column with the prompt, or a text with columns in braces, such as "Question: {question}\\nAnswer: "."""
    completion: str | None = None
    """Column with what is to follow the prompt, or a text with columns in braces; the loss is on this alone."""
    messages: str | None = None
    """Column with a chat, a list of {role, content}; the loss is on what the assistant says."""
    chat_template: str | None = None
    """Path of a Jinja template for chats, in place of the tokenizer's own."""
    packing: bool = False
    """Put several training examples into one row of `max_length` tokens, none of which sees another."""

    def __post_init__(self) -> None:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise UserError(
                "data.lm has messages beside prompt or completion; a row is either a chat or a pair"
            )
        if (self.prompt is None) != (self.completion is None):
            missing = "completion" if self.completion is None else "prompt"
            raise UserError(f"data.lm.{missing} is missing; a prompt and its completion belong together")
        for name in ("prompt", "completion", "messages", "chat_template"):
            if getattr(self, name) == "":
                raise UserError(f"data.lm.{name} is empty; name it, or leave it out")


def form_of(table: Table, options: LMOptions, text: str | None) -> str:
    """TEXT, COMPLETION or CHAT: what the options say, or else the columns `messages`, or `prompt` and `completion`."""
    if options.messages is not None:
        return CHAT
    if options.prompt is not None:
        return COMPLETION
    if text is not None:
        return TEXT
    if "messages" in table.columns:
        return CHAT
    return COMPLETION if {"prompt", "completion"} <= set(table.columns) else TEXT


def read_rows(path: str | Path, *, quoting: bool | None = None) -> Table:
    """The rows of a table, or a text file as the one row of column `text`.

    Raises:
        UserError: the file is missing, empty or of another format.
    """
    path = Path(path)
    if path.suffix.lower() != ".txt":
        if path.suffix.lower() not in FORMATS:
            raise UserError(
                f"{path} has the extension {path.suffix!r}, which cannot be read; known: .txt, {', '.join(FORMATS)}"
            )
        return read_table(path, quoting=quoting)
    check_file(path)
    return Table(source=str(path), columns={"text": [read_text(path)]}, lines=[1])


def examples_of(table: Table, form: str, options: LMOptions, text: str | None) -> Table:
    """The columns of an example: `text`, or `prompt` and `completion`, or `messages` and `place`.

    Raises:
        UserError: a column that is missing, an empty text or completion, or a chat that is none, with its line.
    """
    if form == CHAT:
        name = options.messages or "messages"
        chats = [_chat(table, row, chat) for row, chat in enumerate(table.column(name))]
        places = [table.where(row) for row in range(len(table))]
        tools = [
            _tools(table, row, own) for row, own in enumerate(table.columns.get("tools", [None] * len(table)))
        ]
        return replace(table, columns={"messages": chats, "tools": tools, "place": places})
    if form == TEXT:
        texts = table.texts(text or "text")
        for row, own in enumerate(texts):
            if not own.strip():
                raise UserError(f"{table.where(row)}: the text is empty")
        return replace(table, columns={"text": texts})
    prompts = _filled(table, options.prompt or "prompt", "prompt")
    completions = _filled(table, options.completion or "completion", "completion")
    for row, own in enumerate(completions):
        if not own.strip():
            raise UserError(
                f"{table.where(row)}: the completion is empty, so there is nothing to learn from it"
            )
    return replace(table, columns={"prompt": prompts, "completion": completions})


def _filled(table: Table, wanted: str, option: str) -> list[str]:
    """A column, or a text with columns in braces filled in for every row."""
    if "{" not in wanted:
        return table.texts(wanted)
    try:
        parts = list(string.Formatter().parse(wanted))
    except ValueError as error:
        raise UserError(f"data.lm.{option}: {wanted!r} is no text with columns in braces ({error})") from None
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or name not in table.columns):
            known = nearest(name, list(table.columns))
            raise UserError(f"data.lm.{option} names {{{name}}}, no column of {table.source}; {known}")
    columns = {name: [str(value) for value in table.column(name)] for name in names}
    for row in range(len(table)):
        if option == "completion" and names and not any(columns[name][row].strip() for name in names):
            raise UserError(
                f"{table.where(row)}: the completion is empty (column {names[0]!r}), so there is nothing to learn from it"
            )
        for name in names:
            check_text(columns[name][row], f"{table.where(row)}, column {name!r}")
    return [
        "".join(fixed + (columns[name][row] if name is not None else "") for fixed, name, _, _ in parts)
        for row in range(len(table))
    ]


def _tools(table: Table, row: int, tools: Any) -> str:
    """The tools that a chat may call, as JSON; the column `tools` holds a list of them, or JSON of one, where there is any."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise UserError(f"{table.where(row)}: the tools are no JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{table.where(row)}: the tools are no list")
    return json.dumps(tools or None)


def _chat(table: Table, row: int, chat: Any) -> str:
    """The messages of a row, checked, as JSON; csv holds them so too. Whatever else a message has is for the template."""
    where = table.where(row)
    if isinstance(chat, str):
        try:
            chat = json.loads(chat)
        except ValueError:
            raise UserError(f"{where}: the chat is no list of messages, nor JSON of one") from None
    if not isinstance(chat, Sequence) or isinstance(chat, str) or not chat:
        raise UserError(f"{where}: the chat is no list of messages")
    for number, message in enumerate(chat, start=1):
        calls = isinstance(message, dict) and message.get("tool_calls")
        if not isinstance(message, dict) or not (isinstance(message.get("content"), str) or calls):
            raise UserError(f"{where}, message {number}: not of the form {{role: ..., content: ...}}")
        if message.get("role") not in ROLES:
            role = str(message.get("role"))
            raise UserError(f"{where}, message {number}: unknown role {role!r}; {nearest(role, ROLES)}")
        check_text(message.get("content") or "", f"{where}, message {number}")
        if message["role"] == "assistant" and not calls and not message["content"].strip():
            raise UserError(
                f"{where}, message {number}: the assistant says nothing, so there is nothing to learn"
            )
    if not any(message["role"] == "assistant" for message in chat):
        raise UserError(
            f"{where}: the assistant says nothing in this chat, so there is nothing to learn from it"
        )
    # what a row of a table lacks comes as None, which templates take for something
    return json.dumps(
        [{key: value for key, value in message.items() if value is not None} for message in chat]
    )
