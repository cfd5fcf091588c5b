"""The whole path in each dialect: a request goes in, the answer comes back in the dialect's own shape."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest

from producer_sdk import Client, JobStatus, Reply
from protocols.codec import decode_json, unpack_states
from tests.job_body import Body, chat, claude
from tests.pool_look import Look, wait_until
from tests.servers import both_servers

pytestmark = both_servers

RENDERED = [258, *b"Hi", 260, 259]
"""What the scripted engine's template makes of one user turn."""
END = 256
LIMIT_S = 60


@pytest.fixture
def pool(standing: str) -> str:
    return standing


def test_an_openai_job_comes_back_as_a_chat_completion(
    client: Client, nothing_left: Callable[[], None]
) -> None:
    before_s = int(time.time())
    reply = client.submit(chat("Hi", seed=7, user="me")).result(LIMIT_S)
    assert (reply.status, reply.code, reply.error) == (JobStatus.COMPLETED, 200, None)
    response = reply.response
    assert before_s <= response.pop("created") <= time.time()
    logprobs = response["rollout"].pop("logprobs")
    assert len(logprobs) == 3
    assert all(value < 0 for value in logprobs)
    assert response == {
        "id": f"chatcmpl-{reply.job_id}",
        "object": "chat.completion",
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
        "rollout": {
            "attempts": 1,
            "ignored": ["user"],
            "prompt_token_ids": RENDERED,
            "token_ids": [*b"Hi", END],
            "policy_versions": [[0, 0]],
        },
    }
    nothing_left()


def test_an_openai_job_of_several_samples_has_a_choice_each(client: Client) -> None:
    body = chat("Hi", n=3, logprobs=True, top_logprobs=2, stop=["i"], max_tokens=5)
    reply = client.submit(body).result(LIMIT_S)
    choices = reply.response["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for choice in choices:
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "i")
        assert choice["message"]["content"] == "H"
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["H", "i"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
        assert choice["rollout"]["token_ids"] == list(b"Hi")
    assert reply.response["usage"]["completion_tokens"] == 6
    assert [state.rollout_id for state in reply.states] == [f"{reply.job_id}/{i}" for i in range(3)]


def test_a_claude_job_comes_back_as_a_message(client: Client) -> None:
    body = claude("Hi there", stop_sequences=[" th"], system="Be brief")
    reply = client.submit(body, protocol="claude.messages").result(LIMIT_S)
    response = reply.response
    rollout = response.pop("rollout")
    assert rollout["token_ids"] == list(b"Hi th")
    assert response == {
        "type": "message",
        "id": f"msg_{reply.job_id}",
        "role": "assistant",
        "model": "scripted",
        "content": [{"type": "text", "text": "Hi"}],
        "stop_reason": "stop_sequence",
        "stop_sequence": " th",
        "usage": {
            "input_tokens": len("Be brief") + 2 + len("Hi there") + 2 + 1,
            "output_tokens": 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        },
    }


def test_a_generate_job_takes_token_ids_and_gives_them(client: Client) -> None:
    body: Body = {"input_ids": RENDERED, "sample_params": {"n": 2, "top_logprobs": 1}}
    reply = client.submit(body, protocol="generate").result(LIMIT_S)
    response = reply.response
    assert response["prompt_ids"] == RENDERED
    for index, sample in enumerate(response["samples"]):
        assert (sample["index"], sample["text"], sample["status"]) == (index, "Hi", "completed")
        assert sample["response_ids"] == [*b"Hi", END]
        assert len(sample["logprobs"]) == len(sample["top_logprobs"]) == 3
        assert sample["finish_reason"] == "stop"
        assert sample["policy_versions"] == [[0, 0]]


def test_one_prompt_gives_the_same_tokens_in_every_dialect(client: Client) -> None:
    futures = [
        client.submit(chat("Hi")),
        client.submit(claude("Hi"), protocol="claude.messages"),
        client.submit({"input_ids": RENDERED}, protocol="generate"),
        client.submit({"messages": chat("Hi")["messages"]}, protocol="generate"),
    ]
    states = [future.result(LIMIT_S).states[0] for future in futures]
    assert len({state.prompt_ids.tobytes() for state in states}) == 1
    assert len({state.response_ids.tobytes() for state in states}) == 1
    assert len({state.logprobs.tobytes() for state in states}) == 1


def test_the_state_agrees_with_the_response(client: Client) -> None:
    reply = client.submit(chat("Grüße, 世界", max_tokens=11)).result(LIMIT_S)
    (state,) = reply.states
    shown = reply.response["rollout"]
    assert state.text == reply.response["choices"][0]["message"]["content"]
    assert state.response_ids.tolist() == shown["token_ids"] == list("Grüße, 世界".encode()[:11])
    assert state.logprobs.tolist() == shown["logprobs"]
    assert state.prompt_ids.tolist() == shown["prompt_token_ids"]
    assert (state.finish_reason, state.status) == ("length", "completed")
    assert state.sample_params.max_tokens == 11
    assert state.group_id == reply.job_id


def redis_cli(url: str, *words: str) -> str:
    """What the real command prints."""
    command = shutil.which("redis-cli")
    if command is None:
        pytest.skip("redis-cli is not installed (Debian: redis-tools)")
    done = subprocess.run(
        [command, "-u", url, *words], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    return done.stdout


def test_redis_cli_alone_sends_a_job_and_reads_its_reply(
    url: str, pool: str, look: Look, nothing_left: Callable[[], None]
) -> None:
    job_id = f"hello-{time.time_ns()}"
    body = (
        '{"messages":[{"role":"user","content":"What is the capital of France?"}],'
        '"max_tokens":16,"temperature":0}'
    )
    entry = redis_cli(
        url, "XADD", f"rollout:{{{pool}}}:jobs:normal", "*", "id", job_id, "body", body
    )
    assert "-" in entry
    wait_until(lambda: look.reply(job_id).get("status") == "completed", "the job is completed")
    shown = redis_cli(url, "--no-raw", "HGETALL", f"rollout:{{{pool}}}:reply:{job_id}")
    assert '"completed"' in shown
    answer = json.loads(redis_cli(url, "HGET", f"rollout:{{{pool}}}:reply:{job_id}", "body"))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "What is the capi"
    assert answer["choices"][0]["finish_reason"] == "length"
    nothing_left()


def test_the_reply_hash_needs_no_client_to_be_read(client: Client, look: Look) -> None:
    reply = client.submit(chat("Hi", n=2), group="g1").result(LIMIT_S)
    kept: dict[bytes, bytes] = look("HGETALL", look.keys.reply(reply.job_id))
    assert (kept[b"status"], kept[b"code"], kept[b"attempts"]) == (b"completed", b"200", b"1")
    assert kept[b"policy_version"] == b"0"
    assert kept[b"worker"].startswith(b"standing-")
    assert abs(int(kept[b"finished_ms"]) - look.now_ms()) < 60_000
    assert decode_json(kept[b"body"]) == reply.response
    assert unpack_states(kept[b"state"]) == reply.states
    assert {state.group_id for state in reply.states} == {"g1"}
    assert isinstance(reply, Reply)
