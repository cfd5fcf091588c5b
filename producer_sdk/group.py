"""The samples of one prompt."""

import msgspec

from protocols.job import ROLLOUT_STATUS, JobStatus, Reply
from protocols.rollout_state import RolloutState, TokenIds


class Group(msgspec.Struct, frozen=True):
    """What `Client.sample` gives: `n` samples, each with its own status.

    A failed job gives `n` samples with a status and `error_msg`, never an empty text that looks
    like an answer.
    """

    job_id: str
    status: JobStatus
    samples: tuple[RolloutState, ...]
    reply: Reply

    @property
    def prompt_ids(self) -> TokenIds:
        """The prompt as the engine saw it; empty where nothing was generated."""
        return self.samples[0].prompt_ids

    def raise_for_status(self) -> "Group":
        """Return self if completed, else raise the error that ended the job."""
        self.reply.raise_for_status()
        return self

    @classmethod
    def of(cls, reply: Reply, n: int) -> "Group":
        """The group that a reply to a job of `n` samples stands for; raises JobNotFound of a tombstone."""
        if reply.tombstone:
            raise reply.exception()
        if reply.states:
            samples = reply.states
        else:
            told = str(reply.exception())
            samples = tuple(
                RolloutState(
                    rollout_id=f"{reply.job_id}/{index}",
                    group_id=reply.job_id,
                    index=index,
                    status=ROLLOUT_STATUS[reply.status],
                    finish_reason="error" if reply.status is JobStatus.FAILED else "abort",
                    error_msg=told,
                )
                for index in range(n)
            )
        return cls(job_id=reply.job_id, status=reply.status, samples=samples, reply=reply)
