"""Processes that a command starts and ends."""

import contextlib
import signal
import subprocess
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType

TAIL_CHARS = 2000
KILL_LIMIT_S = 10.0


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP asked this process to end."""


@contextlib.contextmanager
def ended_by_signals() -> Generator[None]:
    """Let SIGTERM and SIGHUP unwind the block as Ctrl-C does, so that children are ended."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Child:
    """A process in a group of its own: a terminal's Ctrl-C reaches it only through its parent."""

    def __init__(self, name: str, command: Sequence[str], log: Path | None) -> None:
        """What it writes is appended to `log`, or goes to standard error."""
        self.name = name
        self.log = log
        with open(log, "ab") if log else contextlib.nullcontext() as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output or 2,
                stderr=output or 2,
                process_group=0,
            )

    @property
    def ended(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_LIMIT_S)

    def wait(self, limit_s: float) -> None:
        """Wait until it has ended, and kill it where it has not by then."""
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self) -> str:
        """The last that it wrote into its log."""
        return self.log.read_text(errors="replace")[-TAIL_CHARS:] if self.log else ""


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
