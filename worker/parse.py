"""From segments to samples: what was drawn so far, where a stop string ends it, and its text."""

from msgspec.structs import replace

from protocols.job import Segment
from protocols.message import Block, Text, ToolUse
from protocols.rollout_state import (
    FinishReason,
    Logprobs,
    RolloutState,
    RoutedExperts,
    SampleParams,
    Status,
    TokenIds,
)
from worker.engines.base import Tokenizer
from worker.regions import PLAIN, Reading
from worker.stops import StopSearch
from worker.view import View


class Sample:
    """One sample while it is drawn."""

    def __init__(
        self, params: SampleParams, tokenizer: Tokenizer, reading: Reading = PLAIN
    ) -> None:
        """`reading` is what its view looks for beside text."""
        self._params, self._tokenizer, self._reading = params, tokenizer, reading
        self._search: StopSearch | None = None
        if params.stops:
            thinking, begun = reading.markup.thinking, reading.thinking
            self._search = StopSearch(params, tokenizer, thinking, begun=begun)
        self.wide = params.top_logprobs
        self.ids, self.logprobs = TokenIds(), Logprobs()
        self.top_ids, self.top_logprobs = TokenIds(), Logprobs()
        self.versions: list[tuple[int, int]] = []
        self.routed_experts: RoutedExperts | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def add(self, segment: Segment) -> bool:
        """Append a segment, up to a stop string; returns whether the sample has ended because of one."""
        if self.finish_reason is not None:
            return False
        kept = len(segment.token_ids)
        if self._search is not None:
            kept = self._search.kept(segment.token_ids)
            self.stop_reason = self._search.stop
        stopped = self.stop_reason is not None
        if kept and (not self.versions or self.versions[-1][0] != segment.policy_version):
            self.versions.append((segment.policy_version, len(self.ids)))
        wide = self.wide
        self.top_ids.extend(segment.top_ids[: kept * wide])
        self.top_logprobs.extend(segment.top_logprobs[: kept * wide])
        self.logprobs.extend(segment.logprobs[:kept])
        # last: the lease keeper's thread reads a checkpoint as far as there are ids
        self.ids.extend(segment.token_ids[:kept])
        self.routed_experts = segment.routed_experts
        self.finish_reason = "stop" if stopped else segment.finish_reason
        if self.finish_reason == "stop" and not stopped and self.ids:
            last = self.ids[-1]
            self.stop_reason = last if last in self._params.stop_token_ids else None
        return stopped

    def view(self, rollout_id: str, *, plain: bool = False) -> View:
        """Its view of nothing yet: to be fed its tokens; a plain one sees nothing but text."""
        return View(
            self._params, self._tokenizer, self._reading, rollout_id=rollout_id, plain=plain
        )

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
        rollout_id, text = f"{job_id}/{index}", self.text()
        output, parse_error = self._read(rollout_id, text)
        called = self.finish_reason == "stop" and any(isinstance(b, ToolUse) for b in output)
        return replace(
            prompt,
            rollout_id=rollout_id,
            index=index,
            response=text,
            output=output,
            parse_error=parse_error,
            response_ids=self.ids,
            logprobs=self.logprobs,
            top_ids=self.top_ids,
            top_logprobs=self.top_logprobs,
            routed_experts=self.routed_experts,
            policy_versions=tuple(self.versions),
            finish_reason="tool_calls" if called else self.finish_reason or "abort",
            stop_reason=self.stop_reason,
            status=Status.COMPLETED if self.finish_reason else (cut_off or Status.ABORTED),
        )

    def _read(self, rollout_id: str, text: str) -> tuple[tuple[Block, ...], str | None]:
        """The response as blocks, and why markup of it stayed text."""
        if not self._marked():  # most are not, and the text is there
            return ((Text(text),) if text else ()), None
        view = self.view(rollout_id)
        view.feed(self.ids)
        view.end()
        return view.blocks(), view.parse_error

    def _marked(self) -> bool:
        """Whether there is any markup, or could be."""
        markup = self._reading.markup
        marks = (*(markup.thinking or ()), *(markup.call or ()))
        if self._reading.thinking or not marks:
            return self._reading.thinking
        raw = b"".join(map(self._tokenizer.token_bytes, self.ids))
        return any(mark.encode() in raw for mark in marks)
