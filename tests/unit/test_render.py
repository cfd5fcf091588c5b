"""From the normal form to a call: what is refused before any work, and what is filled in."""

from typing import Any

import pytest
from msgspec.structs import replace

from protocols.dialects.base import Normal, Options, Script
from protocols.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    RequestError,
    UnsupportedOption,
)
from protocols.job import Job
from protocols.message import Image, Message, Reasoning, Text, Tool, ToolChoice, ToolResult
from protocols.rollout_state import RolloutState, SampleParams, TokenIds
from worker.engines.base import Markup, Template
from worker.engines.scripted import (
    ASSISTANT,
    CLOSE,
    USER,
    VOCABULARY,
    ByteTokenizer,
    ScriptedEngine,
)
from worker.regions import PLAIN, Reading
from worker.render import THREAD_BYTES, check, heard, reading_of, render, seed_of

JOB = Job(id="j1", body=b"{}")


def small_engine() -> ScriptedEngine:
    """A context of 20 tokens, and only some options."""
    engine = ScriptedEngine()
    engine.name, engine.context_tokens = "small", 20
    honoured = {"n", "max_tokens", "temperature", "stops", "return_logprob", "sampling_seed"}
    engine.capabilities = frozenset(honoured)
    return engine


ENGINE = small_engine()


def normal(
    *,
    model: str | None = None,
    options: Options | None = None,
    params: SampleParams | None = None,
    **state: Any,  # noqa: ANN401
) -> Normal:
    given = RolloutState(**(state or {"prompt": "hello"}))
    given = replace(given, sample_params=params or SampleParams())
    return Normal(given, model=model, options=options or Options())


@pytest.mark.parametrize("model", [None, "", "scripted", "pool-1"])
def test_the_served_model_the_pool_or_none_pass(model: str | None) -> None:
    check(normal(model=model), ENGINE, "pool-1")


def test_another_model_is_refused_by_name() -> None:
    with pytest.raises(ModelNotFound) as refused:
        check(normal(model="m" * 200), ENGINE, "pool-1")
    assert refused.value.param == "model"
    assert "'scripted'" in refused.value.message
    assert "m" * 81 not in refused.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", 5), ("min_tokens", 2), ("top_logprobs", 1), ("stop_token_ids", (3,))],
)
def test_an_option_that_the_engine_lacks_is_refused_by_name(name: str, value: object) -> None:
    params = replace(SampleParams(), **{name: value})
    with pytest.raises(UnsupportedOption) as refused:
        check(normal(prompt="x", params=params), ENGINE, "p")
    assert refused.value.param == name
    assert "engine small" in refused.value.message


def test_of_several_such_options_the_first_is_named() -> None:
    with pytest.raises(UnsupportedOption) as refused:
        check(normal(prompt="x", params=SampleParams(top_k=5, min_tokens=2)), ENGINE, "p")
    assert refused.value.param == "min_tokens"


def test_a_neutral_value_of_an_option_that_the_engine_lacks_passes() -> None:
    check(normal(prompt="x", params=SampleParams(top_k=0, min_tokens=0)), ENGINE, "p")


def test_a_script_is_refused_by_an_engine_that_runs_none() -> None:
    with pytest.raises(UnsupportedOption) as refused:
        check(normal(options=Options(script=Script())), ENGINE, "p")
    assert refused.value.param == "rollout.script"
    check(normal(options=Options(script=Script())), ScriptedEngine(), "p")


def test_more_tokens_than_the_context_are_refused_with_the_limit() -> None:
    check(normal(prompt="x", params=SampleParams(max_tokens=20)), ENGINE, "p")
    with pytest.raises(InvalidRequest, match="21; the model's context is 20") as refused:
        check(normal(prompt="x", params=SampleParams(max_tokens=21)), ENGINE, "p")
    assert refused.value.param == "max_tokens"


@pytest.mark.parametrize("field", ["input_ids", "stop_token_ids"])
def test_a_token_id_outside_the_vocabulary_is_refused_by_its_field(field: str) -> None:
    def with_ids(*ids: int) -> Normal:
        if field == "input_ids":
            params = SampleParams(stop_token_ids=(1,))
            return normal(prompt_ids=TokenIds(ids), params=params)
        return normal(prompt_ids=TokenIds([1]), params=SampleParams(stop_token_ids=tuple(ids)))

    check(with_ids(0, VOCABULARY - 1), ScriptedEngine(), "p")
    with pytest.raises(InvalidRequest) as refused:
        check(with_ids(0, VOCABULARY, 5), ScriptedEngine(), "p")
    assert refused.value.param == field
    assert str(VOCABULARY - 1) in refused.value.message


async def test_messages_go_through_the_template_and_text_and_ids_do_not() -> None:
    message = (Message("user", (Text("h"), Text("i"))),)
    for given, ids in (
        (normal(message=message), [USER, *b"hi", CLOSE, ASSISTANT]),
        (normal(prompt="hi"), [*b"hi"]),
        (normal(prompt_ids=TokenIds([7, 8])), [7, 8]),
    ):
        state, call = await render(given, JOB, ENGINE)
        assert call.prompt_ids.tolist() == state.prompt_ids.tolist() == ids


async def test_open_ends_are_filled_in() -> None:
    state, call = await render(normal(prompt="12345"), JOB, ENGINE)
    assert call.params.max_tokens == 15
    assert call.params.sampling_seed == seed_of("j1")
    assert state.sample_params == call.params
    assert (state.group_id, state.session_id) == ("j1", None)


async def test_max_tokens_end_with_the_context() -> None:
    _, call = await render(normal(prompt="12345", params=SampleParams(max_tokens=18)), JOB, ENGINE)
    assert call.params.max_tokens == 15


async def test_a_given_seed_is_kept() -> None:
    params = SampleParams(sampling_seed=0)
    _, call = await render(normal(prompt="x", params=params), JOB, ENGINE)
    assert call.params.sampling_seed == 0


def test_seeds_differ_by_job_and_not_by_attempt() -> None:
    seeds = {seed_of(f"job-{i}") for i in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("job-1") == seed_of("job-1")


async def test_fields_of_the_entry_win_over_those_of_the_body() -> None:
    options = Options(group="body-g", session="body-s")
    state, _ = await render(normal(options=options), JOB, ENGINE)
    assert (state.group_id, state.session_id) == ("body-g", "body-s")
    entry = Job(id="j1", body=b"{}", group="entry-g", session="entry-s")
    state, _ = await render(normal(options=options), entry, ENGINE)
    assert (state.group_id, state.session_id) == ("entry-g", "entry-s")


@pytest.mark.parametrize("size", [20, 21, 5000])
@pytest.mark.parametrize("field", ["prompt", "input_ids", "messages"])
async def test_a_prompt_without_room_for_an_answer_is_refused(field: str, size: int) -> None:
    given: dict[str, Any] = {
        "prompt": {"prompt": "x" * size},
        "input_ids": {"prompt_ids": TokenIds([1] * size)},
        "messages": {"message": (Message("user", (Text("x" * size),)),)},
    }[field]
    with pytest.raises(ContextLengthExceeded, match="20 tokens") as refused:
        await render(normal(**given), JOB, ENGINE)
    assert refused.value.param == field


async def test_the_longest_prompt_that_leaves_one_token_is_taken() -> None:
    _, call = await render(normal(prompt="x" * 19), JOB, ENGINE)
    assert call.params.max_tokens == 1


async def test_a_prompt_that_is_far_too_long_is_not_even_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = small_engine()

    def refuse(text: str) -> TokenIds:
        raise AssertionError("tokenized")

    monkeypatch.setattr(engine.tokenizer, "encode", refuse)
    with pytest.raises(ContextLengthExceeded):
        await render(normal(prompt="x" * 10_000), JOB, engine)


async def test_a_long_prompt_is_tokenized_beside_the_event_loop() -> None:
    engine = ScriptedEngine()
    text = "ß" * THREAD_BYTES
    with pytest.raises(ContextLengthExceeded):  # 131,072 bytes fill the context
        await render(normal(prompt=text), JOB, engine)
    _, call = await render(normal(prompt=text[:-5]), JOB, engine)
    assert len(call.prompt_ids) == 2 * len(text) - 10


async def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="no tokens"):
        await render(normal(prompt=""), JOB, ENGINE)


LOOK = Tool("look", "Looks.")
ASKED = Message("user", (Text("hi"),))


def reading(tokenizer: ByteTokenizer | None = None, **state: Any) -> Reading:  # noqa: ANN401
    return reading_of(RolloutState(**state), tokenizer or ByteTokenizer())


def test_calls_are_looked_for_where_there_are_tools_that_may_be_called() -> None:
    markup = ByteTokenizer.markup
    assert reading(message=(ASKED,), tools=(LOOK,)) == Reading(markup)
    without = Reading(replace(markup, call=None))
    assert reading(message=(ASKED,)) == without
    never = ToolChoice("none")
    assert reading(message=(ASKED,), tools=(LOOK,), tool_choice=never) == without


def test_no_markup_is_looked_for_after_a_prompt_of_text_or_ids() -> None:
    assert reading(prompt="a", prompt_ids=TokenIds(b"a"), tools=(LOOK,)) == PLAIN


@pytest.mark.parametrize(
    ("end", "thinks"),
    [("<think>", True), ("<think>\n\n", True), ("<think></think>", False), ("", False)],
)
def test_a_prompt_may_have_opened_the_thinking(end: str, thinks: bool) -> None:
    ids = TokenIds(f"hi {end}".encode())
    assert reading(message=(ASKED,), prompt_ids=ids).thinking is thinks


@pytest.mark.parametrize(
    "block", [Image("https://example.com/a.png"), ToolResult("1", (Image("data:,"),))]
)
def test_pictures_are_refused_by_their_message(block: Image | ToolResult) -> None:
    with pytest.raises(UnsupportedOption, match="engine small takes no images") as refused:
        check(normal(message=(ASKED, Message("user", (block,)))), ENGINE, "p")
    assert refused.value.param == "messages[1].content"


def test_tools_are_refused_for_a_model_whose_calls_cannot_be_read() -> None:
    engine = small_engine()
    engine.tokenizer.markup = Markup()
    with pytest.raises(UnsupportedOption, match="`tools`"):
        check(normal(message=(ASKED,), tools=(LOOK,)), engine, "p")
    check(normal(message=(ASKED,)), engine, "p")


@pytest.mark.parametrize(
    ("reasoning", "ignored"),
    [
        (Reasoning(), ("x",)),
        (Reasoning(enabled=True), ("x",)),
        (Reasoning(effort="low"), ("x", "reasoning")),
    ],
)
def test_reasoning_that_the_template_has_no_switch_for_is_told_as_ignored(
    reasoning: Reasoning, ignored: tuple[str, ...]
) -> None:
    engine = small_engine()
    engine.tokenizer.template = Template(options=frozenset({"enable_thinking"}))
    given = replace(normal(message=(ASKED,), reasoning=reasoning), ignored=("x",))
    assert heard(given, engine).ignored == ignored
    strict = replace(given, options=Options(unsupported="error"))
    if "reasoning" in ignored:
        with pytest.raises(UnsupportedOption, match="`reasoning`: the chat template"):
            heard(strict, engine)
    else:
        assert heard(strict, engine) == strict


async def test_tools_count_as_part_of_the_prompt() -> None:
    many = tuple(Tool(f"t{i}", parameters='{"a":"' + "x" * 50 + '"}') for i in range(20))
    with pytest.raises(ContextLengthExceeded, match="bytes"):
        await render(normal(message=(ASKED,), tools=many), JOB, ENGINE)


async def test_a_prompt_is_counted_though_it_fills_the_context() -> None:
    counted = replace(normal(prompt="x" * 30), counts=True)
    state, _ = await render(counted, JOB, ENGINE)
    assert len(state.prompt_ids) == 30
