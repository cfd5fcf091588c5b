"""A bar on a terminal, plain lines elsewhere, nothing where it is not asked for."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_EVERY_S = 10.0


class Progress:
    """Counts what is done of a total, on standard error."""

    def __init__(self, total: int, *, shown: bool, what: str = "jobs") -> None:
        self._total, self._what = total, what
        self._done = 0
        self._line_at = time.monotonic() + LINE_EVERY_S
        self._plain = shown and not sys.stderr.isatty()
        self._bar: Bar | None = None
        if shown and not self._plain:
            self._bar = Bar(
                TextColumn(what),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=total)

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
        elif self._plain:
            self._line()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)
        elif self._plain and time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINE_EVERY_S
            self._line()

    def say(self, line: str) -> None:
        """Print a line beside the bar."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            sys.stderr.write(f"{line}\n")

    def _line(self) -> None:
        sys.stderr.write(f"{self._what}: {self._done}/{self._total}\n")
