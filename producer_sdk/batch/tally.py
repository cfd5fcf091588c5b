"""What a batch has come to: rows, failures by code, tokens, finish reasons, lengths."""

from collections import Counter

import msgspec

from producer_sdk.batch.answer import Seen


class Lengths(msgspec.Struct, frozen=True):
    """Of the answers, in tokens; of several samples of one row, their mean."""

    p50: int = 0
    p95: int = 0
    most: int = 0


class Tally:
    """Counts of one batch, earlier runs included."""

    def __init__(self) -> None:
        self.done = self.prompt_tokens = self.response_tokens = 0
        self.faults: Counter[str] = Counter()
        """Failed rows by the code of their error."""
        self.reasons: Counter[str] = Counter()
        """Samples by their finish reason."""
        self._lengths: Counter[int] = Counter()

    @property
    def failed(self) -> int:
        """Failed rows."""
        return self.faults.total()

    def add(self, seen: Seen) -> None:
        """Count one row."""
        if seen.fault is not None:
            self.faults[seen.fault] += 1
            return
        self.done += 1
        self.prompt_tokens += seen.prompt_tokens
        self.response_tokens += seen.response_tokens
        self.reasons.update(seen.reasons)
        self._lengths[seen.response_tokens // (len(seen.reasons) or 1)] += 1

    def lengths(self) -> Lengths:
        """Percentiles of what is counted so far."""
        if not self._lengths:
            return Lengths()
        found, passed = {0.5: 0, 0.95: 0}, 0
        for tokens, rows in sorted(self._lengths.items()):
            for share in found:
                if passed < share * self.done:
                    found[share] = tokens
            passed += rows
        return Lengths(found[0.5], found[0.95], max(self._lengths))
