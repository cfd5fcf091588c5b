"""Jobs whose answer is known beforehand, token by token."""

import random
import string
from typing import Any

from protocols.rollout_state import RolloutState

END_TOKEN = 256


def text_of(seed: int, name: str, tokens: int) -> str:
    """A text of its own for every job: `tokens - 1` letters, for the engine adds the end."""
    rng = random.Random(f"{seed}:{name}")
    return "".join(rng.choices(string.ascii_letters, k=tokens - 1))


def body(text: str, **script: float | str) -> dict[str, Any]:
    """An OpenAI body that says `text` at the pace of the script."""
    return {
        "messages": [{"role": "user", "content": "by script"}],
        "rollout": {"script": {"text": text, **script}},
    }


def right(state: RolloutState | None, text: str) -> bool:
    """Whether a reply's tokens and log-probabilities are what the script must give, each with its version."""
    ids = [*text.encode(), END_TOKEN]
    return (
        state is not None
        and list(state.response_ids) == ids
        and list(state.logprobs) == [_logprob(token, at) for at, token in enumerate(ids)]
        and [start for _, start in state.policy_versions] == [0]
    )


def _logprob(token_id: int, position: int) -> float:
    return -((token_id * 31 + position * 17) % 64 + 1) / 32
