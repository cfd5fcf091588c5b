"""Tools, the choice among them, formats and thinking: what a request makes of them."""

import pytest

from protocols.errors import InvalidRequest, UnsupportedOption
from protocols.message import CallGuide, JsonGuide, Reasoning, Tool, ToolChoice
from protocols.rollout_state import RolloutState
from tests.dialect_bodies import CUSTOM, FUNCTION, PLAIN, Body, normalize

WEATHER = Tool(
    "weather",
    "Of a city.",
    '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}',
)
TIME_FUNCTION: Body = {"type": "function", "function": {"name": "time"}}
TIME_CUSTOM: Body = {"name": "time", "input_schema": {"type": "object"}}
TIME = Tool("time")
TOOLS: dict[str, list[Body]] = {
    "openai.chat": [FUNCTION, TIME_FUNCTION],
    "generate": [FUNCTION, TIME_FUNCTION],
    "claude.messages": [CUSTOM, TIME_CUSTOM],
}
NAMED: Body = {"type": "function", "function": {"name": "time"}}


def state(protocol: str, **more: object) -> RolloutState:
    normal = normalize(protocol, PLAIN[protocol] | {"tools": TOOLS[protocol]} | more)
    choice = normal.state.tool_choice
    alone = choice.mode == "auto" and not choice.parallel  # only a guide can see to it
    assert tuple(field.rpartition(".")[2] for field in normal.ignored) == (
        (("parallel_tool_calls", "disable_parallel_tool_use")[protocol == "claude.messages"],)
        if alone
        else ()
    )
    return normal.state


def allowed(mode: str, *names: str) -> Body:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("protocol", TOOLS)
def test_tools_are_the_same_in_all_dialects(protocol: str) -> None:
    found = state(protocol)
    assert found.tools == (WEATHER, TIME)
    assert found.tool_choice == ToolChoice()
    assert found.sample_params.guide is None


@pytest.mark.parametrize(
    ("protocol", "given", "choice", "guide"),
    [
        ("openai.chat", {"tool_choice": "auto"}, ToolChoice(), None),
        ("openai.chat", {"tool_choice": "none"}, ToolChoice("none"), None),
        ("openai.chat", {"parallel_tool_calls": False}, ToolChoice(parallel=False), None),
        (
            "openai.chat",
            {"tool_choice": "required"},
            ToolChoice("required"),
            CallGuide((WEATHER, TIME)),
        ),
        (
            "openai.chat",
            {"tool_choice": NAMED, "parallel_tool_calls": False},
            ToolChoice("required", "time", parallel=False),
            CallGuide((TIME,), parallel=False),
        ),
        (
            "generate",
            {"tool_choice": "required"},
            ToolChoice("required"),
            CallGuide((WEATHER, TIME)),
        ),
        ("claude.messages", {"tool_choice": {"type": "auto"}}, ToolChoice(), None),
        ("claude.messages", {"tool_choice": {"type": "none"}}, ToolChoice("none"), None),
        (
            "claude.messages",
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            ToolChoice(parallel=False),
            None,
        ),
        (
            "claude.messages",
            {"tool_choice": {"type": "any"}},
            ToolChoice("required"),
            CallGuide((WEATHER, TIME)),
        ),
        (
            "claude.messages",
            {"tool_choice": {"type": "tool", "name": "time", "disable_parallel_tool_use": True}},
            ToolChoice("required", "time", parallel=False),
            CallGuide((TIME,), parallel=False),
        ),
    ],
)
def test_choice_says_what_may_and_what_must_be_called(
    protocol: str, given: Body, choice: ToolChoice, guide: CallGuide | None
) -> None:
    found = state(protocol, **given)
    assert found.tools == (WEATHER, TIME)
    assert found.tool_choice == choice
    assert found.sample_params.guide == guide


def test_allowed_tools_narrow_the_offer() -> None:
    free = state("openai.chat", tool_choice=allowed("auto", "time"))
    assert (free.tools, free.tool_choice, free.sample_params.guide) == ((TIME,), ToolChoice(), None)
    bound = state("openai.chat", tool_choice=allowed("required", "time"))
    assert bound.tool_choice == ToolChoice("required")
    assert bound.sample_params.guide == CallGuide((TIME,))


@pytest.mark.parametrize(
    ("protocol", "choice"),
    [
        ("openai.chat", {"type": "function", "function": {"name": "tide"}}),
        ("openai.chat", allowed("auto", "tide")),
        ("generate", {"type": "function", "function": {"name": "tide"}}),
        ("claude.messages", {"type": "tool", "name": "tide"}),
    ],
)
def test_choice_of_an_unknown_tool_names_it(protocol: str, choice: Body) -> None:
    with pytest.raises(InvalidRequest, match="no tool is named 'tide'"):
        state(protocol, tool_choice=choice)


@pytest.mark.parametrize(
    "choice", [{"type": "tool"}, {"type": "any", "name": "time"}, {"type": "auto", "name": "time"}]
)
def test_claudes_choice_has_a_name_only_for_one_tool(choice: Body) -> None:
    with pytest.raises(InvalidRequest) as caught:
        state("claude.messages", tool_choice=choice)
    assert caught.value.param == "tool_choice.name"


def test_strict_tool_is_held_to_its_schema_only_where_a_call_is_required() -> None:
    function = {"type": "function", "function": {"name": "time", "strict": True}}
    chat = PLAIN["openai.chat"] | {"tools": [function]}
    assert normalize("openai.chat", chat).ignored == ("tools[].function.strict",)
    assert normalize("openai.chat", chat | {"tool_choice": "required"}).ignored == ()
    claude = PLAIN["claude.messages"] | {"tools": [TIME_CUSTOM | {"strict": True}]}
    assert normalize("claude.messages", claude).ignored == ("tools[].strict",)
    assert normalize("claude.messages", claude | {"tool_choice": {"type": "any"}}).ignored == ()


def test_examples_stand_in_the_schema() -> None:
    tool = TIME_CUSTOM | {"input_examples": [{"zone": "UTC"}]}
    found = state("claude.messages", tools=[tool]).tools
    assert found == (Tool("time", None, '{"type":"object","examples":[{"zone":"UTC"}]}'),)


def test_deferred_tool_is_offered_once_it_was_found() -> None:
    deferred = [CUSTOM, TIME_CUSTOM | {"defer_loading": True}]
    assert state("claude.messages", tools=deferred).tools == (WEATHER,)
    chosen = state("claude.messages", tools=deferred, tool_choice={"type": "tool", "name": "time"})
    assert chosen.tools == (WEATHER, TIME)
    reference = {"type": "tool_reference", "tool_name": "time"}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [reference]}
    found = state(
        "claude.messages", tools=deferred, messages=[{"role": "user", "content": [result]}]
    )
    assert found.tools == (WEATHER, TIME)


@pytest.mark.parametrize(
    ("given", "guide"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonGuide()),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, JsonGuide()),
        (
            {"type": "json_schema", "json_schema": {"schema": {"b": 1, "a": ["é", 2.0]}}},
            JsonGuide('{"b":1,"a":["é",2.0]}'),
        ),
    ],
)
def test_response_format_is_a_guide(given: Body, guide: JsonGuide | None) -> None:
    chat = PLAIN["openai.chat"] | {"response_format": given}
    assert normalize("openai.chat", chat).state.sample_params.guide == guide
    plain = PLAIN["openai.completions"] | {"response_format": given}
    assert normalize("openai.completions", plain).state.sample_params.guide == guide
    own = PLAIN["generate"] | {"sample_params": {"response_format": given}}
    assert normalize("generate", own).state.sample_params.guide == guide


@pytest.mark.parametrize("at", ["output_config", "output_format"])
def test_output_format_of_claude_is_a_guide(at: str) -> None:
    wanted = {"type": "json_schema", "schema": {"type": "array"}}
    given = {"output_config": {"format": wanted}} if at == "output_config" else {at: wanted}
    found = normalize("claude.messages", PLAIN["claude.messages"] | given)
    assert found.state.sample_params.guide == JsonGuide('{"type":"array"}')


def test_format_and_tools_meet_only_where_the_choice_is_clear() -> None:
    body = PLAIN["openai.chat"] | {
        "tools": [FUNCTION],
        "response_format": {"type": "json_object"},
    }
    with pytest.raises(UnsupportedOption, match=r"^`response_format`: not together with tools"):
        normalize("openai.chat", body)
    silent = normalize("openai.chat", body | {"tool_choice": "none"})
    assert silent.state.sample_params.guide == JsonGuide()
    bound = normalize("openai.chat", body | {"tool_choice": "required"})
    assert bound.state.sample_params.guide == CallGuide((WEATHER,))
    assert bound.ignored == ("response_format",)


@pytest.mark.parametrize(
    ("given", "reasoning", "ignored"),
    [
        ({}, Reasoning(), ()),
        ({"reasoning_effort": "none"}, Reasoning(enabled=False), ()),
        ({"reasoning_effort": "high"}, Reasoning(enabled=True, effort="high"), ()),
        ({"enable_thinking": False}, Reasoning(enabled=False), ()),
        ({"chat_template_kwargs": {"enable_thinking": True}}, Reasoning(enabled=True), ()),
        ({"chat_template_kwargs": {"thinking": True}}, Reasoning(enabled=True), ()),
        (
            {"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"},
            Reasoning(enabled=True, effort="high"),
            ("chat_template_kwargs.reasoning_effort",),
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"},
            Reasoning(enabled=False, effort="high"),
            (),
        ),
    ],
)
@pytest.mark.parametrize("protocol", ["openai.chat", "generate"])
def test_thinking_of_openai_is_wanted_or_not(
    protocol: str, given: Body, reasoning: Reasoning, ignored: tuple[str, ...]
) -> None:
    normal = normalize(protocol, PLAIN[protocol] | given)
    assert (normal.state.reasoning, normal.ignored) == (reasoning, ignored)


@pytest.mark.parametrize(
    ("given", "reasoning", "ignored"),
    [
        ({"thinking": {"type": "disabled"}}, Reasoning(enabled=False), ()),
        ({"thinking": {"type": "adaptive"}}, Reasoning(enabled=True), ()),
        ({"thinking": {"type": "between_tools"}}, Reasoning(enabled=True), ()),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            Reasoning(enabled=True),
            ("thinking.budget_tokens",),
        ),
        (
            {"thinking": {"type": "enabled", "display": "omitted"}},
            Reasoning(enabled=True),
            ("thinking.display",),
        ),
        ({"output_config": {"effort": "max"}}, Reasoning(effort="max"), ()),
    ],
)
def test_thinking_of_claude_is_wanted_or_not(
    given: Body, reasoning: Reasoning, ignored: tuple[str, ...]
) -> None:
    normal = normalize("claude.messages", PLAIN["claude.messages"] | given)
    assert (normal.state.reasoning, normal.ignored) == (reasoning, ignored)


def test_logit_bias_is_in_order_of_token_ids() -> None:
    body = {"logit_bias": {"50256": -100, "7": 1.5}}
    expected = ((7, 1.5), (50256, -100.0))
    for protocol in ("openai.chat", "openai.completions"):
        found = normalize(protocol, PLAIN[protocol] | body).state.sample_params
        assert found.logit_bias == expected
    own = normalize("generate", {"prompt": "a", "sample_params": body})
    assert own.state.sample_params.logit_bias == expected
