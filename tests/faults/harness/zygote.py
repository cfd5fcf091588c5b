"""`python -m tests.faults.harness.zygote`: imports the worker once, then forks one whenever a line asks for it.

A worker takes half a second of CPU to start, nearly all of it imports; a fork takes milliseconds.
Lines of JSON come in: `{"start": [flags], "log": path, "clock_off_s": s}` is answered by the pid,
`{"wait": pid}` by the exit status once that process has ended, `{"poll": pid}` by null until then.
The end of the input ends all that was started.
"""

import json
import os
import signal
import sys
import time
from typing import Any

from worker.__main__ import main as work
from worker.service import serve as _serve_is_imported

assert _serve_is_imported


def _become_worker(flags: list[str], log: str, clock_off_s: float) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if clock_off_s:
        right = time.time
        time.time = lambda: right() + clock_off_s
    sys.argv = ["worker", *flags]
    status = 1
    try:
        status = work()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _start(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        _become_worker(order["start"], order["log"], order["clock_off_s"])
    return pid


class _Ended:
    """Exit statuses; a process is only reaped here, so its pid is nobody else's before."""

    def __init__(self) -> None:
        self._statuses: dict[int, int] = {}

    def status(self, pid: int, *, wait: bool) -> int | None:
        if pid not in self._statuses:
            ended, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
            if ended == 0:
                return None
            self._statuses[pid] = os.waitstatus_to_exitcode(status)
        return self._statuses[pid]


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    started: list[int] = []
    ended = _Ended()
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            started.append(_start(order))
            answer: int | None = started[-1]
        elif "wait" in order:
            answer = ended.status(order["wait"], wait=True)
        else:
            answer = ended.status(order["poll"], wait=False)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in started:
        if ended.status(pid, wait=False) is None:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
