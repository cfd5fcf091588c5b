"""Sampling parameters under the names of several projects."""

import pytest

from protocols.dialects import generate, openai_chat
from protocols.errors import InvalidRequest
from protocols.message import CallGuide, JsonGuide, Tool
from protocols.rollout_state import SampleParams
from tests.dialect_bodies import PLAIN, USER, Body, normalize


def test_absent_and_null_parameters_are_neutral() -> None:
    silent = normalize("openai.chat", PLAIN["openai.chat"]).state.sample_params
    assert silent == SampleParams(return_logprob=False)
    nulls = dict.fromkeys(openai_chat.Request.__struct_fields__)
    spoken = normalize("openai.chat", {**nulls, "messages": [USER]})
    assert spoken.state.sample_params == silent
    nulls = dict.fromkeys(generate.Params.__struct_fields__)
    spoken = normalize("generate", {"prompt": "a", "sample_params": nulls})
    assert spoken.state.sample_params == SampleParams()


@pytest.mark.parametrize(
    ("given", "field", "value", "unused"),
    [
        ({"max_tokens": 5}, "max_tokens", 5, ()),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", 5, ()),
        ({"max_tokens": 5, "max_completion_tokens": 3}, "max_tokens", 3, ("max_tokens",)),
        ({"min_new_tokens": 2}, "min_tokens", 2, ()),
        ({"min_tokens": 1, "min_new_tokens": 2}, "min_tokens", 1, ("min_new_tokens",)),
        ({"no_stop_trim": True}, "include_stop_str_in_output", True, ()),
        (
            {"include_stop_str_in_output": False, "no_stop_trim": True},
            "include_stop_str_in_output",
            False,
            ("no_stop_trim",),
        ),
        ({"skip_special_tokens": False}, "skip_special_tokens", False, ()),
        ({"top_k": -1}, "top_k", 0, ()),
        ({"seed": 7}, "sampling_seed", 7, ()),
        ({"seed": -1}, "sampling_seed", 2**63 - 1, ()),
        ({"seed": -(2**63)}, "sampling_seed", 0, ()),
        ({"temperature": 0}, "temperature", 0.0, ()),
        ({"stop": "a"}, "stops", ("a",), ()),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", 3, ()),
        ({"logprobs": False, "top_logprobs": 0}, "return_logprob", False, ()),
    ],
)
def test_aliases_meet_in_one_parameter(
    given: Body, field: str, value: object, unused: tuple[str, ...]
) -> None:
    normal = normalize("openai.chat", PLAIN["openai.chat"] | given)
    assert getattr(normal.state.sample_params, field) == value
    assert normal.ignored == unused


def test_parameters_in_their_normal_form_make_a_request() -> None:
    given = SampleParams(
        n=2,
        max_tokens=5,
        temperature=0.5,
        stops=("a",),
        logit_bias=((3, -1.0), (7, 2.5)),
        guide=JsonGuide('{"type":"array"}'),
        sampling_seed=9,
    )
    for params in (given, SampleParams()):
        body = {"prompt": "a", "sample_params": generate.request_params(params)}
        assert normalize("generate", body).state.sample_params == params
    with pytest.raises(InvalidRequest, match="send `tools` and `tool_choice` instead"):
        generate.request_params(SampleParams(guide=CallGuide((Tool("f"),))))
