"""A row as training data: one line a sample, with its tokens, log-probabilities and policy versions."""

import msgspec

from producer_sdk.batch.answer import Fault
from protocols.dialects.result import finite
from protocols.job import ROLLOUT_STATUS, JobStatus, Reply
from protocols.rollout_state import FinishReason, RolloutState, Status


class _RolloutLine(msgspec.Struct, frozen=True, gc=False):
    id: str
    custom_id: str
    index: int
    of: int
    """How many samples the row has."""
    status: Status
    finish_reason: FinishReason | None
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    """`[response tokens]`"""
    model_steps: list[int]
    """`[response tokens]`, the policy version of each."""
    text: str | None
    error: Fault | None


_encode_lines = msgspec.json.Encoder().encode_lines


def rollout_lines(row_id: str, custom_id: str, reply: Reply) -> bytes:
    """The lines of a reply; of one without samples, one that says why."""
    fault = None
    if reply.status is not JobStatus.COMPLETED:
        fault = Fault(reply.error or reply.status.value, str(reply.exception()))
    states = reply.states or (RolloutState(status=ROLLOUT_STATUS[reply.status]),)
    return _encode_lines([_line(row_id, custom_id, state, len(states), fault) for state in states])


def _line(
    row_id: str, custom_id: str, state: RolloutState, of: int, fault: Fault | None
) -> _RolloutLine:
    return _RolloutLine(
        row_id,
        custom_id,
        state.index,
        of,
        state.status,
        state.finish_reason,
        state.prompt_ids.tolist(),
        state.response_ids.tolist(),
        finite(state.logprobs),
        state.response_model_steps,
        state.response,
        fault,
    )
