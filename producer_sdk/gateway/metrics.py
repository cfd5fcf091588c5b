"""Counts of this gateway, and what Prometheus reads."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from producer_sdk.fleet import Fleet

TEXT = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
GONE = 499
"""Status of a request whose caller hung up before the answer."""


class Metrics:
    """Of one gateway; routes are its own, never what somebody typed."""

    def __init__(self) -> None:
        self.open_requests = 0
        self.open_body_bytes = 0
        self._answered: Counter[tuple[str, int]] = Counter()
        self._buckets: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS_S) + 1))
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def answered(self, route: str, status: int, took_s: float) -> None:
        """Count one request."""
        self._answered[route, status] += 1
        self._buckets[route][bisect_left(BUCKETS_S, took_s)] += 1
        self._seconds[route] += took_s

    def page(self, fleet: Fleet | None) -> str:
        """Everything, in Prometheus' text; without the fleet's part where Redis does not answer."""
        lines = [*self._requests(), *self._durations()]
        lines += [
            "# TYPE rolloutq_gateway_redis_up gauge",
            f"rolloutq_gateway_redis_up {int(fleet is not None)}",
        ]
        lines += [] if fleet is None else _fleet(fleet)
        return "\n".join(lines) + "\n"

    def _requests(self) -> Iterator[str]:
        yield "# TYPE rolloutq_gateway_requests_total counter"
        for (route, status), count in sorted(self._answered.items()):
            yield f'rolloutq_gateway_requests_total{{route="{route}",status="{status}"}} {count}'
        yield "# TYPE rolloutq_gateway_open_requests gauge"
        yield f"rolloutq_gateway_open_requests {self.open_requests}"
        yield "# TYPE rolloutq_gateway_open_body_bytes gauge"
        yield f"rolloutq_gateway_open_body_bytes {self.open_body_bytes}"

    def _durations(self) -> Iterator[str]:
        name = "rolloutq_gateway_request_seconds"
        yield f"# TYPE {name} histogram"
        for route, counts in sorted(self._buckets.items()):
            total = 0
            for limit, count in zip((*BUCKETS_S, "+Inf"), counts, strict=True):
                total += count
                yield f'{name}_bucket{{route="{route}",le="{limit}"}} {total}'
            yield f'{name}_sum{{route="{route}"}} {self._seconds[route]:.6f}'
            yield f'{name}_count{{route="{route}"}} {total}'


def _fleet(fleet: Fleet) -> Iterable[str]:
    yield "# TYPE rolloutq_live_workers gauge"
    yield f"rolloutq_live_workers {len(fleet.workers)}"
    yield "# TYPE rolloutq_gate_open gauge"
    yield f"rolloutq_gate_open {int(fleet.gate == 'open')}"
    yield "# TYPE rolloutq_waiting_jobs gauge"
    yield f"rolloutq_waiting_jobs {fleet.waiting_jobs}"
    yield "# TYPE rolloutq_entries gauge"
    for what, count in fleet.depth.items():
        yield f'rolloutq_entries{{what="{what}"}} {count}'
