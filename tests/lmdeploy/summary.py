"""What lmdeploy's engine answered, in words and tables for people; the fixture `show` ends the run with them."""

from collections.abc import Callable, Iterator

from protocols.rollout_state import RolloutState

Show = Callable[[str], None]
"""What the fixture `show` is."""
COLUMNS = 12


def told(what: str, state: RolloutState, apart: float) -> str:
    """A sample's tokens and log-probabilities, and how far these are from transformers' at most."""
    ended = f"{state.finish_reason} {state.stop_reason or ''}".strip()
    head = f"{what}: {len(state.response_ids)} tokens (end: {ended}), within {apart:.1e} of transformers"
    return "\n".join([head, *_rows(state)])


def _rows(state: RolloutState) -> Iterator[str]:
    ids, logprobs = list(state.response_ids), list(state.logprobs)
    for start in range(0, len(ids), COLUMNS):
        here = slice(start, start + COLUMNS)
        yield "  tokens   " + "".join(f"{one:9d}" for one in ids[here])
        yield "  logprobs " + "".join(f"{one:9.4f}" for one in logprobs[here])
