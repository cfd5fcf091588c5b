"""The page on dialects names every field that has no effect, with its verdict."""

import re
from pathlib import Path

import msgspec
import pytest

from protocols.dialects import (
    claude_count_tokens,
    claude_messages,
    generate,
    openai_chat,
    openai_completions,
)
from protocols.dialects.field import IGNORED, REFUSED, WITHHELD, Verdicts

PAGE = Path(__file__).parents[2] / "docs" / "dialects.md"
LABELS = {IGNORED: "ignored", WITHHELD: "withheld", REFUSED: "refused"}


def told(title: str) -> dict[str, set[str]]:
    """Fields by verdict, as the page has them."""
    page = PAGE.read_text()
    found = re.findall(rf"^- {re.escape(title)}, (\w+): (.*(?:\n  .*)*)", page, re.MULTILINE)
    return {label: set(re.findall(r"`(\w+)`", fields)) for label, fields in found}


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("`openai.chat`", openai_chat.Request),
        ("`openai.completions`", openai_completions.Request),
        ("`claude.messages`", claude_messages.Request),
        ("`claude.count_tokens`", claude_count_tokens.Request),
        ("`generate`, `sample_params`", generate.Params),
    ],
)
def test_page_names_every_field_without_effect(title: str, kind: type[msgspec.Struct]) -> None:
    expected: dict[str, set[str]] = {}
    for name, verdict in Verdicts(kind).by_field.items():
        expected.setdefault(LABELS[verdict.tolerated], set()).add(name)
    assert told(title) == expected
