"""Which samples run and which prompts are forwarded next: integers only, no tensors.

A request waits until a row is free; then its prompt is forwarded, once for all its samples, and they
become ready. A ready sample takes a row as soon as there is one, and memory for all rows at their
full length: what began can always be finished. Order is kept throughout, so nothing starves.
"""

from array import array  # noqa: TC003 - stands in quotes: not subscriptable at run time before 3.12
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from protocols.job import Segment
from protocols.rollout_state import FinishReason, Logprobs, TokenIds
from worker.engines.base import Call
from worker.engines.guide import Matcher
from worker.engines.stream import SegmentStream

from .sampling import Draws


class Sample:
    """One sample under way."""

    def __init__(self, request: "Request", index: int, draws: Draws, limit: int) -> None:
        """`limit`: most tokens that it may have."""
        self.request = request
        self.index = index
        self.draws = draws
        self.limit = limit
        self.token_ids = TokenIds(request.prompt_ids)
        """Of prompt and response, so far."""
        self.token_ids.extend(draws.kept)
        self.forwarded_tokens = len(request.prompt_ids)
        """How many of them its row holds keys and values of, once it has one; the position of the next."""
        self.ended = False
        """Whether it is finished, or its reader gave it up."""

    @property
    def reserved_tokens(self) -> int:
        """Keys and values that it may come to."""
        return len(self.request.prompt_ids) + self.limit

    @property
    def unforwarded_tokens(self) -> int:
        """How many it has and the model has not seen: the one drawn last, or what earlier attempts drew."""
        return len(self.token_ids) - self.forwarded_tokens

    @property
    def drawn_from(self) -> bool:
        """Whether a token was drawn from its row, so that all that the row holds was seen to be finite."""
        return self.draws.tokens > len(self.draws.kept)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it is whole; None while it is not."""
        if self.draws.tokens and self.token_ids[-1] in self.draws.stop_ids:
            return "stop"
        return "length" if self.draws.tokens >= self.limit else None

    def forward(self, tokens: int) -> list[int]:
        """The next tokens, which the model sees now."""
        start = self.forwarded_tokens
        self.forwarded_tokens += tokens
        return self.token_ids[start : self.forwarded_tokens].tolist()


class Request:
    """One call inside the engine."""

    def __init__(self, call: Call, context_tokens: int, stop_ids: frozenset[int]) -> None:
        """`stop_ids` are the model's; the prompt is shorter than the context."""
        params = call.params
        room = context_tokens - len(call.prompt_ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        stops = stop_ids.union(params.stop_token_ids)
        first_seed = params.sampling_seed or 0
        kept = call.kept or [TokenIds()] * params.n
        self.prompt_ids = call.prompt_ids
        self.stream = SegmentStream(params.n, self._give_up)
        self.samples = [
            Sample(
                self, i, Draws(params, (first_seed + i) % 2**64, call.prompt_ids, stops, ids), limit
            )
            for i, ids in enumerate(kept)
        ]
        self._end_what_is_whole(call.ended)

    @property
    def ended(self) -> bool:
        """Whether nobody wants any sample of it any more."""
        return all(sample.ended for sample in self.samples)

    def guide(self, matchers: Sequence[Matcher]) -> None:
        """Constrain what is drawn, one matcher a sample; before it is submitted."""
        for sample, matcher in zip(self.samples, matchers, strict=True):
            sample.draws.matcher = matcher

    def end(self) -> None:
        """Let all samples leave."""
        for sample in self.samples:
            sample.ended = True

    def _end_what_is_whole(self, told: Collection[int]) -> None:
        """Draw nothing for samples whose reader has `told` so, nor for those that say so themselves."""
        for sample in self.samples:
            if sample.index in told:
                self.stream.stop(sample.index)
            elif sample.finish_reason is not None:
                sample.ended = True
                self.stream.put(_nothing_more(sample))

    def _give_up(self, indices: Sequence[int]) -> None:
        # called in the event loop's thread; the loop sees the flag at its next step
        for index in indices:
            self.samples[index].ended = True


def _nothing_more(sample: Sample) -> Segment:
    return Segment(
        index=sample.index,
        start=sample.draws.tokens,
        token_ids=TokenIds(),
        logprobs=Logprobs(),
        top_ids=TokenIds(),
        top_logprobs=Logprobs(),
        policy_version=0,
        finish_reason=sample.finish_reason,
    )


class Schedule:
    """Requests that wait, samples whose prompt is forwarded, and the rows that generate."""

    def __init__(
        self, slots: int, budget_tokens: int, chunk_tokens: int, prompts_tokens: int
    ) -> None:
        """`budget_tokens`: rows x longest row.

        Of prompts forwarded together no more than `chunk_tokens` are forwarded, padded, and `prompts_tokens` held.
        """
        self._slots = slots
        self._budget_tokens = budget_tokens
        self._chunk_tokens = chunk_tokens
        self._prompts_tokens = prompts_tokens
        self.waiting: deque[Request] = deque()
        self.ready: deque[Sample] = deque()
        self.rows: list[Sample] = []

    @property
    def longest(self) -> int:
        """Tokens reserved by the longest row."""
        return max((sample.reserved_tokens for sample in self.rows), default=0)

    def admit(self, known: "Callable[[array[int]], int]") -> list[Request]:
        """Take the requests whose prompts are forwarded now, together; none while no row would be free.

        `known` says how many tokens of a prompt need not be forwarded.
        """
        admitted: list[Request] = []
        free = self._slots - len(self.rows)
        while self.waiting and free > 0:
            request = self.waiting[0]
            if not request.ended and not self._joins(request, admitted, known):
                break
            self.waiting.popleft()
            if not request.ended:
                admitted.append(request)
                free -= len(request.samples)
        return admitted

    def begin(self) -> list[Sample]:
        """Give ready samples rows after those in use; return the new rows in order."""
        begun: list[Sample] = []
        while self.ready and len(self.rows) < self._slots:
            sample = self.ready[0]
            if not sample.ended and not self._fits(sample):
                break
            self.ready.popleft()
            if not sample.ended:
                self.rows.append(sample)
                begun.append(sample)
        return begun

    def ended_rows(self) -> list[int]:
        """In order, rows whose samples have ended by now; readers give up others at any moment."""
        return [row for row, sample in enumerate(self.rows) if sample.ended]

    def retire(self, ended_rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Take these rows out; yields `(source, target, tokens)` for each row to be moved into a hole."""
        for hole in reversed(ended_rows):
            last = self.rows.pop()
            if hole < len(self.rows):
                self.rows[hole] = last
                yield len(self.rows), hole, last.forwarded_tokens

    def clear(self) -> None:
        """Forget what waits; for when all of it has ended, and no row is left."""
        self.waiting.clear()
        self.ready.clear()

    def _joins(
        self, request: Request, admitted: Sequence[Request], known: "Callable[[array[int]], int]"
    ) -> bool:
        """Whether a prompt comes with others in one chunk; a long one comes alone, chunk by chunk."""
        prompts = [one.prompt_ids for one in (*admitted, request)]
        forwarded = len(prompts) * max(len(one) - known(one) for one in prompts)
        held = len(prompts) * (max(map(len, prompts)) + 1)  # one for what pads
        fits = forwarded <= self._chunk_tokens and held <= self._prompts_tokens
        return len(prompts) == 1 or fits

    def _fits(self, sample: Sample) -> bool:
        longest = max(self.longest, sample.reserved_tokens)
        return (len(self.rows) + 1) * longest <= self._budget_tokens
