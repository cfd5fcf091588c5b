"""The engine without a model, for tests and benchmarks: one token per UTF-8 byte, answers known beforehand.

It echoes the last user text, or what the job's script says, at the pace of the script; it fails
where the script says so. Under a guide it says the smallest value of the schema, or calls the first
tool with the smallest arguments. Log-probabilities are a fixed function of token and position.
"""

import asyncio
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Self

import msgspec

from protocols.codec import pack_numbers
from protocols.dialects.base import Script
from protocols.errors import EngineFailed
from protocols.job import Segment
from protocols.message import CallGuide, JsonGuide
from protocols.rollout_state import FinishReason, Logprobs, SampleParams, TokenIds
from worker.engines.base import (
    NO_OPTIONS,
    OPTIONS,
    Call,
    Counters,
    Markup,
    Memory,
    Template,
    Tokenizer,
    Turn,
    TurnTool,
    Weights,
)
from worker.engines.instance import smallest
from worker.engines.weight_files import find, verify
from worker.engines.weights import (
    after_offload,
    after_onload,
    busy,
    check_order,
    meanwhile,
    not_loaded,
    refusing,
)

END, SYSTEM, USER, ASSISTANT, CLOSE, TOOL = 256, 257, 258, 259, 260, 261
VOCABULARY = 262
CONTEXT_TOKENS = 131_072
CAPABILITIES = frozenset(
    {*SampleParams.__struct_fields__, "script", "offload", "update_weights"}
) - {"return_routed_experts"}
_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
_SPECIAL = {
    END: b"<|end|>",
    SYSTEM: b"<|system|>",
    USER: b"<|user|>",
    ASSISTANT: b"<|assistant|>",
    CLOSE: b"<|close|>",
    TOOL: b"<|tool|>",
}
_BY_NAME = {name.decode(): token_id for token_id, name in _SPECIAL.items()}
_PIECES = [_SPECIAL.get(token_id) or bytes((token_id,)) for token_id in range(VOCABULARY)]
_LOGPROBS = [-(step + 1) / 32 for step in range(64)]
_MARK = re.compile(f"({'|'.join(map(re.escape, _BY_NAME))})")


class ByteTokenizer:
    """Bytes are tokens; six special ones mark turns and the end."""

    longest_token_bytes = 1
    special_ids = frozenset(_SPECIAL)
    markup = Markup(thinking=("<think>", "</think>"), call=("<tool_call>", "</tool_call>"))
    template = Template(tools=True, late_system=True, options=frozenset(OPTIONS))

    def encode(self, text: str) -> TokenIds:
        """One token per byte."""
        return _bytes_as_ids(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Bytes as UTF-8; special tokens as their names, or left out."""
        if max(ids, default=0) < END:
            # of its items: the bytes of an array itself are its memory
            return bytes(iter(ids)).decode(errors="replace")
        kept = (i for i in ids if i < END or not skip_special_tokens)
        return b"".join(self.token_bytes(i) for i in kept).decode(errors="replace")

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[TurnTool] = (),
        options: Mapping[str, bool | str] = NO_OPTIONS,
    ) -> TokenIds:
        """Each turn between its role's mark and a closing one; tools as JSON in a system turn of their own.

        `options` change nothing: it thinks where its script does.
        """
        ids = TokenIds()
        for turn in _all(turns, tools):
            ids.append(_ROLES[turn["role"]])
            ids.extend(_bytes_as_ids(_written(turn).encode()))
            ids.append(CLOSE)
        ids.append(ASSISTANT)
        return ids

    def write(
        self,
        turns: Sequence[Turn],
        tools: Sequence[TurnTool] = (),
        options: Mapping[str, bool | str] = NO_OPTIONS,
        *,
        opens: bool = True,
    ) -> str:
        """The text that `encode_written` makes the tokens of `render` of; `opens`: up to where the assistant speaks."""
        told = [f"<|{turn['role']}|>{_written(turn)}<|close|>" for turn in _all(turns, tools)]
        return "".join(told) + ("<|assistant|>" if opens else "")

    def encode_written(self, text: str) -> TokenIds:
        """Like `encode`, but names of special tokens are these."""
        ids = TokenIds()
        for part in _MARK.split(text):
            ids.extend([_BY_NAME[part]] if part in _BY_NAME else part.encode())
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The byte, or the special token's name."""
        return _PIECES[token_id]


class ScriptedEngine:
    """See the module."""

    def __init__(self, *, policy_version: int = 0) -> None:
        self.name = self.model = "scripted"
        self.tokenizer: Tokenizer = ByteTokenizer()
        self.context_tokens = CONTEXT_TOKENS
        self.vocabulary = VOCABULARY
        self.capabilities = CAPABILITIES
        self.policy_version = self._first_version = policy_version
        self.memory: Memory = "loaded"
        self.running_samples = 0
        self.generated_tokens = 0

    async def start(self) -> None:
        """Nothing to load."""

    async def close(self) -> None:
        """Nothing to free."""

    async def breakdown(self) -> EngineFailed:
        """Never: there is nothing that could break."""
        return await asyncio.get_running_loop().create_future()

    def generate(self, call: Call) -> "ScriptedGeneration":
        """Begin a call; it never waits for a slot."""
        if self.memory != "loaded":
            raise not_loaded(self.memory)
        return ScriptedGeneration(self, call)

    async def update_weights(self, weights: Weights) -> None:
        """Take the version of a file that exists and has its checksum; there are no weights to be read."""
        with refusing(weights.version, meanwhile(self.memory, self.policy_version)):
            check_order(weights, self.memory, self._first_version)
            if weights.path is not None:
                await asyncio.to_thread(_look_at, weights.path, weights.sha256)
        self._refuse_if_busy()
        self.policy_version, self.memory = weights.version, "loaded"

    async def offload(self, level: int) -> None:
        """Only say so; see `Engine`."""
        self._move(after_offload(self.memory, level))

    async def onload(self) -> None:
        """Only say so; see `Engine`."""
        self._move(after_onload(self.memory))

    def counters(self) -> Counters:
        """What runs and what was drawn."""
        return Counters(
            running_samples=self.running_samples,
            waiting_samples=0,
            forwarded_tokens=0,
            generated_tokens=self.generated_tokens,
        )

    def _move(self, memory: Memory) -> None:
        if memory != self.memory:
            self._refuse_if_busy()
            self.memory = memory

    def _refuse_if_busy(self) -> None:
        if self.running_samples:
            raise busy(self.running_samples)


class ScriptedGeneration:
    """One call: every sample says the same, token by token, when each is due."""

    def __init__(self, engine: ScriptedEngine, call: Call) -> None:
        self._engine, self._params = engine, call.params
        self._script = call.script or Script()
        most = call.params.max_tokens or CONTEXT_TOKENS
        answer = _answer(call, engine.tokenizer.markup, most)
        self._ids = TokenIds(answer[:most])
        if most > len(answer):
            self._ids.append(END)
        self._reason: FinishReason = "stop" if most > len(answer) else "length"
        kept = [len(ids) for ids in call.kept] or [0] * call.params.n
        self._drawn = {i: drawn for i, drawn in enumerate(kept) if i not in call.ended}
        """Tokens drawn so far of each sample that has not ended."""
        self._pausing: asyncio.Event | None = None
        self._turn: Iterator[int] | None = None
        self._due_tokens = 0
        self._paced_s = asyncio.get_running_loop().time()
        engine.running_samples += len(self._drawn)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Segment:
        while True:
            for index in self._turn or ():
                segment = self._next(index)
                if segment is not None:
                    return segment
            if self._turn is not None:
                self._break_if_told()
            if not self._drawn:
                raise StopAsyncIteration
            self._due_tokens = await self._due()
            self._turn = iter(list(self._drawn))

    def _next(self, index: int) -> Segment | None:
        """What is due of a sample; None where nothing is, or it has ended."""
        start = self._drawn.get(index)
        if start is None:
            return None
        end = min(start + self._due_tokens, self._end(start))
        if end == start < len(self._ids):
            return None
        self._drawn[index] = end
        if end == len(self._ids):
            self.stop(index)
        return self._segment(index, start, end)

    def stop(self, index: int) -> None:
        """End one sample."""
        if self._drawn.pop(index, None) is not None:
            self._engine.running_samples -= 1
            if self._pausing is not None:
                self._pausing.set()

    def close(self) -> None:
        """End all."""
        for index in list(self._drawn):
            self.stop(index)

    def _end(self, drawn: int) -> int:
        """How far a sample may come: not past a failure."""
        if self._script.fail is None:
            return len(self._ids)
        return min(len(self._ids), max(self._script.at_token, drawn))

    def _segment(self, index: int, start: int, end: int) -> Segment:
        ids = TokenIds(self._ids[start:end])
        self._engine.generated_tokens += len(ids)
        ranks = range(self._params.top_logprobs)
        logprobs = [_LOGPROBS[(i * 31 + at * 17) % 64] for at, i in enumerate(ids, start)]
        return Segment(
            index=index,
            start=start,
            token_ids=ids,
            logprobs=Logprobs(logprobs),
            top_ids=TokenIds([(i + k) % VOCABULARY for i, k in product(ids, ranks)]),
            top_logprobs=Logprobs([logprob - k for logprob, k in product(logprobs, ranks)]),
            policy_version=self._engine.policy_version,
            finish_reason=self._reason if end == len(self._ids) else None,
        )

    async def _due(self) -> int:
        """How many more tokens of each sample are due; waits for the next one."""
        pace_s = self._script.ms_per_token / 1000
        fails, whole = self._script.fail is not None, len(self._ids)
        if fails and all(self._end(drawn) == drawn < whole for drawn in self._drawn.values()):
            await self._pause(None if self._script.fail == "hang" else 0)
            return 0
        if pace_s == 0:
            return len(self._ids)
        loop = asyncio.get_running_loop()
        await self._pause(self._paced_s + pace_s - loop.time())
        due = max(1, int((loop.time() - self._paced_s) / pace_s))
        self._paced_s += due * pace_s
        return due

    async def _pause(self, seconds: float | None) -> None:
        """Sleep, unless a sample is ended from outside."""
        self._pausing = asyncio.Event()
        try:
            async with asyncio.timeout(seconds):
                await self._pausing.wait()
        except TimeoutError:
            return

    def _break_if_told(self) -> None:
        """Fail once a sample has come to the token that the script names."""
        if self._script.fail is None:
            return
        if not any(drawn >= self._script.at_token for drawn in self._drawn.values()):
            return
        if self._script.fail == "error":
            raise EngineFailed(f"the script fails at token {self._script.at_token}")
        if self._script.fail == "crash":
            os.kill(os.getpid(), signal.SIGKILL)


def _all(turns: Sequence[Turn], tools: Sequence[TurnTool]) -> list[Turn]:
    return [Turn(role="system", content=_json(tools)), *turns] if tools else [*turns]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _written(turn: Turn) -> str:
    thinking = turn.get("reasoning_content")
    parts = [f"<think>{thinking}</think>"] if thinking else []
    calls = [_json(call["function"]) for call in turn.get("tool_calls", [])]
    return "".join([*parts, turn["content"], *(f"<tool_call>{call}</tool_call>" for call in calls)])


def _look_at(path: str, sha256: str | None) -> None:
    verify(find(path), sha256)


def _answer(call: Call, markup: Markup, most: int) -> bytes:
    """What the script says; else what the guide wants; else the last user text, of which `most` bytes are enough."""
    guide = call.params.guide
    if call.script is not None and call.script.text is not None:
        return call.script.text.encode()
    match guide:
        case JsonGuide():
            return smallest(guide.schema).encode()
        case CallGuide():
            opens, closes = markup.call or ("", "")
            tool = guide.tools[0]
            called = {
                "name": tool.name,
                "arguments": msgspec.Raw(smallest(tool.parameters).encode()),
            }
            return f"{opens}\n{_json(called)}\n{closes}".encode()
        case None:
            return _echo(call.prompt_ids, most)


def _echo(prompt_ids: TokenIds, most: int) -> bytes:
    """The first bytes of the prompt's last user turn, or all of a prompt that has no turns."""
    raw = pack_numbers(prompt_ids)
    at = raw.rfind(
        1
    )  # of an id's four bytes the second is 1 in special tokens, else 0; the last two are 0
    while at >= 0 and raw[at - 1] != USER & 255:
        at = raw.rfind(1, 0, at)
    if at < 0:
        return bytes(i for i in prompt_ids if i < END)
    said = raw[at + 3 : at + 3 + 4 * most]
    low, high = said[::4], said[1::4]
    return low[: high.index(1)] if 1 in high else low


def _bytes_as_ids(text: bytes) -> TokenIds:
    """One token per byte."""
    return TokenIds.from_bytes(text.decode("latin-1").encode("utf-32-le"))
