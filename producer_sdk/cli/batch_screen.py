"""What a batch shows: a line that changes on a terminal, plain lines elsewhere, a table at its end."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from producer_sdk.batch.runner import Look
from producer_sdk.batch.work import Summary
from producer_sdk.cli.screen import show

LINE_EVERY_S = 10.0


class Screen:
    """Shows looks on standard error."""

    def __init__(self) -> None:
        self._line_at = time.monotonic() + LINE_EVERY_S
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, look: Look) -> None:
        """Bring up to date."""
        ended = look.done + look.failed
        if self._bar:
            self._bar.update(
                self._task,
                total=look.rows - look.invalid,
                completed=ended,
                description=told(look),
            )
        elif time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINE_EVERY_S
            self.say(f"{ended}/{look.rows - look.invalid} rows, {told(look)}")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def told(look: Look) -> str:
    """A look in words, beside the rows that are done."""
    eta = "?" if look.eta_s is None else _span(look.eta_s)
    parts = [
        f"{look.tokens_per_s:,.0f} tokens/s",
        f"ETA {eta}",
        f"{look.in_flight}/{look.most_in_flight} in flight",
        f"oldest {_span(look.oldest_s)}",
        f"{look.workers} workers",
    ]
    if look.faults:
        counts = ", ".join(f"{count} {code}" for code, count in sorted(look.faults.items()))
        parts.append(f"failed: {counts}")
    return ", ".join(parts)


def show_result(summary: Summary) -> None:
    """The final table."""
    told, lengths = summary, summary.lengths
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(
        "rows",
        f"{told.done} done, {told.failed} failed, {told.invalid} bad, {told.waiting} left",
    )
    if told.failures:
        table.add_row("failures", _counts(told.failures))
    table.add_row("tokens", f"{told.prompt_tokens:,} prompt, {told.response_tokens:,} response")
    table.add_row("finish reasons", _counts(told.finish_reasons) or "-")
    table.add_row("response tokens", f"p50 {lengths.p50}, p95 {lengths.p95}, max {lengths.most}")
    table.add_row("output", told.output)
    if told.errors:
        table.add_row("errors", told.errors)
    show(table)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
