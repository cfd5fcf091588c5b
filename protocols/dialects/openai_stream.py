"""What the streams of OpenAI's protocols share."""

from msgspec.structs import replace

from protocols.dialects.sse import raw_data
from protocols.job import Segment
from protocols.rollout_state import RolloutState


def error_frame(body: bytes) -> bytes:
    """The event that ends a stream which cannot go on: clients raise what they find under `error`."""
    return raw_data(body)


def part_of(state: RolloutState, segment: Segment) -> RolloutState:
    """The state of a sample that begins, with the tokens of one segment and nothing else."""
    return replace(
        state,
        response_ids=segment.token_ids,
        logprobs=segment.logprobs,
        top_ids=segment.top_ids,
        top_logprobs=segment.top_logprobs,
    )
