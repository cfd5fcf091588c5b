"""A reply as a person or a program reads it."""

import math
from typing import Any

from protocols.job import JobStatus, Reply
from protocols.rollout_state import RolloutState


def mean_logprob(state: RolloutState) -> float:
    """Mean log-probability of a sample's tokens; not a number where it has none."""
    return math.fsum(state.logprobs) / len(state.logprobs) if state.logprobs else math.nan


def texts(reply: Reply) -> list[str]:
    """The text of each sample, headed by its number where there are several."""
    if len(reply.states) == 1:
        return [reply.states[0].text]
    return [f"[{state.index}] {state.text}" for state in reply.states]


def failure(reply: Reply) -> str | None:
    """Why a job has no answer, or None."""
    if reply.status is JobStatus.COMPLETED:
        return None
    return f"job {reply.job_id} {reply.status}: {reply.exception()} ({reply.error}, {reply.code})"


def fields(reply: Reply) -> dict[str, Any]:
    """The whole reply as JSON has it: the response in the job's dialect, and every sample in short."""
    return {
        "job_id": reply.job_id,
        "status": reply.status,
        "code": reply.code,
        "error": reply.error,
        "attempts": reply.attempts,
        "worker": reply.worker,
        "policy_version": reply.policy_version,
        "finished_ms": reply.finished_ms,
        "response": reply.response,
        "samples": [_sample(state) for state in reply.states],
    }


def _sample(state: RolloutState) -> dict[str, Any]:
    return {
        "index": state.index,
        "text": state.text,
        "tokens": len(state.response_ids),
        "mean_logprob": mean_logprob(state),
        "finish_reason": state.finish_reason,
        "policy_versions": state.policy_versions,
    }
