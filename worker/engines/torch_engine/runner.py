"""One step of all samples under way. Everything here belongs to the slot loop's thread."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from protocols.errors import EngineFailed, RolloutError
from protocols.job import Segment
from protocols.rollout_state import Logprobs, TokenIds
from worker.engines.base import Counters
from worker.engines.stream import SegmentStream
from worker.engines.weights import busy

from .kv import SlotKV
from .model import LanguageModel
from .prefix_kv import PrefixKV
from .prompt import Prompts
from .sampling import Drawn, draw
from .schedule import Request, Sample, Schedule

News = tuple[SegmentStream, Segment | RolloutError]
"""What a step has for a reader."""


class Runner:
    """The model, the rows and the schedule, moved on step by step."""

    def __init__(
        self,
        model: LanguageModel,
        kv: SlotKV,
        prefixes: PrefixKV,
        schedule: Schedule,
        chunk_tokens: int,
    ) -> None:
        """Idle; `chunk_tokens`: most positions that a step forwards before its rows' next ones."""
        self._model = model
        self._kv = kv
        self._prefixes = prefixes
        self._schedule = schedule
        self._chunk_tokens = chunk_tokens
        self._prompts: Prompts | None = None
        self._forwarded_tokens = self._generated_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._prompts or self._schedule.waiting or self._schedule.rows)

    def counters(self) -> Counters:
        """Load and totals."""
        prompts = self._prompts.requests if self._prompts and not self._prompts.complete else ()
        unforwarded = chain(self._schedule.waiting, prompts)
        waiting = chain(self._schedule.ready, *(request.samples for request in unforwarded))
        return Counters(
            running_samples=len(self._schedule.rows),
            waiting_samples=sum(not sample.ended for sample in waiting),
            forwarded_tokens=self._forwarded_tokens,
            generated_tokens=self._generated_tokens,
        )

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self._schedule.waiting.append(request)

    def requests(self) -> set[Request]:
        """All that are not finished."""
        samples = chain(self._schedule.rows, self._schedule.ready)
        prompts = self._prompts.requests if self._prompts else ()
        return {*self._schedule.waiting, *prompts, *(sample.request for sample in samples)}

    def step(self, policy_version: int) -> list[News]:
        """Draw a token for every row that is not behind, after one chunk of kept tokens or of waiting prompts.

        The tokens bear `policy_version`.
        """
        self._retire()
        if not self._catch_up():
            self._prefill()
        begun = self._begin()
        segments = list(self._draw(begun, policy_version)) if self._schedule.rows else []
        self._retire()
        return segments

    def vacate(self) -> None:
        """Forget what has ended, and all that was computed for it; raises EngineBusy while a sample is under way."""
        self._retire()
        samples = chain.from_iterable(request.samples for request in self.requests())
        under_way = sum(not sample.ended for sample in samples)
        if under_way:
            raise busy(under_way)
        self._schedule.clear()
        self._prompts = None
        self._kv.release()
        self._prefixes.clear()

    def _retire(self) -> None:
        ended_rows = self._schedule.ended_rows()
        for row in ended_rows:
            sample = self._schedule.rows[row]
            if sample.drawn_from:
                self._prefixes.keep(sample.token_ids[: sample.forwarded_tokens], self._kv, row)
            else:  # nothing was drawn from it, so nobody looked whether it is finite
                self._clear(row)
        for source, target, tokens in self._schedule.retire(ended_rows):
            self._kv.move(source, target, tokens)

    def _clear(self, row: int) -> None:
        self._kv.clear(row)
        self._schedule.rows[row].forwarded_tokens = 0

    def _catch_up(self) -> int:
        """Forward kept tokens of rows that are behind, all but the last of each; returns how many."""
        done = 0
        for row, sample in enumerate(self._schedule.rows):
            width = min(sample.unforwarded_tokens - 1, self._chunk_tokens - done)
            if width > 0:
                self._forward([sample], width, row)
                done += width
        return done

    def _prefill(self) -> None:
        if self._prompts is None:
            admitted = self._schedule.admit(self._prefixes.known)
            if admitted:
                self._prompts = Prompts(self._model, self._kv, self._prefixes, admitted)
        prompts = self._prompts
        if prompts is None or prompts.complete:
            return
        if all(request.ended for request in prompts.requests):
            self._prompts = None
            return
        self._forwarded_tokens += prompts.advance(self._chunk_tokens)
        if prompts.complete:
            samples = chain.from_iterable(request.samples for request in prompts.requests)
            self._schedule.ready.extend(samples)

    def _begin(self) -> list[Tensor]:
        """Start ready samples; returns the logits of each new row's first token."""
        prompts = self._prompts
        if prompts is None or not prompts.complete:
            return []
        begun = self._schedule.begin()
        if begun:
            self._reserve()
        for row, sample in enumerate(begun, start=len(self._schedule.rows) - len(begun)):
            prompts.copy_into(self._kv, row, sample)
            if sample.unforwarded_tokens:
                sample.forwarded_tokens = self._prefixes.copy_out(
                    sample.token_ids[:-1], self._kv, row, sample.forwarded_tokens
                )
        if not self._schedule.ready:
            self._prompts = None
        return [prompts.logits(sample) for sample in begun]

    def _reserve(self) -> None:
        rows = self._schedule.rows
        self._kv.reserve(
            len(rows), max(len(sample.token_ids) for sample in rows), self._schedule.longest
        )

    def _draw(self, begun: Sequence[Tensor], policy_version: int) -> Iterator[News]:
        rows = self._schedule.rows
        going_on = rows[: len(rows) - len(begun)]
        logits = [self._decode(going_on)] if going_on else []
        if begun:
            logits.append(torch.stack(list(begun)))
        drawing = [row for row, sample in enumerate(rows) if not sample.unforwarded_tokens]
        if not drawing:
            return
        drawn = draw(_picked(torch.cat(logits), drawing), [rows[row].draws for row in drawing])
        self._generated_tokens += len(drawing)
        for place, row in enumerate(drawing):
            sample = rows[row]
            failure = _failure(sample, drawn.logprobs[place])
            if failure is None:
                yield sample.request.stream, _segment(sample, drawn, place, policy_version)
                continue
            self._clear(row)
            if not sample.ended:
                sample.request.end()
                yield sample.request.stream, failure

    def _decode(self, rows: Sequence[Sample]) -> Tensor:
        self._reserve()
        return self._forward(rows, 1, 0)

    def _forward(self, samples: Sequence[Sample], width: int, first_row: int) -> Tensor:
        """The next `width` tokens of each sample; returns the logits after the last."""
        starts = [sample.forwarded_tokens for sample in samples]
        ids = [sample.forward(width) for sample in samples]
        self._forwarded_tokens += len(samples) * width
        device = self._model.device
        return self._model.decode(
            torch.tensor(ids, device=device),
            torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device),
            max(starts) + width,
            self._kv,
            first_row,
        )


def _picked(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows; the tensor itself where they are all."""
    return logits if len(rows) == len(logits) else logits[rows]


def _failure(sample: Sample, logprob: float) -> RolloutError | None:
    if not math.isfinite(logprob):
        return EngineFailed("the model's logits are not finite for this prompt")
    return sample.draws.matcher.failure if sample.draws.matcher else None


def _segment(sample: Sample, drawn: Drawn, place: int, policy_version: int) -> Segment:
    token_id = drawn.token_ids[place]
    sample.token_ids.append(token_id)
    reason = sample.finish_reason
    sample.ended = sample.ended or reason is not None
    return Segment(
        index=sample.index,
        start=sample.draws.tokens - 1,
        token_ids=TokenIds([token_id]),
        logprobs=Logprobs([drawn.logprobs[place]]),
        top_ids=TokenIds(drawn.top_ids[place]),
        top_logprobs=Logprobs(drawn.top_logprobs[place]),
        policy_version=policy_version,
        finish_reason=reason,
    )
