"""Rows of one prompt and one reply, as a model reads them."""

from __future__ import annotations

from typing import Any

from slimtune.calib.formats import Conversation, render_messages, uses_template
from slimtune.errors import CalibrationError


def prompt_and_reply(conversation: Conversation, tokenizer: Any, where: str = "") -> tuple[str, str]:
    """The prompt, up to where the reply begins, and the reply. Raises `CalibrationError` where there is no reply."""
    if conversation.is_text or conversation.messages[-1]["role"] != "assistant":
        raise CalibrationError("a row has no prompt with a reply", where=where, remedy="give prompt and completion")
    reply = conversation.messages[-1]["content"]
    if uses_template(conversation, tokenizer):
        return render_messages(conversation.messages[:-1], tokenizer, open_reply=True, where=where), reply
    return "".join(segment.text for segment in conversation.plain[:-1]), reply
