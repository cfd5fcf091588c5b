"""Constrained decoding: which tokens may come next, so that a response becomes what its guide says.

llguidance compiles the grammar and walks the vocabulary; here is what an engine needs of it. Grammars are compiled
beside the event loop, and the last ones kept. One `Matcher` follows one sample.
"""

import asyncio
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from protocols.errors import EngineFailed, InvalidRequest, RolloutError, UnsupportedOption
from protocols.message import Guide
from worker.engines.base import Call, Tokenizer

from .grammar import Thinking, field_of, grammar_of
from .opening import opening_of

MOST_KEPT = 32
"""Compiled grammars."""
AT_ONCE = 2
"""Threads that compile."""
_PLACE = re.compile(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?")
_GRAMMAR = re.compile(r"\n *1 \| |\n<")
_QUIET = 0


class Matcher:
    """How far one sample has come in its grammar, and what may follow."""

    def __init__(
        self, inner: LLMatcher, field: str, stop_ids: Collection[int], min_tokens: int
    ) -> None:
        """At the start. `stop_ids` end the sample; before `min_tokens` only where nothing else may come."""
        self.failure: RolloutError | None = None
        """Why it can say no more; set while it is asked."""
        self._inner = inner
        self._field = field
        self._stop_ids = frozenset(stop_ids)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the sample has its last token."""
        return self._ended

    def advance(self, token_id: int) -> None:
        """Take note of the next token."""
        self._tokens += 1
        self._ended = self._ended or token_id in self._stop_ids
        if not self._ended and not self._inner.consume_token(token_id):
            self._fail()

    def fill(self, words: Tensor) -> None:
        """Write which tokens may come next: token i is bit `i % 32` of word `i // 32`.

        `words` is int32 `[words_of(vocabulary)]` on the CPU. After the sample's end any token may come, and none after
        a failure.
        """
        if self._ended:
            words.fill_(-1)
            return
        self._inner.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * 4)
        if self._inner.is_error() or not words.any():
            self._fail()
        if self.failure is not None:
            words.zero_()
        elif self._tokens < self._min_tokens:
            going_on = words & self._others(words)
            if going_on.any():
                words.copy_(going_on)

    def _others(self, words: Tensor) -> Tensor:
        """All tokens but those that end a sample."""
        bits = torch.ones(len(words) * 32, dtype=torch.bool)
        bits[[one for one in self._stop_ids if one < len(bits)]] = False
        places = torch.ones(32, dtype=torch.int32) << torch.arange(32, dtype=torch.int32)
        return (bits.view(-1, 32) * places).sum(-1, dtype=torch.int32)

    def _fail(self) -> None:
        self.failure = self.failure or InvalidRequest(
            f"`{self._field}`: the schema became too complex to follow after {self._tokens} tokens "
            f"({_said(self._inner.get_error())}); make it simpler",
            param=self._field,
        )


class Guides:
    """Grammars over one model's vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_ids: Collection[int]) -> None:
        """`vocabulary`: the width of the logits; `stop_ids`: the model's own, which alone end a grammar."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._stop_ids = sorted(one for one in stop_ids if 0 <= one < vocabulary)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._one = threading.Lock()
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def matcher(self, call: Call, index: int) -> Matcher:
        """For one sample of a guided call, behind what was kept of it.

        Raises InvalidRequest naming `response_format` or `tools` for a guide that cannot be followed.
        """
        async with self._turns:
            return await asyncio.to_thread(self._matcher, call, index)

    def _matcher(self, call: Call, index: int) -> Matcher:
        params = call.params
        if params.guide is None:
            raise AssertionError("the call has no guide")
        kept = call.kept[index] if call.kept else ()
        matcher = Matcher(
            self._fresh(params.guide, call.prompt_ids),
            field_of(params.guide),
            {*self._stop_ids, *params.stop_token_ids},
            params.min_tokens,
        )
        for token_id in kept:
            matcher.advance(token_id)
        if matcher.failure is not None:
            raise EngineFailed(
                "the tokens of an earlier attempt do not follow the job's guide; was its worker another version?"
            )
        return matcher

    def _fresh(self, guide: Guide, prompt_ids: Sequence[int]) -> LLMatcher:
        text = grammar_of(guide, self._tokenizer.markup, self._thinking(prompt_ids))
        with self._one:
            found = self._compiled.get(text)
            if found is not None:
                self._compiled.move_to_end(text)
                return found.deep_copy()
        made = self._compile(text, field_of(guide))
        with self._one:
            self._compiled[text] = made
            while len(self._compiled) > MOST_KEPT:
                self._compiled.popitem(last=False)
            return made.deep_copy()

    def _compile(self, text: str, field: str) -> LLMatcher:
        if not self._stop_ids:
            raise UnsupportedOption(
                f"`{field}`: this model names no token that ends a response, so none can be guided",
                param=field,
            )
        grammar = LLMatcher.grammar_from_lark(text)
        limits = LLParserLimits(verbose_errors=False)
        made = LLMatcher(self._walkable, grammar, log_level=_QUIET, limits=limits)
        if made.is_error():
            raise InvalidRequest(
                f"`{field}`: the schema cannot be followed: {_said(made.get_error())}", param=field
            )
        return made

    def _thinking(self, prompt_ids: Sequence[int]) -> Thinking:
        match opening_of(prompt_ids, self._tokenizer):
            case "opened":
                return "open"
            case "closed":
                return "none"
            case "unsaid":
                return "may" if self._thinks else "none"

    @cached_property
    def _thinks(self) -> bool:
        """Whether the model has a token that opens its thinking; others would be led into it by chance."""
        opens, _ = self._tokenizer.markup.thinking or ("", "")
        mark = opens.strip().encode()
        token_bytes = self._tokenizer.token_bytes
        return bool(mark) and any(token_bytes(i) == mark for i in range(self._vocabulary))

    @cached_property
    def _walkable(self) -> LLTokenizer:
        wrapped = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocabulary, self._stop_ids))
        return LLTokenizer(wrapped, n_vocab=self._vocabulary, eos_token=self._stop_ids)


class _Vocabulary:
    """A vocabulary by the names that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_ids: Sequence[int]) -> None:
        markup = tokenizer.markup
        written = {
            one.strip().encode() for pair in (markup.thinking, markup.call) for one in pair or ()
        }
        self._tokenizer = tokenizer
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocabulary)]
        # what is special cannot be spelled by text; the model's own markup must be
        special = [one for one in tokenizer.special_ids if one < vocabulary]
        self.special_token_ids = sorted(
            {*stop_ids, *(one for one in special if self.tokens[one] not in written)}
        )

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError
        return list(self._tokenizer.encode(text))


def words_of(vocabulary: int) -> int:
    """How many words of 32 bits hold one bit a token."""
    return (vocabulary + 31) // 32


def masked(logits: Tensor, words: Tensor) -> Tensor:
    """Logits `[rows, vocabulary]`, those of tokens that may not come at -inf; `words` as `Matcher.fill` writes them."""
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits = (words.to(logits.device)[:, :, None] >> places) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[-1]] == 0, -torch.inf)


def _said(error: str) -> str:
    """What llguidance says, without its line of the grammar."""
    said = " ".join(_GRAMMAR.split(_PLACE.sub("", error))[0].split())
    return said[:200] or "no token may follow"
