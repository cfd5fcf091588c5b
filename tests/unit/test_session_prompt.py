"""The prompt of a later turn: earlier tokens as they were, then only what the template writes after them."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from protocols import codec
from protocols.errors import InvalidRequest, SessionReleased
from protocols.job import Segment
from protocols.message import (
    Block,
    Message,
    Reasoning,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
)
from protocols.queue.rows import Lease
from protocols.rollout_state import Logprobs, RolloutState, SessionPlace, TokenIds
from protocols.session import SESSION_TURNS, Node, Recalled, trail
from worker.outcome import Completed
from worker.session import REWRITTEN, UNKNOWN, Recall, Thread, Write, kept_in, placed, thread_of

END, EOM, ROLE = 1000, 1001, 1002
SPECIAL = {"<end>": END, "<eom>": EOM, "<role>": ROLE}
LEASE = Lease("j9", "1:n", "normal", None, {})
DRAWN = 5000
"""Tokens of an answer, which no text gives: whoever tokenizes it again does not get them."""
QUESTION = Message("user", (Text("Q"),))
MORE = Message("user", (Text("R"),))


def encode(text: str) -> TokenIds:
    ids = TokenIds()
    while text:
        special = next((name for name in SPECIAL if text.startswith(name)), None)
        ids.append(SPECIAL[special] if special else ord(text[0]))
        text = text[len(special or text[0]) :]
    return ids


def said(blocks: Sequence[Block], *, thinking: bool = True) -> str:
    parts: list[str] = []
    for block in blocks:
        match block:
            case Text(text):
                parts.append(text)
            case Thinking(text):
                parts.append(f"({text})" if thinking else "")
            case ToolUse(name=name, arguments=arguments):
                parts.append(f"{name}{arguments}")
            case ToolResult(content=content):
                parts.append(f"={said(content)}")
            case _:
                pass
    return "".join(parts)


def template(end: str = "<end>", *, forgets: bool = False) -> Write:
    """Like ChatML; `forgets` the thinking of all answers but the last message."""

    def write(messages: Sequence[Message], _: Reasoning, opens: bool) -> str:
        text = ""
        for at, message in enumerate(messages):
            keeps = not forgets or at == len(messages) - 1
            text += f"<role>{message.role[0]}:{said(message.content, thinking=keeps)}{end}"
        return text + ("<role>a:" if opens else "")

    return write


def node(answer: Sequence[Block], *ids: int, messages: int = 1, prompt: str = "first") -> Node:
    drawn = TokenIds(ids)
    logprobs = Logprobs([0.0] * len(drawn))
    return Node(encode(prompt), drawn, logprobs, ((0, 0),), "stop", tuple(answer), messages)


def thread(*nodes: Node, turns: int | None = None) -> Thread:
    path = tuple((f"j{at}/0", one) for at, one in enumerate(nodes))
    return Thread("s", ("mark",), Recalled(len(nodes) if turns is None else turns, 0, path))


def asked(*messages: Message, effort: str | None = None) -> RolloutState:
    return RolloutState(message=messages, reasoning=Reasoning(effort=effort))


def answered(*blocks: Block) -> Message:
    return Message("assistant", blocks)


def prompt(
    known: Thread, state: RolloutState, write: Write | None = None
) -> tuple[SessionPlace, TokenIds]:
    return placed(known, state, write or template(), encode, SPECIAL.values())


def test_a_sessions_first_turn_begins_afresh_and_needs_no_reason() -> None:
    assert prompt(thread(), asked(QUESTION)) == (SessionPlace("s"), TokenIds())


def test_a_conversation_that_the_session_does_not_know_is_a_new_branch_and_says_so() -> None:
    place, ids = prompt(thread(turns=3), asked(QUESTION))
    assert (place, ids) == (SessionPlace("s", branch=UNKNOWN), TokenIds())


@pytest.mark.parametrize(
    ("drawn", "closing"),
    [
        ([DRAWN, END], ""),
        ([DRAWN, EOM], ""),
        ([DRAWN], "<end>"),
        ([DRAWN, ord("x")], "<end>"),
    ],
)
def test_earlier_tokens_stay_and_the_answer_is_closed_once(drawn: list[int], closing: str) -> None:
    known = node([Text("A")], *drawn)
    place, ids = prompt(thread(known), asked(QUESTION, answered(Text("A")), MORE))
    earlier = [*encode("first"), *drawn]
    assert place == SessionPlace("s", 2, "j0/0", len(earlier))
    assert list(ids) == earlier + list(encode(f"{closing}<role>u:R<end><role>a:"))


@pytest.mark.parametrize(("end", "drawn"), [("\n<end>\n", "\n<role>u:R"), ("", "<role>u:R")])
def test_a_closing_of_any_shape_is_not_said_twice(end: str, drawn: str) -> None:
    known = node([Text("A")], DRAWN, END)
    state = asked(QUESTION, answered(Text("A")), MORE)
    _, ids = prompt(thread(known), state, template(end))
    assert list(ids) == [*encode("first"), DRAWN, END, *encode(f"{drawn}{end}<role>a:")]


def test_an_answer_that_ends_in_the_next_turns_token_does_not_repeat_it() -> None:
    known = node([Text("A")], DRAWN, ROLE)
    _, ids = prompt(thread(known), asked(QUESTION, answered(Text("A")), MORE), template(""))
    assert list(ids) == [*encode("first"), DRAWN, *encode("<role>u:R<role>a:")]


def test_the_template_sees_each_answer_as_the_policy_gave_it() -> None:
    call = ToolUse("own", "f", '{"a" : 1}')
    seen: list[Message] = []

    def write(messages: Sequence[Message], reasoning: Reasoning, opens: bool) -> str:
        seen.extend(messages if opens else ())
        return template()(messages, reasoning, opens)

    first, second = node([Thinking("t"), call], DRAWN), node([Text("B")], DRAWN + 1, messages=3)
    told = answered(ToolUse("the client's", "f", '{"a":1}'))
    result = Message("user", (ToolResult("the client's", (Text("2"),)),))
    state = asked(QUESTION, told, result, answered(Text(" B ")), MORE)
    place, ids = prompt(thread(first, second), state, write)
    assert seen[1].content == (Thinking("t"), ToolUse("the client's", "f", '{"a" : 1}'))
    assert seen[2] is result
    assert seen[3].content == (Text("B"),)
    assert (place.turn, place.parent) == (3, "j1/0")
    assert [i for i in ids if i >= DRAWN] == [DRAWN, DRAWN + 1]


def test_a_template_that_forgets_thinking_begins_a_branch_and_says_so() -> None:
    thinking, plain = node([Thinking("t"), Text("A")], DRAWN), node([Text("A")], DRAWN)
    state = asked(QUESTION, answered(Text("A")), MORE)
    forgets = template(forgets=True)
    assert prompt(thread(thinking), state, forgets) == (
        SessionPlace("s", branch=REWRITTEN),
        TokenIds(),
    )
    assert prompt(thread(thinking), state)[0].branch is None
    assert prompt(thread(plain), state, forgets)[0].branch is None


def test_another_wish_to_reason_that_the_template_wrote_down_begins_a_branch() -> None:
    def write(messages: Sequence[Message], reasoning: Reasoning, opens: bool) -> str:
        return f"{reasoning.effort}{template()(messages, reasoning, opens)}"

    known, state = node([Text("A")], DRAWN), [QUESTION, answered(Text("A")), MORE]
    high = asked(*state, effort="high")
    assert prompt(thread(known), high, write)[0].branch == REWRITTEN
    assert prompt(thread(known), high)[0].branch is None


def _refuses(messages: Sequence[Message], _: Reasoning, opens: bool) -> str:
    if messages[-1].role == "assistant":
        raise InvalidRequest("the last message must be a user's")
    return template()(messages, Reasoning(), opens)


def _hides(messages: Sequence[Message], reasoning: Reasoning, opens: bool) -> str:
    return template()([m for m in messages if m.role == "user"], reasoning, opens)


@pytest.mark.parametrize("write", [_refuses, _hides])
def test_a_template_that_shows_no_last_answer_begins_a_branch(write: Write) -> None:
    state = asked(QUESTION, answered(Text("A")), MORE)
    place, ids = prompt(thread(node([Text("A")], DRAWN)), state, write)
    assert (place.branch, len(ids)) == (REWRITTEN, 0)


def recalling(known: Recalled, marks: list[Sequence[str]]) -> Recall:
    async def recall(_lease: Lease, _session: str, asked_for: Sequence[str]) -> Recalled:
        marks.append(asked_for)
        return known

    return recall


async def test_beginnings_that_end_in_an_answer_are_looked_up_the_longest_first() -> None:
    state = asked(QUESTION, answered(Text("A")), MORE, answered(Text("B")), MORE)
    marks: list[Sequence[str]] = []
    found = await thread_of(LEASE, "s", state, recalling(Recalled(), marks))
    assert found is not None
    whole = trail(state.message, ())
    assert (marks, found.marks) == ([[whole[4], whole[2]]], whole)
    assert await thread_of(LEASE, None, state, recalling(Recalled(), marks)) is None
    assert len(marks) == 1


async def test_a_full_session_is_refused_before_any_work() -> None:
    full = recalling(Recalled(turns=SESSION_TURNS), [])
    with pytest.raises(InvalidRequest, match=r"'s' has 4096 turns .* release it"):
        await thread_of(LEASE, "s", asked(QUESTION), full)
    kept = Segment(0, 0, TokenIds([7]), Logprobs([-1.0]), TokenIds(), Logprobs(), 0)
    assert await thread_of(replace(LEASE, kept=(kept,)), "s", asked(QUESTION), full)


async def test_tokens_whose_turn_is_gone_are_given_up() -> None:
    gone = recalling(Recalled(gone=True), [])
    with pytest.raises(SessionReleased, match=r"'s' was released while job j9 was generated"):
        await thread_of(LEASE, "s", asked(QUESTION), gone)


def test_what_a_session_keeps_of_an_answer_is_only_what_is_new() -> None:
    place = SessionPlace("s", 2, "j0/0", 3)
    state = RolloutState(
        rollout_id="j1/0",
        message=(QUESTION, answered(Text("A")), MORE),
        prompt_ids=TokenIds([1, 2, 3, 4, 5]),
        response="B",
        response_ids=TokenIds([6, 7]),
        logprobs=Logprobs([-0.5, -1.0]),
        policy_versions=((3, 0),),
        finish_reason="stop",
        session=place,
    )
    marks = trail(state.message, ())
    known = Thread("s", marks, Recalled(1))
    (turn,) = kept_in(known, [state], Completed(b"", b"", 3, 3)).turns
    kept = codec.unpack_node(turn.node)
    assert (turn.rollout_id, turn.parent) == ("j1/0", "j0/0")
    assert turn.mark == trail((*state.message, answered(Text("B"))), ())[-1]
    assert (kept.prompt_ids, kept.response_ids) == (TokenIds([4, 5]), TokenIds([6, 7]))
    assert (kept.messages, kept.output) == (3, (Text("B"),))
