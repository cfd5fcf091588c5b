"""What `rolloutq demo` shows in the end."""

from collections.abc import Collection, Sequence

from rich.table import Table

from producer_sdk.cli.answer import failure, mean_logprob
from producer_sdk.cli.demo_jobs import Sent
from protocols.job import JobStatus, Reply


def table(sent: Sequence[Sent], replies: Sequence[Reply], held: Collection[str]) -> Table:
    """A row for each sample; the jobs in `held` were generated again."""
    made = Table("job", "dialect")
    made.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in ("tokens", "mean logp", "worker", "attempts"):
        made.add_column(name, justify="left" if name == "worker" else "right")
    for job, reply in zip(sent, replies, strict=True):
        style = "bold" if job.job_id in held else None
        for row in _rows(reply):
            made.add_row(
                _name(job.job_id, reply, row[0]),
                job.protocol,
                *row[1:],
                reply.worker or "",
                str(reply.attempts),
                style=style,
            )
    return made


def _rows(reply: Reply) -> list[tuple[int, str, str, str]]:
    """(index, text, tokens, mean log-probability) of each sample; why there is none where it failed."""
    failed = failure(reply)
    if failed is not None:
        return [(0, failed, "", "")]
    return [
        (
            state.index,
            " ".join(state.text.split()),
            str(len(state.response_ids)),
            f"{mean_logprob(state):.3f}",
        )
        for state in reply.states
    ]


def _name(job_id: str, reply: Reply, index: int) -> str:
    return f"{job_id}/{index}" if len(reply.states) > 1 else job_id


def verdict(replies: Sequence[Reply], killed: str, held: Collection[str], took_s: float) -> str:
    """The last line: what was answered, and by whom again."""
    answered = sum(reply.status is JobStatus.COMPLETED for reply in replies)
    again = sorted({reply.worker or "nobody" for reply in replies if reply.job_id in held})
    return (
        f"{answered} of {len(replies)} jobs answered; {len(held)} were on the killed worker {killed} and were "
        f"generated again by {' and '.join(again)}; {took_s:.1f} s"
    )
