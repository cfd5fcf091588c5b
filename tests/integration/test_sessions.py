"""Sessions end to end, on real servers with scripted workers: no token of an answer is ever made anew."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from producer_sdk import Client, InvalidRequest, Reply, RolloutState, SessionSample
from protocols.rollout_state import TokenIds
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve
from tests.servers import both_servers

pytestmark = both_servers

LIMIT_S = 60
SESSION = "chat-1"
Messages = list[dict[str, Any]]


class Talk:
    """One conversation, kept by its client as text alone."""

    def __init__(self, client: Client, messages: Messages | None = None) -> None:
        self.client = client
        self.messages: Messages = messages or []
        self.states: list[RolloutState] = []

    def say(self, text: str, answer: str, **script: object) -> dict[str, Any]:
        """One turn; what `rollout.session` says of it."""
        return self.hear(self.ask(text, answer, **script).result(LIMIT_S))

    def ask(self, text: str, answer: str, **script: object) -> Any:  # noqa: ANN401 - a future
        self.messages.append({"role": "user", "content": text})
        body = {"messages": self.messages, "rollout": {"script": {"text": answer, **script}}}
        return self.client.submit(body, session=SESSION)

    def hear(self, reply: Reply) -> dict[str, Any]:
        message = reply.raise_for_status().response["choices"][0]["message"]
        assert reply.state is not None
        self.states.append(reply.state)
        self.messages.append({"role": "assistant", "content": message["content"]})
        return dict(reply.response["rollout"]["session"])

    def fork(self, messages: int) -> "Talk":
        """Another conversation with the same beginning."""
        return Talk(self.client, [dict(message) for message in self.messages[:messages]])


def samples(client: Client) -> list[SessionSample]:
    return client.session(SESSION).samples().result(LIMIT_S)


def whole(one: SessionSample | RolloutState) -> TokenIds:
    return TokenIds([*one.prompt_ids, *one.response_ids])


def trained(found: list[SessionSample]) -> list[int]:
    return [
        token
        for sample in found
        for token, mask in zip(sample.response_ids, sample.response_mask, strict=True)
        if mask
    ]


def drawn(*states: RolloutState) -> list[int]:
    return [token for state in states for token in state.response_ids]


def test_twenty_turns_make_one_sample_with_the_engines_own_tokens(
    client: Client, serve: Serve
) -> None:
    serve()
    talk = Talk(client)
    for turn in range(1, 21):
        place = talk.say(f"question {turn}", f"answer {turn} ")
        assert (place["turn"] if turn > 1 else 1) == turn
        assert "branch" not in place
    for earlier, later in pairwise(talk.states):
        assert later.session is not None
        assert later.prompt_ids[: later.session.reused_tokens] == whole(earlier)
        assert later.session.parent == earlier.rollout_id
    (sample,) = samples(client)
    assert whole(sample) == whole(talk.states[-1])
    assert trained([sample]) == drawn(*talk.states)
    kept = [p for p, mask in zip(sample.logprobs, sample.response_mask, strict=True) if mask]
    assert kept == [logprob for state in talk.states for logprob in state.logprobs]
    assert sample.rollout_ids == tuple(state.rollout_id for state in talk.states)


def test_forks_share_what_was_before_and_train_it_once(client: Client, serve: Serve) -> None:
    serve()
    talk = Talk(client)
    for turn in range(3):
        talk.say(f"question {turn}", f"answer {turn}")
    fork = talk.fork(4)
    place = fork.say("another question", "another answer")
    assert place["parent"] == talk.states[1].rollout_id
    again = fork.fork(len(fork.messages) - 2)
    again.say("another question", "a second answer")
    first, second, third = samples(client)
    assert [whole(one) for one in (first, second, third)] == [
        whole(one.states[-1]) for one in (talk, fork, again)
    ]
    assert trained([first]) == drawn(*talk.states)
    assert trained([second]) == drawn(*fork.states)
    assert trained([third]) == drawn(*again.states)


def test_rewritten_history_is_a_new_branch_and_says_so(client: Client, serve: Serve) -> None:
    serve()
    talk = Talk(client)
    talk.say("one", "first")
    talk.say("two", "second")
    rewritten = talk.fork(2)
    rewritten.messages[1]["content"] = "what the policy never said"
    place = rewritten.say("two", "third")
    assert place["branch"] == "no answer of the session begins this conversation"
    assert "parent" not in place
    kept = talk.fork(4)
    kept.messages[3] = {"role": "assistant", "content": "rewritten too"}
    assert kept.say("three", "fourth")["parent"] == talk.states[0].rollout_id
    found = samples(client)
    assert [sample.branch for sample in found] == [None, place["branch"], None]
    assert sorted(trained(found)) == sorted(drawn(*talk.states, *rewritten.states, *kept.states))


def test_compaction_goes_on_as_a_branch_of_its_own(client: Client, serve: Serve) -> None:
    serve()
    talk = Talk(client)
    for turn in range(3):
        talk.say(f"question {turn}", f"answer {turn}")
    short = Talk(client, [{"role": "system", "content": "Before: three questions."}])
    assert "branch" in short.say("question 3", "answer 3")
    assert short.say("question 4", "answer 4")["turn"] == 2
    first, second = samples(client)
    assert (whole(first), whole(second)) == (whole(talk.states[-1]), whole(short.states[-1]))
    assert trained([first, second]) == drawn(*talk.states, *short.states)


def test_samples_of_a_group_are_siblings(client: Client, serve: Serve) -> None:
    serve()
    body = {"messages": [{"role": "user", "content": "x"}], "n": 3, "rollout": {"session": SESSION}}
    reply = client.submit(body).result(LIMIT_S).raise_for_status()
    assert reply.response["rollout"]["session"] == {"id": SESSION}
    found = samples(client)
    assert [sample.rollout_ids for sample in found] == [(s.rollout_id,) for s in reply.states]
    assert [whole(sample) for sample in found] == [whole(state) for state in reply.states]
    turns = client.session(SESSION).turns().result(LIMIT_S)
    assert [turn.parent for turn in turns] == [None] * 3


def test_a_conversation_goes_on_in_another_dialect(client: Client, serve: Serve) -> None:
    serve()
    talk = Talk(client)
    talk.say("one", "first")
    messages = [*talk.messages, {"role": "user", "content": "two"}]
    body = {"messages": messages, "max_tokens": 64, "rollout": {"script": {"text": "second"}}}
    reply = client.submit(body, protocol="claude.messages", session=SESSION).result(LIMIT_S)
    place = reply.raise_for_status().response["rollout"]["session"]
    assert (place["turn"], place["parent"]) == (2, talk.states[0].rollout_id)
    given = {**body, "sample_params": {"max_tokens": 64}}
    del given["max_tokens"]
    reply = client.submit(given, protocol="generate", session=SESSION).result(LIMIT_S)
    assert reply.raise_for_status().response["rollout"]["session"] == place


def test_two_workers_share_sessions_and_a_killed_ones_turn_is_kept_once(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    workers = {worker.worker_id: worker for worker in (serve(lease_s=1.5), serve(lease_s=1.5))}
    talk = Talk(client)
    for turn in range(4):
        talk.say(f"question {turn}", f"answer {turn}")
    future = talk.ask("last", "a long answer" * 8, ms_per_token=30)
    wait_until(lambda: look("XLEN", look.keys.progress(future.job_id)) > 0, "it has a checkpoint")
    workers[look.reply(future.job_id)["worker"]].kill()
    reply = future.result(LIMIT_S)
    assert (reply.attempts, talk.hear(reply)["turn"]) == (2, 5)
    (sample,) = samples(client)
    assert whole(sample) == whole(talk.states[-1])
    assert sample.rollout_ids == tuple(state.rollout_id for state in talk.states)
    assert look("HGET", look.keys.session(SESSION), "turns") == b"5"
    nothing_left()


def test_a_released_session_begins_anew(client: Client, serve: Serve) -> None:
    serve()
    talk = Talk(client)
    talk.say("one", "first")
    session = client.session(SESSION)
    assert session.release().result(LIMIT_S) is True
    assert session.release().result(LIMIT_S) is False
    assert session.samples().result(LIMIT_S) == []
    assert "parent" not in talk.say("two", "second")
    (sample,) = samples(client)
    assert trained([sample]) == drawn(talk.states[-1])


@pytest.mark.parametrize("streamed", [False, True])
def test_a_session_released_between_two_attempts_of_a_job_puts_no_other_prompt_before_its_tokens(
    client: Client, serve: Serve, look: Look, *, streamed: bool
) -> None:
    victim = serve(lease_s=0.9, slots=1, checkpoint_tokens=5)
    talk = Talk(client)
    talk.say("one", "first")
    talk.messages.append({"role": "user", "content": "two"})
    script = {"script": {"text": "x" * 200, "ms_per_token": 20}}
    body = {"messages": talk.messages, "stream": streamed, "rollout": script}
    future = client.submit(body, session=SESSION)
    wait_until(lambda: int(look.reply(future.job_id).get("kept:0", 0)) >= 10, "some are kept")
    victim.kill()
    assert client.session(SESSION).release().result(LIMIT_S)
    serve(lease_s=0.9, slots=1)
    reply = future.result(LIMIT_S)
    assert (reply.attempts, reply.status, reply.code) == (2, "failed", 410)
    assert reply.error == "session_released"


async def test_a_session_can_be_awaited(client: Client, serve: Serve) -> None:
    serve()
    await client.sample("text", session="t")
    await client.sample([72, 105], session="t")
    first, second = await client.session("t").samples()
    assert bytes(first.prompt_ids.tolist()) == b"text"
    assert (list(second.prompt_ids), second.branch is not None) == ([72, 105], True)


@pytest.mark.parametrize("name", ["", "x" * 257])
def test_a_session_without_a_proper_name_is_refused(client: Client, name: str) -> None:
    with pytest.raises(InvalidRequest, match="`session`"):
        client.session(name)
