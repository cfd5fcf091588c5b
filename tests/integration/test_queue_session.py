"""What a session keeps on the server, and when: with the reply, once, and only of accepted answers."""

from protocols import codec
from protocols.job import JobStatus, Segment
from protocols.queue.broker import Broker
from protocols.queue.rows import Ending, Hold, Lease
from protocols.rollout_state import Logprobs, TokenIds
from protocols.session import SESSION_TURNS, NewTurn, Node
from tests.job_body import job
from tests.pool_look import Look
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers

ASKER = Lease("none", "1:n", "normal", None, {})
"""Of a job that the server does not know: nothing is decided for it."""
SIX_HOURS_MS = 6 * 3600 * 1000


def node(*ids: int) -> Node:
    return Node(TokenIds([1, 2]), TokenIds(ids), Logprobs(-float(i) for i in ids), ((0, 0),))


def new(rollout_id: str, parent: str = "", *ids: int, mark: str | None = None) -> NewTurn:
    return NewTurn(rollout_id, parent, mark or f"after {rollout_id}", codec.pack_node(node(*ids)))


def segment() -> Segment:
    return Segment(0, 0, TokenIds([7]), Logprobs([-1.0]), TokenIds(), Logprobs(), 0)


def ending(lease: Lease, *turns: NewTurn, status: JobStatus = JobStatus.COMPLETED) -> Ending:
    return Ending(lease.job_id, lease.fence, status, 200, b"{}", session="s", turns=turns)


async def finished(broker: Broker, take: Take, job_id: str, *turns: NewTurn) -> bool:
    await broker.enqueue([job(job_id)])
    (lease,) = await take()
    (accepted,) = await broker.finish([ending(lease, *turns)])
    return accepted


async def test_a_turn_is_found_by_the_longest_beginning_that_is_known(
    broker: Broker, take: Take
) -> None:
    await finished(broker, take, "a", new("a/0", "", 3))
    await finished(broker, take, "b", new("b/0", "a/0", 4, 5))
    known = await broker.recall(ASKER, "s", ["after c/0", "after b/0", "after a/0"])
    assert [name for name, _ in known.path] == ["a/0", "b/0"]
    assert [kept.response_ids for _, kept in known.path] == [TokenIds([3]), TokenIds([4, 5])]
    assert [len(kept.logprobs) for _, kept in known.path] == [0, 0]
    assert [len(turn.node.logprobs) for turn in await broker.turns("s")] == [1, 2]
    assert (known.turns, known.full) == (2, False)
    assert (await broker.recall(ASKER, "s", ["after a/0"])).path == known.path[:1]
    assert (await broker.recall(ASKER, "s", ["another"])).path == ()
    assert (await broker.recall(ASKER, "another", ["after a/0"])).turns == 0
    assert (await broker.recall(ASKER, "s", [])).turns == 2


async def test_a_job_with_tokens_stays_with_the_turn_that_they_go_on_from(
    broker: Broker, take: Take
) -> None:
    marks = ["after b/0", "after a/0"]
    await finished(broker, take, "a", new("a/0", "", 3))
    await broker.enqueue([job("c")])
    (lease,) = await take()
    first = await broker.recall(lease, "s", marks)
    assert [name for name, _ in first.path] == ["a/0"]
    assert await broker.renew([Hold("c", lease.fence, [segment()])], lease_ms=60_000) == ["held"]
    await finished(broker, take, "b", new("b/0", "a/0", 4))
    assert (await broker.recall(lease, "s", marks)).path == first.path
    assert await broker.release([Hold("c", lease.fence)]) == [True]
    (later,) = await take()
    assert (await broker.recall(later, "s", marks)).path == first.path
    await broker.forget("s")
    assert (await broker.recall(later, "s", marks)).gone


async def test_a_job_that_begins_with_no_turn_begins_with_none_again(
    broker: Broker, take: Take
) -> None:
    await broker.enqueue([job("c")])
    (lease,) = await take()
    assert (await broker.recall(lease, "s", ["after a/0"])).path == ()
    await broker.renew([Hold("c", lease.fence, [segment()])], lease_ms=60_000)
    await finished(broker, take, "a", new("a/0", "", 3))
    known = await broker.recall(lease, "s", ["after a/0"])
    assert (known.path, known.gone) == ((), False)


async def test_a_job_without_tokens_goes_on_from_whatever_is_known(
    broker: Broker, take: Take
) -> None:
    await finished(broker, take, "a", new("a/0", "", 3))
    await broker.enqueue([job("c")])
    (lease,) = await take()
    assert (await broker.recall(lease, "s", ["after a/0"])).path
    await broker.forget("s")
    known = await broker.recall(lease, "s", ["after a/0"])
    assert (known.path, known.gone) == ((), False)


async def test_a_turn_is_written_with_its_reply_and_once(
    broker: Broker, take: Take, look: Look
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    end = ending(lease, new("a/0", "", 3), new("a/1", "", 4))
    stranger = Ending("a", "1:other", JobStatus.COMPLETED, 200, b"{}", session="s", turns=end.turns)
    assert await broker.finish([stranger]) == [False]
    assert await broker.turns("s") == []
    assert await broker.finish([end, end]) == [True, True]
    assert await broker.finish([end]) == [True]
    turns = await broker.turns("s")
    assert [turn.rollout_id for turn in turns] == ["a/0", "a/1"]
    assert abs(turns[0].at_ms - look.now_ms()) < 60_000
    assert (await broker.recall(ASKER, "s", [])).turns == 2
    size = sum(len(turn.node) for turn in end.turns)
    assert (await broker.recall(ASKER, "s", [])).bytes == size
    assert 0 < look("PTTL", broker.keys.session("s")) <= SIX_HOURS_MS


async def test_the_first_of_two_equal_conversations_is_gone_on_from(
    broker: Broker, take: Take
) -> None:
    await finished(broker, take, "a", new("a/0", "", 3, mark="same"), new("a/1", mark="same"))
    known = await broker.recall(ASKER, "s", ["same"])
    assert [name for name, _ in known.path] == ["a/0"]


async def test_only_an_answer_becomes_a_turn(broker: Broker, take: Take, look: Look) -> None:
    await broker.enqueue([job("late", timeout_ms=60_000), job("cancelled")])
    late, cancelled = sorted(await take(2), key=lambda lease: lease.job_id, reverse=True)
    look("HSET", broker.keys.reply("late"), "deadline_ms", 1)
    ends = [
        ending(late, new("late/0")),
        ending(cancelled, status=JobStatus.CANCELLED),
    ]
    assert await broker.finish(ends) == [True, True]
    assert look.reply("late")["status"] == "expired"
    assert await broker.turns("s") == []


async def test_a_released_session_is_gone_and_a_turn_under_way_does_not_bring_half_of_it_back(
    broker: Broker, take: Take, look: Look
) -> None:
    await finished(broker, take, "a", new("a/0", "", 3))
    assert await broker.forget("s") is True
    assert await broker.forget("s") is False
    assert await finished(broker, take, "b", new("b/0", "a/0", 4))
    assert await broker.turns("s") == []
    assert look("EXISTS", broker.keys.session("s")) == 0


async def test_a_session_is_kept_as_long_as_the_reply_of_its_last_answer(
    broker: Broker, take: Take, look: Look
) -> None:
    await broker.enqueue([job("a", reply_ttl_ms=2 * SIX_HOURS_MS)])
    (lease,) = await take()
    await broker.finish([ending(lease, new("a/0"))])
    assert SIX_HOURS_MS < look("PTTL", broker.keys.session("s")) <= 2 * SIX_HOURS_MS
    await broker.enqueue([job("b", reply_ttl_ms=1000)])
    (lease,) = await take()
    await broker.finish([ending(lease, new("b/0", "a/0"))])
    assert SIX_HOURS_MS - 60_000 < look("PTTL", broker.keys.session("s")) <= SIX_HOURS_MS


async def test_a_full_session_says_so_and_a_large_one_is_read_whole(
    broker: Broker, take: Take
) -> None:
    for start in range(0, SESSION_TURNS, 512):
        names = [f"j{start}/{i}" for i in range(512)]
        await finished(broker, take, f"j{start}", *(new(name, "", 3) for name in names))
    assert (await broker.recall(ASKER, "s", ["none"])).full
    turns = await broker.turns("s")
    assert len({turn.rollout_id for turn in turns}) == SESSION_TURNS
    assert [turn.rollout_id for turn in turns[:2]] == ["j0/0", "j0/1"]
