"""The scripted engine: what a job's script says is what happens, at its pace."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from protocols.dialects.base import Script
from protocols.errors import EngineFailed, InvalidRequest
from protocols.job import Segment
from protocols.message import CallGuide, Guide, JsonGuide, Tool
from protocols.rollout_state import SampleParams, TokenIds
from worker.engines.base import Call
from worker.engines.scripted import (
    ASSISTANT,
    CLOSE,
    END,
    USER,
    VOCABULARY,
    ByteTokenizer,
    ScriptedEngine,
)

TOKENIZER = ByteTokenizer()
PROMPT = TOKENIZER.render(
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "last äß"},
    ]
)


def call(
    script: Script | None = None, *, n: int = 1, max_tokens: int = 1000, top_logprobs: int = 0
) -> Call:
    params = SampleParams(n=n, max_tokens=max_tokens, top_logprobs=top_logprobs, sampling_seed=1)
    return Call(prompt_ids=PROMPT, params=params, script=script)


async def drawn(engine: ScriptedEngine, wanted: Call) -> dict[int, list[Segment]]:
    found: dict[int, list[Segment]] = {i: [] for i in range(wanted.params.n)}
    async for segment in engine.generate(wanted):
        found[segment.index].append(segment)
    return found


def ids_of(segments: list[Segment]) -> list[int]:
    return [token_id for segment in segments for token_id in segment.token_ids]


async def test_without_a_script_it_echoes_the_last_user_turn() -> None:
    (segments,) = (await drawn(ScriptedEngine(), call())).values()
    assert ids_of(segments) == [*"last äß".encode(), END]
    assert segments[-1].finish_reason == "stop"


async def test_a_prompt_without_turns_is_echoed_whole() -> None:
    wanted = Call(
        prompt_ids=TokenIds([*b"plain", END]), params=SampleParams(max_tokens=50, sampling_seed=0)
    )
    (segments,) = (await drawn(ScriptedEngine(), wanted)).values()
    assert ids_of(segments) == [*b"plain", END]


ODD = bytes((1, 1, 0, 1, 2, 1))
"""Bytes that, as ids, look most like the mark of a user's turn."""


@pytest.mark.parametrize("most", [1, len(ODD), len(ODD) + 1, 1000])
@pytest.mark.parametrize("after", [(), (CLOSE, ASSISTANT), (CLOSE, ASSISTANT, *ODD)])
async def test_an_echo_is_whole_or_cut_whatever_its_bytes(
    after: tuple[int, ...], most: int
) -> None:
    prompt_ids = TokenIds([*ODD, USER, *b"first", CLOSE, USER, *ODD, *after])
    wanted = Call(prompt_ids, SampleParams(max_tokens=most, sampling_seed=0))
    (segments,) = (await drawn(ScriptedEngine(), wanted)).values()
    assert ids_of(segments) == [*ODD, END][:most]
    assert segments[-1].finish_reason == ("length" if most <= len(ODD) else "stop")


@pytest.mark.parametrize(
    ("max_tokens", "said", "reason"),
    [(2, b"ab", "length"), (3, b"abc", "length"), (4, b"abc", "stop"), (9, b"abc", "stop")],
)
async def test_max_tokens_cuts_and_the_end_counts(
    max_tokens: int, said: bytes, reason: str
) -> None:
    wanted = call(Script(text="abc"), max_tokens=max_tokens)
    (segments,) = (await drawn(ScriptedEngine(), wanted)).values()
    assert ids_of(segments) == [*said, *([END] if reason == "stop" else [])]
    assert segments[-1].finish_reason == reason


async def test_every_sample_says_the_same_with_its_own_segments() -> None:
    engine = ScriptedEngine(policy_version=4)
    found = await drawn(engine, call(Script(text="abc"), n=3, top_logprobs=2))
    assert {tuple(ids_of(segments)) for segments in found.values()} == {(*b"abc", END)}
    for segments in found.values():
        for segment in segments:
            count = len(segment.token_ids)
            assert len(segment.logprobs) == count
            assert len(segment.top_ids) == len(segment.top_logprobs) == 2 * count
            assert all(token_id < VOCABULARY for token_id in segment.top_ids)
            assert segment.policy_version == 4
    assert engine.counters()["generated_tokens"] == 12
    assert engine.counters()["running_samples"] == 0


async def test_starts_are_positions_and_logprobs_do_not_depend_on_the_pace() -> None:
    slow = (await drawn(ScriptedEngine(), call(Script(text="abcdef", ms_per_token=2))))[0]
    fast = (await drawn(ScriptedEngine(), call(Script(text="abcdef"))))[0]
    at = 0
    for segment in slow:
        assert segment.start == at
        at += len(segment.token_ids)
    assert len(slow) > len(fast) == 1
    assert ids_of(slow) == ids_of(fast)
    values = [value for segment in slow for value in segment.logprobs]
    assert values == fast[0].logprobs.tolist()


async def test_the_pace_is_kept() -> None:
    begun_s = time.monotonic()
    await drawn(ScriptedEngine(), call(Script(text="abcde", ms_per_token=20)))
    assert time.monotonic() - begun_s >= 0.11


@pytest.mark.parametrize("at_token", [0, 2, 3])
@pytest.mark.parametrize("ms_per_token", [0, 1])
async def test_an_error_comes_at_its_token(at_token: int, ms_per_token: float) -> None:
    script = Script(text="abcdef", fail="error", at_token=at_token, ms_per_token=ms_per_token)
    seen: list[int] = []

    async def read() -> None:
        async for segment in ScriptedEngine().generate(call(script)):
            seen.extend(segment.token_ids)

    with pytest.raises(EngineFailed, match=f"at token {at_token}"):
        await read()
    assert seen == list(b"abcdef"[:at_token])


async def test_a_failure_after_the_end_never_comes() -> None:
    (segments,) = (
        await drawn(ScriptedEngine(), call(Script(text="ab", fail="error", at_token=9)))
    ).values()
    assert segments[-1].finish_reason == "stop"


async def test_a_hanging_job_leaves_the_event_loop_alone_and_can_be_closed() -> None:
    engine = ScriptedEngine()
    generation = engine.generate(call(Script(text="abcdef", fail="hang", at_token=2), n=2))
    seen: list[Segment] = []

    async def read() -> None:
        seen.extend([segment async for segment in generation])

    reading = asyncio.create_task(read())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not reading.done()
    assert engine.counters()["running_samples"] == 2
    generation.stop(0)
    await asyncio.sleep(0.01)
    assert not reading.done()
    generation.close()
    async with asyncio.timeout(5):
        await reading
    assert {index: ids_of([s for s in seen if s.index == index]) for index in (0, 1)} == {
        0: list(b"ab"),
        1: list(b"ab"),
    }
    assert engine.counters()["running_samples"] == 0


async def test_a_stopped_sample_says_no_more_and_the_others_go_on() -> None:
    engine = ScriptedEngine()
    generation = engine.generate(call(Script(text="abcdef", ms_per_token=100), n=2))
    said: dict[int, list[int]] = {0: [], 1: []}
    async for segment in generation:
        said[segment.index] += segment.token_ids
        if segment.index == 0:
            generation.stop(0)
    assert len(said[0]) < len(said[1])
    assert said[1] == [*b"abcdef", END]
    assert engine.counters()["running_samples"] == 0


async def test_closing_again_does_no_harm() -> None:
    engine = ScriptedEngine()
    generation = engine.generate(call(n=3))
    generation.close()
    generation.close()
    assert [segment async for segment in generation] == []
    assert engine.counters()["running_samples"] == 0


def test_a_crash_kills_the_process() -> None:
    program = """
import asyncio
from protocols.dialects.base import Script
from protocols.rollout_state import SampleParams, TokenIds
from worker.engines.base import Call
from worker.engines.scripted import ScriptedEngine
async def main():
    script = Script(text="abc", fail="crash", at_token=1)
    params = SampleParams(max_tokens=9, sampling_seed=0)
    async for _ in ScriptedEngine().generate(Call(TokenIds(b"x"), params, script)):
        pass
asyncio.run(main())
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False)
    assert done.returncode == -9


@pytest.mark.parametrize("text", ["", "plain", "Grüße 世界 🙂", "\x00\x7f"])
def test_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert TOKENIZER.decode(ids.tolist(), skip_special_tokens=True) == text
    assert b"".join(TOKENIZER.token_bytes(token_id) for token_id in ids) == text.encode()


def test_special_tokens_have_names() -> None:
    ids = TokenIds([*b"hi", END])
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "hi"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "hi<|end|>"


def guided(guide: Guide, script: Script | None = None) -> Call:
    return msgspec.structs.replace(
        call(script), params=SampleParams(max_tokens=1000, sampling_seed=1, guide=guide)
    )


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        (JsonGuide('{"required":["a"],"properties":{"a":{"type":"integer"}}}'), '{"a":0}'),
        (
            CallGuide((Tool("look", parameters='{"type":"object"}'), Tool("other"))),
            '<tool_call>\n{"name":"look","arguments":{}}\n</tool_call>',
        ),
    ],
)
async def test_a_guide_is_obeyed_without_a_model(guide: Guide, said: str) -> None:
    (segments,) = (await drawn(ScriptedEngine(), guided(guide))).values()
    assert ids_of(segments) == [*said.encode(), END]


async def test_a_scripts_text_wins_over_a_guide() -> None:
    wanted = guided(JsonGuide(), Script(text="no"))
    (segments,) = (await drawn(ScriptedEngine(), wanted)).values()
    assert ids_of(segments) == [*b"no", END]


def test_a_guide_that_allows_nothing_is_the_jobs_fault() -> None:
    with pytest.raises(InvalidRequest, match="allows nothing"):
        ScriptedEngine().generate(guided(JsonGuide('{"enum":[]}')))


def test_a_conversation_is_rendered_with_tools_thinking_calls_and_results() -> None:
    ids = TOKENIZER.render(
        [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": "so",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
                ],
            },
            {"role": "tool", "content": "done", "tool_call_id": "1", "name": "f"},
        ],
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        {"enable_thinking": True},
    )
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == (
        '<|system|>[{"type":"function","function":{"name":"f","parameters":{}}}]<|close|>'
        "<|user|>hi<|close|>"
        '<|assistant|><think>hm</think>so<tool_call>{"name":"f","arguments":{}}</tool_call><|close|>'
        "<|tool|>done<|close|><|assistant|>"
    )
