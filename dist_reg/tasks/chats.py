"""From chats to text by a tokenizer's template, and where in the text the assistant speaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_reg.errors import UserError, reason

Message = dict[str, Any]


def template_of(tokenizer: Any, path: str | None) -> str | None:
    """The template in the file at `path`, or None for the tokenizer's own.

    Raises:
        UserError: the file cannot be read, or there is no template at all.
    """
    if path is not None:
        try:
            return Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.lm.chat_template: {path} cannot be read ({reason(error)})") from None
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "the tokenizer has no chat template; take the model's instruct version, or give a template's path as "
            "data.lm.chat_template"
        )
    return None


def spoken(
    tokenizer: Any, chat: Sequence[Message], tools: list[Any] | None, template: str | None, place: str
) -> tuple[str, list[tuple[int, int]], int]:
    """The text of `chat`, the spans [start, end) of what the assistant says in it, and how many of its turns are left out.

    A turn's span is what the template writes behind the prompt that it gives for the turns before. A template that rewrites
    earlier turns (Qwen3's drops what the assistant thought) leaves them without a span; the last turn always has one.

    Raises:
        UserError: the template refuses the chat, or rewrites the prompt of its last turn.
    """

    def text(messages: Sequence[Message], prompt: bool) -> str:
        if not messages:
            return ""
        try:
            found: Any = tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                chat_template=template,
            )
        except Exception as error:  # whatever a template raises, and Jinja for it
            raise UserError(f"{place}: the chat template refuses this chat: {reason(error)}") from None
        return found

    turns = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    chat = chat[: turns[-1] + 1]  # what nobody answers is nothing to learn
    whole = text(chat, False)
    spans, left_out = [], 0
    for number in turns:
        before = text(chat[:number], True)
        after = whole if number == len(chat) - 1 else text(chat[: number + 1], False)
        if whole.startswith(before) and whole.startswith(after) and len(after) > len(before):
            spans.append((len(before), len(after)))
        elif number == turns[-1]:
            raise UserError(
                f"{place}: the chat template writes another prompt for the assistant's last turn than it leaves in the whole "
                "chat, so what the assistant says cannot be told; give another template as data.lm.chat_template"
            )
        else:
            left_out += 1
    return whole, spans, left_out
