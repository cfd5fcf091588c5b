"""What the server saw of the control channel and of beginnings, in its own order and time."""

import re
from dataclasses import dataclass, field

from tests.monitor import Monitor

_BEGUN = re.compile(
    rb'^\+(\d+\.\d+) \[\d+ lua\] "HSET" "[^"]+:reply:([^"]+)" "status" "running" .*"worker" "([^"]+)"'
)
_ACK = re.compile(rb'^\+(\d+\.\d+) \[\d+ lua\] "HSET" "[^"]+:acks:([^"]+)" "([^"@]+)" "\{')
_GATE = re.compile(rb'^\+(\d+\.\d+) \[\d+ lua\] "HSET" "[^"]+:desired" .*"gate" "(open|closed)"')


@dataclass
class Seen:
    """In the order in which the server did it; times in s."""

    begun: list[tuple[float, str, str]] = field(default_factory=list[tuple[float, str, str]])
    """When which job began on which worker."""
    acked: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """When which worker's answer to a command came, by command."""
    gates: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    """When the gate of the desired state was written, and how."""
    begun_while_closed: int = 0


class Trace(Monitor):
    """Reads one pool's beginnings, answers and gates from MONITOR; the server must have no other pool."""

    def __init__(self, url: str) -> None:
        super().__init__(url, kept_bytes=2000)
        self.seen = Seen()
        self._closed = False

    def caught_up(self) -> Seen:
        """All that the server has done up to this moment."""
        self._catch_up()
        return self.seen

    def _note(self, line: bytes) -> None:
        if found := _BEGUN.match(line):
            self.seen.begun.append((float(found[1]), found[2].decode(), found[3].decode()))
            self.seen.begun_while_closed += self._closed
        elif found := _ACK.match(line):
            answers = self.seen.acked.setdefault(found[2].decode(), {})
            answers[found[3].decode()] = float(found[1])
        elif found := _GATE.match(line):
            self.seen.gates.append((float(found[1]), found[2].decode()))
            self._closed = found[2] == b"closed"
        else:
            super()._note(line)
