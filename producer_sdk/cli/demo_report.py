"""What `rolloutq demo` shows in the end."""

from collections.abc import Collection, Iterator, Sequence
from textwrap import shorten

from rich.text import Text

from producer_sdk.cli.answer import failure, mean_logprob
from producer_sdk.cli.demo_jobs import Sent
from protocols.job import JobStatus, Reply
from protocols.rollout_state import RolloutState

TEXT_CHARS = 74
_ROW = "{:<15}{:<16}{:>7}{:>11}   {:<7}{:>9}"


def answers(
    sent: Sequence[Sent], replies: Sequence[Reply], held: Collection[str]
) -> Iterator[Text]:
    """A row of figures for each sample, its text below; the jobs in `held`, continued, stand out."""
    yield Text(_ROW.format("job", "dialect", "tokens", "mean logp", "worker", "attempts"), "dim")
    for job, reply in zip(sent, replies, strict=True):
        style = "bold" if job.job_id in held else ""
        for name, tokens, logprob, text in _samples(job.job_id, reply):
            end = (reply.worker or "nobody", reply.attempts)
            yield Text(_ROW.format(name, job.protocol, tokens, logprob, *end), style)
            yield Text(f"    {shorten(text, TEXT_CHARS, placeholder=' …')}", style)


def _samples(job_id: str, reply: Reply) -> list[tuple[str, str, str, str]]:
    """(name, tokens, mean log-probability, text) of each; why there is none where the job failed."""
    failed = failure(reply)
    if failed is not None:
        return [(job_id, "", "", failed)]
    if len(reply.states) == 1:
        return [(job_id, *_figures(reply.states[0]))]
    return [(f"{job_id}/{state.index}", *_figures(state)) for state in reply.states]


def _figures(state: RolloutState) -> tuple[str, str, str]:
    return str(len(state.response_ids)), f"{mean_logprob(state):.3f}", state.text


def continued(replies: Sequence[Reply], job_id: str, kept_tokens: int) -> str:
    """Who went on with a job behind what was kept of it, and from which token."""
    told = next(reply for reply in replies if reply.job_id == job_id)
    tokens = len(told.state.response_ids) if told.state else 0
    return (
        f"{job_id}: continued by {told.worker or 'nobody'} from token {kept_tokens + 1} of {tokens}"
    )


def verdict(replies: Sequence[Reply], killed: str, held: Collection[str], took_s: float) -> str:
    """The last line: what was answered, and by whom after the fault."""
    answered = sum(reply.status is JobStatus.COMPLETED for reply in replies)
    again = sorted({reply.worker or "nobody" for reply in replies if reply.job_id in held})
    return (
        f"{answered} of {len(replies)} jobs answered, {len(held)} were on the killed worker {killed} "
        f"and were continued by {' and '.join(again)}, {took_s:.1f} s"
    )
