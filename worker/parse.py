"""From segments to samples: what was drawn so far, where a stop string ends it, and its text."""

from msgspec.structs import replace

from protocols.job import Segment
from protocols.rollout_state import (
    FinishReason,
    Logprobs,
    RolloutState,
    SampleParams,
    Status,
    TokenIds,
)
from worker.engines.base import Tokenizer


class Sample:
    """One sample while it is drawn."""

    def __init__(self, params: SampleParams, tokenizer: Tokenizer) -> None:
        self._params, self._tokenizer = params, tokenizer
        self.wide = params.top_logprobs
        self._stops = [stop.encode() for stop in params.stops]
        self._reach = max(map(len, self._stops), default=0)
        self._tail = b""
        self.ids, self.logprobs = TokenIds(), Logprobs()
        self.top_ids, self.top_logprobs = TokenIds(), Logprobs()
        self.versions: list[tuple[int, int]] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def add(self, segment: Segment) -> bool:
        """Append a segment, up to a stop string; returns whether the sample has ended because of one."""
        if self.finish_reason is not None:
            return False
        drawn = len(segment.token_ids)
        kept = self._first_stop(segment.token_ids) if self._stops else drawn
        stopped = kept < drawn or self.stop_reason is not None
        if kept and (not self.versions or self.versions[-1][0] != segment.policy_version):
            self.versions.append((segment.policy_version, len(self.ids)))
        wide = self.wide
        self.top_ids.extend(segment.top_ids[: kept * wide])
        self.top_logprobs.extend(segment.top_logprobs[: kept * wide])
        self.logprobs.extend(segment.logprobs[:kept])
        # last: the lease keeper's thread reads a checkpoint as far as there are ids
        self.ids.extend(segment.token_ids[:kept])
        self.finish_reason = "stop" if stopped else segment.finish_reason
        if self.finish_reason == "stop" and not stopped and self.ids:
            last = self.ids[-1]
            self.stop_reason = last if last in self._params.stop_token_ids else None
        return stopped

    def _first_stop(self, token_ids: TokenIds) -> int:
        """How many of these tokens belong to the sample: up to the one that completes a stop string."""
        for count, token_id in enumerate(token_ids, 1):
            piece = self._tokenizer.token_bytes(token_id)
            window = self._tail + piece
            self._tail = window[-(self._reach - 1) :] if self._reach > 1 else b""
            if len(self.ids) + count < self._params.min_tokens:
                continue
            old = len(window) - len(piece)  # a match must end in this token
            found = [
                (at, index)
                for index, stop in enumerate(self._stops)
                if (at := window.find(stop, max(0, old - len(stop) + 1))) >= 0
            ]
            if found:
                self.stop_reason = self._params.stops[min(found)[1]]
                return count
        return len(token_ids)

    def text(self) -> str:
        """The text of the tokens; the stop string is cut off unless it was asked for."""
        skip = self._params.skip_special_tokens
        text = self._tokenizer.decode(self.ids, skip_special_tokens=skip)
        if not isinstance(self.stop_reason, str):
            return text
        before = self._tokenizer.decode(self.ids[:-1], skip_special_tokens=skip).rstrip("\ufffd")
        at = text.find(self.stop_reason, max(0, len(before) - len(self.stop_reason) + 1))
        if at < 0:
            return text
        kept = len(self.stop_reason) if self._params.include_stop_str_in_output else 0
        return text[: at + kept]

    def state(
        self, prompt: RolloutState, job_id: str, index: int, *, cut_off: Status | None = None
    ) -> RolloutState:
        """The rollout state of this sample: completed, or cut off with `status` and why."""
        return replace(
            prompt,
            rollout_id=f"{job_id}/{index}",
            index=index,
            response=self.text(),
            response_ids=self.ids,
            logprobs=self.logprobs,
            top_ids=self.top_ids,
            top_logprobs=self.top_logprobs,
            policy_versions=tuple(self.versions),
            finish_reason=self.finish_reason or "abort",
            stop_reason=self.stop_reason,
            status=Status.COMPLETED if self.finish_reason else (cut_off or Status.ABORTED),
        )
