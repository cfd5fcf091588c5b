"""The jobs of `rolloutq demo`: every dialect that draws tokens, and a group."""

from dataclasses import dataclass
from typing import Any

from producer_sdk.cli.request import asking
from producer_sdk.client import Client
from producer_sdk.future import Pending
from producer_sdk.group import Group
from protocols.job import Reply
from protocols.rollout_state import SampleParams

TOKENS, GROUP_TOKENS, SAMPLES = 48, 24, 8
STORY, STORY_TOKENS = "story", 160
"""Of the job that is long enough to be killed behind a checkpoint."""
MS_PER_TOKEN = 80
"""The scripted engine's pace, so that it can be killed in the middle."""

_PROMPTS = (
    ("chat-1", "openai.chat", "What is the capital of France?"),
    ("chat-2", "openai.chat", "Name three primary colors."),
    ("chat-3", "openai.chat", "Why is the sky blue? Answer in one sentence."),
    ("chat-4", "openai.chat", "Write a haiku about the sea."),
    ("claude-1", "claude.messages", "Give me one tip for sleeping better."),
    ("claude-2", "claude.messages", "What is water made of?"),
    ("claude-3", "claude.messages", "Tell me a short joke about a cat."),
    ("generate-1", "generate", "Translate 'good morning' into Spanish."),
    ("generate-2", "generate", "How many days are in a week?"),
)
_BEGINNING = "Once upon a time, in a small village by the river,"
_STORY = "Tell me the story of a lighthouse keeper and a whale."
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
    """Submit everything: the story, ten prompts and a group of `SAMPLES`."""
    pace: dict[str, Any] = {"rollout": {"script": {"ms_per_token": MS_PER_TOKEN}}}
    sent = [
        Sent(
            job_id,
            protocol,
            client.submit(body | (pace if scripted else {}), protocol=protocol, job_id=job_id),
        )
        for job_id, protocol, body in bodies()
    ]
    group = client.sample(
        [{"role": "user", "content": _GROUP}],
        n=SAMPLES,
        params=SampleParams(max_tokens=GROUP_TOKENS, temperature=1.0),
        job_id="group",
    )
    return [*sent, Sent("group", "generate", group)]


def bodies() -> list[tuple[str, str, dict[str, Any]]]:
    """(job id, protocol, request body) of every single prompt; first the story, which takes longest."""
    limits = {"max_tokens": TOKENS, "temperature": 0}
    made = [
        (job_id, protocol, asking(text, protocol, **limits)) for job_id, protocol, text in _PROMPTS
    ]
    return [
        (STORY, "generate", _story()),
        *made,
        ("completion-1", "openai.completions", {"prompt": _BEGINNING, **limits}),
    ]


def _story() -> dict[str, Any]:
    """As long as it is told to be, from the model and from the scripted engine, which repeats its prompt."""
    params = {
        "max_tokens": STORY_TOKENS,
        "min_tokens": STORY_TOKENS,
        "temperature": 0.8,
        "sampling_seed": 7,
    }
    text = f"{_STORY} {_STORY} {_STORY}"
    return {"messages": [{"role": "user", "content": text}], "sample_params": params}
