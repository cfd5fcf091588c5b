"""One token for every row of a step, from that row's logits alone.

The order is Hugging Face's: bias, penalties, minimum length, what a guide allows, temperature, top-k, top-p. What is
left is drawn by a race:
the token with the greatest `probability / noise` wins, and the noise belongs to (seed, position, token). A race hardly
feels the last bits of the logits, which depend on what else is in the batch; one number searched for in the summed
probabilities would (on SmolLM2 in float32 about one token in a thousand changed, and none of 16,000 in a race).

Log-probabilities are the raw policy's: before everything above.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from protocols.rollout_state import SampleParams
from worker.engines.guide import Matcher, masked, words_of

from . import noise

GREEDY_BELOW = 1e-5
"""Temperatures that take the likeliest token: dividing by less overflows float32."""
NUCLEUS_FIRST_LOOK = 1024
"""Likeliest tokens in which a top-p nucleus is looked for, before the whole vocabulary is sorted."""


class Drawn(msgspec.Struct, frozen=True):
    """A step's tokens, one a row."""

    token_ids: list[int]
    logprobs: list[float]
    top_ids: list[list[int]]
    """Likeliest first, as many as the row asked for."""
    top_logprobs: list[list[float]]


class Draws:
    """What one sample's next token depends on beside its logits."""

    def __init__(
        self,
        params: SampleParams,
        seed: int,
        prompt_ids: Sequence[int],
        stop_ids: frozenset[int],
        kept: Sequence[int] = (),
    ) -> None:
        """`stop_ids` end the sample and are not drawn before `params.min_tokens`; `kept` is the response so far."""
        self.params = params
        self.stop_ids = stop_ids
        self.kept = kept
        self.tokens = len(kept)
        """Tokens of the response so far."""
        self.matcher: Matcher | None = None
        """What a guide allows, behind `kept`; it minds `params.min_tokens` itself."""
        self._seed = seed
        self._prompt_ids = prompt_ids
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None

    @property
    def noise_key(self) -> int:
        """Of the next token: its position counts from the prompt's start."""
        return noise.key(self._seed, len(self._prompt_ids) + self.tokens)

    @property
    def counting(self) -> bool:
        """Whether presence or frequency of a token matters."""
        return bool(self.params.presence_penalty or self.params.frequency_penalty)

    @property
    def repeating(self) -> bool:
        """Whether it matters which tokens came before, the prompt's included."""
        return self.params.repetition_penalty != 1

    @property
    def short(self) -> bool:
        """Whether it must not end yet."""
        early = self.tokens < self.params.min_tokens
        return early and bool(self.stop_ids) and self.matcher is None

    def seen(self, like: Tensor) -> Tensor:
        """Whether prompt or response has a token: bool `[vocabulary]`; `like` is a row of logits."""
        if self._seen is None:
            ids = torch.tensor([*self._prompt_ids, *self.kept], device=like.device)
            self._seen = torch.zeros_like(like, dtype=torch.bool).index_fill_(0, ids, value=True)
        return self._seen

    def counts(self, like: Tensor) -> Tensor:
        """How often the response has a token: float32 `[vocabulary]`; `like` is a row of logits."""
        if self._counts is None:
            ids = torch.tensor(list(self.kept), dtype=torch.long, device=like.device)
            self._counts = torch.bincount(ids, minlength=len(like)).to(like)
        return self._counts

    def observe(self, token_id: int) -> None:
        """Take note of the token drawn."""
        self.tokens += 1
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1
        if self.matcher is not None:
            self.matcher.advance(token_id)


def draw(logits: Tensor, rows: Sequence[Draws]) -> Drawn:
    """Draw one token a row from float32 `logits` `[rows, vocabulary]`, and tell the rows.

    Where logits are no numbers, the token's log-probability is none either.
    """
    tokens = _chosen(adjusted(logits, rows), rows)
    normaliser = logits.logsumexp(-1, keepdim=True)
    logprobs = logits.gather(-1, tokens[:, None]) - normaliser
    top_ids, top_logprobs = _top(logits, normaliser, rows)
    token_ids: list[int] = _listed(tokens)
    for row, token_id in zip(rows, token_ids, strict=True):
        row.observe(token_id)
    return Drawn(token_ids, _listed(logprobs[:, 0]), top_ids, top_logprobs)


def _where(rows: Sequence[Draws], wanted: Callable[[Draws], bool]) -> list[int]:
    return [i for i, row in enumerate(rows) if wanted(row)]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def adjusted(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Logits after bias, penalties, minimum length and guides; the tensor itself where no row asks for any."""
    biased = _where(rows, lambda row: bool(row.params.logit_bias))
    repeating = _where(rows, lambda row: row.repeating)
    counting = _where(rows, lambda row: row.counting)
    short = _where(rows, lambda row: row.short)
    guided = _where(rows, lambda row: row.matcher is not None)
    if not (biased or repeating or counting or short or guided):
        return logits
    changed = logits.clone()
    if biased:
        _add_bias(changed, rows)
    if repeating:
        chosen = [rows[i] for i in repeating]
        changed[repeating] = _without_repetition(changed[repeating], chosen)
    if counting:
        chosen = [rows[i] for i in counting]
        changed[counting] = _without_frequency(changed[counting], chosen)
    for i in short:
        changed[i, [one for one in rows[i].stop_ids if 0 <= one < logits.shape[-1]]] = -torch.inf
    if guided:
        changed[guided] = _guided(changed[guided], [rows[i] for i in guided])
    return changed


def _chosen(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    """The token of each row: int64 `[rows]`."""
    random = _where(rows, lambda row: row.params.temperature >= GREEDY_BELOW)
    if len(random) == len(rows):
        return _race(logits, rows)
    tokens = logits.argmax(-1)
    if random:
        tokens[random] = _race(logits[random], [rows[i] for i in random])
    return tokens


def _add_bias(logits: Tensor, rows: Sequence[Draws]) -> None:
    """In place."""
    added = [(i, *one) for i, row in enumerate(rows) for one in row.params.logit_bias]
    lines, ids, values = (
        torch.tensor(one, device=logits.device) for one in zip(*added, strict=True)
    )
    logits.index_put_((lines, ids), values.to(logits.dtype), accumulate=True)


def _guided(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    words = torch.empty(len(rows), words_of(logits.shape[-1]), dtype=torch.int32)
    for row, line in zip(rows, words, strict=True):
        if row.matcher is not None:
            row.matcher.fill(line)
    return masked(logits, words)


def _without_repetition(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    seen = torch.stack([row.seen(line) for row, line in zip(rows, logits, strict=True)])
    penalty = _column([row.params.repetition_penalty for row in rows], logits)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _without_frequency(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    counts = torch.stack([row.counts(line) for row, line in zip(rows, logits, strict=True)])
    presence = _column([row.params.presence_penalty for row in rows], logits)
    frequency = _column([row.params.frequency_penalty for row in rows], logits)
    return logits - presence * (counts > 0) - frequency * counts


def _race(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    """The winner of each row: int64 `[rows]`."""
    scaled = logits / _column([row.params.temperature for row in rows], logits)
    vocabulary = scaled.shape[-1]
    limited = _where(rows, lambda row: 0 < row.params.top_k < vocabulary or row.params.top_p < 1)
    if limited:
        scaled[limited] = truncated(scaled[limited], [rows[i] for i in limited])
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    keys = [row.noise_key for row in rows]
    return (weights / noise.exponential(keys, weights.shape[-1], weights.device)).argmax(-1)


def truncated(scaled: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Logits with everything outside top-k and top-p at -inf; tokens as likely as the last one kept stay."""
    vocabulary = scaled.shape[-1]
    limits = [row.params.top_k if 0 < row.params.top_k < vocabulary else vocabulary for row in rows]
    look = max((limit for limit in limits if limit < vocabulary), default=1)
    if any(row.params.top_p < 1 for row in rows):
        look = max(look, min(NUCLEUS_FIRST_LOOK, vocabulary))
    threshold, found = _thresholds(scaled, rows, limits, look)
    if not found:
        threshold, _ = _thresholds(scaled, rows, limits, vocabulary)
    return scaled.masked_fill(scaled < threshold, -torch.inf)


def _thresholds(
    scaled: Tensor, rows: Sequence[Draws], limits: Sequence[int], look: int
) -> tuple[Tensor, bool]:
    """The least logit that each row keeps, `[rows, 1]`, and whether `look` tokens were enough to find them all."""
    best = scaled.topk(look, -1).values
    limit = torch.tensor(limits, device=scaled.device)[:, None]
    inside = torch.arange(look, device=scaled.device) < limit
    cut = best.masked_fill(~inside, -torch.inf).logsumexp(-1, keepdim=True)
    whole = scaled.logsumexp(-1, keepdim=True)
    mass = (best - torch.where(limit <= look, cut, whole)).exp()
    before = mass.cumsum(-1) - mass
    # 2: the summed mass may round up to 1 before the last token
    top_p = _column([row.params.top_p if row.params.top_p < 1 else 2 for row in rows], scaled)
    kept = (inside & (before < top_p)).sum(-1, keepdim=True).clamp_(min=1)
    found = (kept < look) | (limit <= look)
    return best.gather(-1, kept - 1), bool(found.all())


def _top(
    logits: Tensor, normaliser: Tensor, rows: Sequence[Draws]
) -> tuple[list[list[int]], list[list[float]]]:
    wanted = [min(row.params.top_logprobs, logits.shape[-1]) for row in rows]
    most = max(wanted)
    if not most:
        return [[] for _ in rows], [[] for _ in rows]
    values, ids = (logits - normaliser).topk(most, -1)
    top_ids: list[list[int]] = _listed(ids)
    top_logprobs: list[list[float]] = _listed(values)
    return (
        [line[:count] for line, count in zip(top_ids, wanted, strict=True)],
        [line[:count] for line, count in zip(top_logprobs, wanted, strict=True)],
    )


def _listed(tensor: Tensor) -> list[Any]:
    items: Any = tensor
    return items.tolist()
