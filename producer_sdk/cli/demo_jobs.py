"""The jobs of `rolloutq demo`: every dialect, and a group."""

from dataclasses import dataclass
from typing import Any

from producer_sdk.client import Client
from producer_sdk.future import Pending
from producer_sdk.group import Group
from protocols.job import Reply
from protocols.rollout_state import SampleParams

TOKENS, GROUP_TOKENS, SAMPLES = 48, 24, 8
MS_PER_TOKEN = 80
"""The scripted engine's pace, so that it can be killed in the middle."""

_CHATS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Why is the sky blue? Answer in one sentence.",
    "Write a haiku about the sea.",
)
_LETTERS = (
    "Give me one tip for sleeping better.",
    "What is water made of?",
    "Tell me a short joke about a cat.",
)
_TURNS = (
    "Translate 'good morning' into Spanish.",
    "How many days are in a week?",
)
_BEGINNING = "Once upon a time, in a small village by the river,"
_GROUP = "Invent a name for a friendly robot, and say why it fits."


@dataclass(frozen=True)
class Sent:
    """A job under way."""

    job_id: str
    protocol: str
    answer: Pending[Reply] | Pending[Group]

    def reply(self, timeout_s: float) -> Reply:
        """Its reply; raises ResultTimeout."""
        got = self.answer.result(timeout_s)
        return got.reply if isinstance(got, Group) else got


def send_all(client: Client, *, scripted: bool) -> list[Sent]:
    """Submit everything: ten prompts and a group of `SAMPLES`."""
    pace: dict[str, Any] = {"rollout": {"script": {"ms_per_token": MS_PER_TOKEN}}}
    bodies = [
        (name, protocol, body | (pace if scripted else {})) for name, protocol, body in _bodies()
    ]
    sent = [
        Sent(name, protocol, client.submit(body, protocol=protocol, job_id=name))
        for name, protocol, body in bodies
    ]
    params = SampleParams(max_tokens=GROUP_TOKENS, temperature=1.0)
    group = client.sample(_user(_GROUP), n=SAMPLES, params=params, job_id="group")
    return [*sent, Sent("group", "generate", group)]


def _bodies() -> list[tuple[str, str, dict[str, Any]]]:
    """(job id, protocol, request body)."""
    limit = {"max_tokens": TOKENS, "temperature": 0}
    within = {"sample_params": limit}
    return [
        *((f"chat-{i}", "openai.chat", _asking(text) | limit) for i, text in enumerate(_CHATS, 1)),
        *(
            (f"claude-{i}", "claude.messages", _asking(text) | limit)
            for i, text in enumerate(_LETTERS, 1)
        ),
        *(
            (f"generate-{i}", "generate", _asking(text) | within)
            for i, text in enumerate(_TURNS, 1)
        ),
        ("generate-text", "generate", {"prompt": _BEGINNING} | within),
    ]


def _asking(text: str) -> dict[str, Any]:
    return {"messages": _user(text)}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
