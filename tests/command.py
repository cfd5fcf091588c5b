"""`rolloutq` for tests: in this process, or as one of its own that gets signals and is read meanwhile."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
END_LIMIT_S = 60.0
_RUN = "import sys; from producer_sdk.cli import main; sys.exit(main())"


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever it printed
        """Its output read as JSON."""
        return json.loads(self.out)


class Rolloutq(Protocol):
    """What the fixture `rolloutq` is."""

    def __call__(self, *words: str) -> Ran: ...


class CommandProcess:
    """A running `rolloutq` with its output in a file; it ends with the block."""

    def __init__(
        self,
        folder: Path,
        *words: str,
        path: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run `rolloutq` with these words in `folder`; Python looks for modules in `path` too."""
        self._log = folder / "rolloutq.log"
        kept = {name: text for name, text in os.environ.items() if not name.startswith("ROLLOUTQ_")}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _RUN, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=kept
                | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *path]))}
                | dict(environment or {}),
                cwd=folder,
            )
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the process, running or not."""
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = END_LIMIT_S) -> None:
        """Return when it has printed `text`; the test fails if it ends or `timeout_s` passes before."""
        self.wait_until(lambda: text in self.output, f"{text!r} in the output", timeout_s)

    def wait_until(
        self, holds: Callable[[], object], what: str, timeout_s: float = END_LIMIT_S
    ) -> None:
        """Return when `holds()` is true; the test fails if it ends or `timeout_s` passes before."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"there never was {what}:\n{self.output}")
            time.sleep(0.05)

    def children(self) -> list[psutil.Process]:
        """Its child processes now; `left` looks after them."""
        found = psutil.Process(self._process.pid).children(recursive=True)
        self._seen.update(found)
        return found

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.children()
        self._process.send_signal(number)

    def wait(self, timeout_s: float = END_LIMIT_S) -> int:
        """Its exit code."""
        return self._process.wait(timeout_s)

    def left(self) -> list[str]:
        """Those of its children that were seen and still run."""
        return [str(child) for child in self._seen if child.is_running()]

    def kill(self) -> None:
        """End it, and whatever it left, for certain."""
        if self._process.poll() is None:
            self.children()
            self._process.kill()
            self._process.wait(END_LIMIT_S)
        for child in self._seen:
            if child.is_running():
                child.kill()
