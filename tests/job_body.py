"""Bodies and jobs that tests send."""

from typing import Any

from protocols.codec import encode_json
from protocols.job import Job, JobStatus, Lane
from protocols.queue.rows import Ending, Lease

Body = dict[str, Any]


def chat(text: str, **more: object) -> Body:
    """An OpenAI body with one user turn; the scripted engine echoes it."""
    return {"messages": [{"role": "user", "content": text}], **more}


def claude(text: str, **more: object) -> Body:
    """A Claude body with one user turn."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 256, **more}


def scripted(text: str | None = None, **script: object) -> Body:
    """An OpenAI body with a script for the scripted engine."""
    told = script if text is None else {"text": text, **script}
    return chat("by script", rollout={"script": told})


def job(job_id: str, text: str = "hello", *, lane: Lane = "normal", **more: Any) -> Job:  # noqa: ANN401
    """A job of an OpenAI body."""
    return Job(id=job_id, body=encode_json(chat(text)), lane=lane, **more)


def ending(lease: Lease, body: bytes = b"{}") -> Ending:
    """The completed reply of a lease."""
    return Ending(lease.job_id, lease.fence, JobStatus.COMPLETED, 200, body)
