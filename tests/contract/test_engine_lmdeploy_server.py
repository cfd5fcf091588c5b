"""The engine `lmdeploy-server` against a server that speaks lmdeploy's wire and fails where it is told to."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr

from protocols.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineBusy,
    EngineFailed,
    InvalidRequest,
    RolloutError,
    WeightsRefused,
)
from protocols.rollout_state import TokenIds
from tests.lmdeploy_wire import END, VOCABULARY, LmdeployWire, lmdeploy_wire, logprob_of, token_at
from tests.tiny_model import save_tiny_model
from tests.torch_engine_calls import PROMPT, Said, call, drain, say
from worker.engines.base import Call, Weights
from worker.engines.lmdeploy_server.engine import LMDeployServerEngine
from worker.engines.lmdeploy_server.settings import Settings

SECRET = "sk-never-to-be-seen"
WAIT_S = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
async def wire() -> AsyncIterator[LmdeployWire]:
    async with lmdeploy_wire() as server:
        yield server


@asynccontextmanager
async def connected(
    wire: LmdeployWire, model: Path, **settings: object
) -> AsyncGenerator[LMDeployServerEngine]:
    usual = Settings(
        url=wire.url,
        model=str(model),
        start_limit_s=5,
        away_limit_s=5,
        first_token_limit_s=5,
        stall_limit_s=5,
        order_limit_s=5,
    )
    engine = LMDeployServerEngine(msgspec.structs.replace(usual, **settings))
    try:
        await engine.start()
        wire.bodies.clear()
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def engine(wire: LmdeployWire, model: Path) -> AsyncIterator[LMDeployServerEngine]:
    async with connected(wire, model) as started:
        yield started


def expected(count: int, start: int = len(PROMPT)) -> list[int]:
    return [token_at(start + at) for at in range(count)]


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110 - what it waits for is another task's plain state
            await asyncio.sleep(0.01)


async def broken(engine: LMDeployServerEngine) -> tuple[Said, RolloutError]:
    """What a call drew before it broke, and how."""
    said = Said()
    try:
        async for segment in engine.generate(call()):
            said.add(segment)
    except RolloutError as error:
        return said, error
    pytest.fail("it did not break")


async def test_every_token_comes_with_its_log_probability_and_version(
    wire: LmdeployWire, model: Path
) -> None:
    async with connected(wire, model, policy_version=7) as engine:
        (said,) = await say(engine, max_tokens=12)
    assert said.ids == expected(12)
    assert said.logprobs == pytest.approx([logprob_of(i) for i in said.ids])
    assert (said.finish_reason, set(said.versions)) == ("length", {7})


async def test_the_text_of_a_token_may_be_an_end_of_line(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    wire.text = "\u2028\u2029\x85\x0b\x0c\x1c\r\n"
    (said,) = await say(engine, max_tokens=3)
    assert said.ids == expected(3)


async def test_the_token_that_ends_an_answer_is_kept(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    wire.ends_at = len(PROMPT) + 4
    (said,) = await say(engine, max_tokens=12)
    assert said.ids == [*expected(4), END]
    assert said.finish_reason == "stop"


async def test_every_parameter_is_told(wire: LmdeployWire, engine: LMDeployServerEngine) -> None:
    await say(
        engine,
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        stop_token_ids=(9,),
    )
    (body,) = wire.bodies
    session_id = body.pop("session_id")
    assert 2**48 <= session_id < 2**53
    assert body == {
        "input_ids": list(PROMPT),
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.0,
        "stop_token_ids": [END, 9],
        "top_logprobs_num": 0,
        "min_p": 0.0,
        "repetition_ngram_size": 0,
        "repetition_ngram_threshold": 0,
        "ignore_eos": False,
        "return_logprob": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "stream": True,
    }


async def test_temperature_0_takes_the_likeliest_token(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    await say(engine, temperature=0.0, top_p=0.5, top_k=7)
    (body,) = wire.bodies
    told = [body[name] for name in ("temperature", "top_p", "top_k")]
    assert told == [1.0, 1.0, 1]


async def test_samples_are_requests_of_their_own(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    said = await say(engine, n=3, max_tokens=5)
    assert [one.ids for one in said] == [expected(5)] * 3
    assert len({body["session_id"] for body in wire.bodies}) == 3


async def test_alternatives_come_with_every_token(engine: LMDeployServerEngine) -> None:
    (segment, *rest) = [one async for one in engine.generate(call(max_tokens=1, top_logprobs=3))]
    assert [one.token_ids for one in rest] in ([], [TokenIds()])
    (token,) = segment.token_ids
    assert list(segment.top_ids) == [token, token + 1, token + 2]
    assert list(segment.top_logprobs) == pytest.approx([logprob_of(token) - k for k in range(3)])


async def test_a_call_goes_on_after_what_is_kept(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    kept = (TokenIds(expected(4)), TokenIds(expected(2)), TokenIds(expected(6)))
    asked = call(n=3, max_tokens=6)
    generation = engine.generate(Call(PROMPT, asked.params, kept=kept, ended=frozenset({1})))
    drawn: dict[int, list[int]] = {0: [], 2: []}
    starts: dict[int, int] = {}
    reasons: dict[int, str | None] = {}
    async for segment in generation:
        starts.setdefault(segment.index, segment.start)
        drawn[segment.index] += segment.token_ids
        reasons[segment.index] = segment.finish_reason
    assert drawn == {0: expected(6)[4:], 2: []}
    assert starts == {0: 4, 2: 6}
    assert reasons == {0: "length", 2: "length"}
    (body,) = wire.bodies
    assert (body["input_ids"], body["max_tokens"]) == ([*PROMPT, *kept[0]], 2)


async def test_a_stopped_sample_is_aborted_by_its_session_and_the_others_go_on(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    wire.pace_s = 0.01
    generation = engine.generate(call(n=2, max_tokens=60))
    ids: dict[int, list[int]] = {0: [], 1: []}
    async for segment in generation:
        ids[segment.index] += segment.token_ids
        if segment.index == 0:
            generation.stop(0)
    assert ids[1] == expected(60)
    assert len(ids[0]) < 30
    sessions = {body["session_id"] for body in wire.bodies}
    assert len(wire.aborted) == 1
    assert set(wire.aborted) < sessions
    assert wire.closed == []


async def test_the_server_s_word_of_an_abort_is_no_fault_of_the_other_samples(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    wire.pace_s, wire.abort_pause_s = 0.01, 0.2
    generation = engine.generate(call(n=2, max_tokens=60))
    ids: dict[int, list[int]] = {0: [], 1: []}
    async for segment in generation:
        ids[segment.index] += segment.token_ids
        generation.stop(0)
    assert ids[1] == expected(60)


async def test_a_long_answer_is_no_stall(wire: LmdeployWire, model: Path) -> None:
    wire.pace_s = 0.05
    async with connected(wire, model, first_token_limit_s=1, stall_limit_s=1) as engine:
        (said,) = await say(engine, max_tokens=40)
    assert said.ids == expected(40)


async def test_a_closed_call_is_aborted_and_leaves_nothing_behind(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    wire.faults.stall_at = 2
    generation = engine.generate(call(n=2))
    await until(lambda: wire.running == 2)
    generation.close()
    generation.close()
    await drain(generation)
    await until(lambda: wire.running == 0 and engine.counters()["running_samples"] == 0)
    assert sorted(wire.aborted) == sorted(body["session_id"] for body in wire.bodies)


async def test_a_server_without_aborts_is_told_by_the_closed_connection_and_said_once(
    wire: LmdeployWire, engine: LMDeployServerEngine, caplog: pytest.LogCaptureFixture
) -> None:
    wire.can_abort = False
    wire.faults.stall_at = 1
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            generation = engine.generate(call())
            await until(lambda: wire.running == 1)
            generation.close()
            await until(lambda: wire.running == 0)
    assert len(wire.closed) == 2
    assert wire.calls.count("POST /abort_request") == 1
    assert sum("--enable-abort-handling" in record.message for record in caplog.records) == 1


async def test_samples_beyond_the_slots_wait_here(wire: LmdeployWire, model: Path) -> None:
    async with connected(wire, model, slots=2) as engine:
        wire.faults.stall_at = 0
        generation = engine.generate(call(n=5))
        await until(lambda: wire.running == 2)
        counters = engine.counters()
        assert (counters["running_samples"], counters["waiting_samples"]) == (2, 3)
        generation.close()
        await drain(generation)
        await until(lambda: wire.running == 0)
        assert len(wire.bodies) == 2


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"cut_at": 4}, "broke|midst"),
        ({"error_at": 4}, "500: An internal server error"),
        ({"stall_at": 4}, r"no token for 0\.3 s"),
        ({"event_at": (4, "{")}, "garbled"),
        ({"event_at": (4, '{"output_ids": [-1]}')}, "garbled"),
        ({"event_at": (4, '{"output_ids": [5], "meta_info": {}}')}, "not those of its tokens"),
        ({"finish_at": (4, "abort")}, "without its end: abort"),
    ],
    ids=["cut", "error", "stall", "garbled", "wrong type", "no log-probability", "aborted"],
)
async def test_a_broken_stream_keeps_its_tokens_and_may_be_tried_again(
    wire: LmdeployWire, model: Path, fault: dict[str, object], told: str
) -> None:
    async with connected(wire, model, stall_limit_s=0.3) as engine:
        vars(wire.faults).update(fault)
        said, error = await broken(engine)
    assert said.ids == expected(4)
    assert isinstance(error, EngineFailed)
    assert error.retryable
    assert re.search(told, error.message)


async def test_a_token_of_another_vocabulary_is_not_taken(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    event = {
        "output_ids": [VOCABULARY],
        "meta_info": {"output_token_logprobs": [[-1.0, VOCABULARY]]},
    }
    wire.faults.event_at = (2, msgspec.json.encode(event).decode())
    said, error = await broken(engine)
    assert (said.ids, "another model" in error.message) == (expected(2), True)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "The top_p 3 must be in (0, 1].", InvalidRequest),
        (
            400,
            "Input length (9) must be smaller than the model context length (8).",
            ContextLengthExceeded,
        ),
        (422, "validation", InvalidRequest),
        (500, "Internal Server Error", EngineFailed),
        (404, "Not Found", EngineFailed),
        (429, "slow down", EngineFailed),
    ],
)
async def test_a_refusal_is_the_job_s_fault_or_worth_another_attempt(
    wire: LmdeployWire,
    engine: LMDeployServerEngine,
    status: int,
    message: str,
    kind: type[RolloutError],
) -> None:
    wire.faults.statuses = [(status, message)]
    said, error = await broken(engine)
    assert type(error) is kind
    assert (said.ids, message in error.message) == ([], True)


async def test_a_server_that_is_away_is_waited_for(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    await wire.stop()
    reading = asyncio.create_task(say(engine, n=2, max_tokens=3))
    await until(lambda: engine.counters()["running_samples"] == 2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(reading), 0.5)
    await wire.start()
    assert [said.ids for said in await reading] == [expected(3)] * 2


async def test_a_server_that_says_503_is_waited_for(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    wire.faults.statuses = [(503, "Engine is sleeping"), (503, "Engine is sleeping")]
    (said,) = await say(engine, max_tokens=3)
    assert said.ids == expected(3)
    assert len(wire.bodies) == 3


async def test_the_wait_for_a_server_has_an_end(wire: LmdeployWire, model: Path) -> None:
    async with connected(wire, model, away_limit_s=0.5) as engine:
        wire.asleep = True
        said, error = await broken(engine)
        assert isinstance(error, EngineFailed)
        assert (said.ids, "slept" in error.message) == ([], True)
        wire.asleep = False
        (after,) = await say(engine, max_tokens=3)
        assert after.ids == expected(3)


async def test_a_key_is_sent_and_never_shown(
    wire: LmdeployWire, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wire.keys = [SECRET]
    key = SecretStr(SECRET)
    with caplog.at_level(logging.DEBUG):
        async with connected(wire, model, key=key) as engine:
            (said,) = await say(engine, max_tokens=3)
            assert said.ids == expected(3)
            wire.keys = ["another"]
            _, error = await broken(engine)
    assert isinstance(error, EngineFailed)
    assert "ROLLOUTQ_ENGINE_KEY" in error.message
    shown = f"{caplog.text} {error} {vars(engine)} {engine!r}"
    assert SECRET not in shown


async def test_a_sleeping_server_is_offloaded_and_brought_back(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    for _ in range(2):
        await engine.offload(1)
        assert (engine.memory, wire.asleep) == ("offloaded", True)
    with pytest.raises(EngineFailed, match="offloaded, not loaded"):
        engine.generate(call())
    for _ in range(2):
        await engine.onload()
        assert (engine.memory, wire.asleep) == ("loaded", False)
    (said,) = await say(engine, max_tokens=3)
    assert said.ids == expected(3)
    orders = [one for one in wire.calls if one.startswith(("POST /sleep", "POST /wakeup"))]
    assert orders == ["POST /sleep?level=1", "POST /wakeup"]


async def test_weights_are_not_moved_below_a_generation(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    wire.faults.stall_at = 1
    generation = engine.generate(call())
    await until(lambda: wire.running == 1)
    with pytest.raises(EngineBusy):
        await engine.offload(1)
    generation.close()
    await engine.offload(1)
    assert (engine.memory, wire.running) == ("offloaded", 0)


async def test_a_server_that_does_not_obey_leaves_the_engine_as_it_was(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    wire.sleeps = False
    with pytest.raises(EngineFailed, match="did not go to sleep"):
        await engine.offload(1)
    assert engine.memory == "loaded"
    (said,) = await say(engine, max_tokens=3)
    assert said.ids == expected(3)


async def test_weights_are_neither_discarded_nor_replaced(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    assert "update_weights" not in engine.capabilities
    with pytest.raises(WeightsRefused, match="un-pickles"):
        await engine.update_weights(Weights(1, "/models/new"))
    with pytest.raises(InvalidRequest, match="level 1"):
        await engine.offload(2)
    assert not any("update" in path or "sleep?" in path for path in wire.calls)
    assert (engine.memory, engine.policy_version) == ("loaded", 0)


async def test_prompts_that_it_cannot_take_are_refused_here(
    wire: LmdeployWire, engine: LMDeployServerEngine
) -> None:
    with pytest.raises(ContextLengthExceeded):
        engine.generate(call(range(256)))
    with pytest.raises(InvalidRequest, match="320"):
        engine.generate(call([5, VOCABULARY]))
    with pytest.raises(InvalidRequest):
        engine.generate(call([]))
    assert wire.bodies == []


async def test_it_starts_when_the_server_has_loaded_its_model(
    wire: LmdeployWire, model: Path
) -> None:
    wire.healthy = False
    engine = LMDeployServerEngine(Settings(url=wire.url, model=str(model), start_limit_s=20))
    starting = asyncio.create_task(engine.start())
    await until(lambda: wire.port and not starting.done())
    wire.healthy = True
    await starting
    assert (engine.context_tokens, engine.vocabulary, engine.model) == (
        256,
        VOCABULARY,
        "tiny-llama",
    )
    await engine.close()


async def test_it_wakes_a_server_that_sleeps(wire: LmdeployWire, model: Path) -> None:
    wire.asleep = True
    async with connected(wire, model) as engine:
        assert (wire.asleep, engine.memory) == (False, "loaded")


async def test_the_server_s_context_counts_where_it_is_less(
    wire: LmdeployWire, model: Path
) -> None:
    wire.context_tokens = 100
    async with connected(wire, model) as engine:
        assert engine.context_tokens == 100
    async with connected(wire, model, context_tokens=64) as engine:
        assert engine.context_tokens == 64
    with pytest.raises(ConfigError, match=r"--context-tokens: 200, and .* 100"):
        async with connected(wire, model, context_tokens=200):
            pass


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        ({"models": ["other"]}, {}, "not what the server serves"),
        ({"healthy": False}, {"start_limit_s": 0.3}, "no healthy server"),
        ({"logprobs": False}, {}, "--logprobs-mode raw_logprobs"),
        ({"keys": ["k"]}, {}, "ROLLOUTQ_ENGINE_KEY"),
        ({"sleeps": False, "asleep": True}, {}, "to sleep"),
    ],
    ids=["other model", "unhealthy", "no log-probabilities", "no key", "asleep"],
)
async def test_a_server_that_does_not_fit_is_told_at_the_start(
    wire: LmdeployWire,
    model: Path,
    change: dict[str, object],
    settings: dict[str, object],
    told: str,
) -> None:
    vars(wire).update(change)
    with pytest.raises(ConfigError, match=told) as refused:
        async with connected(wire, model, **settings):
            pass
    assert str(model) not in refused.value.message


async def test_a_closed_engine_takes_nothing(wire: LmdeployWire, model: Path) -> None:
    async with connected(wire, model) as engine:
        wire.faults.stall_at = 1
        generation = engine.generate(call())
        await until(lambda: wire.running == 1)
    await until(lambda: wire.running == 0)
    generation.close()
    with pytest.raises(EngineFailed, match="not running"):
        engine.generate(call())
