"""What anyone may look at: a pool's workers, depth and desired state, the history of a job."""

from protocols.queue.broker import Broker
from protocols.queue.keys import LANES
from protocols.queue.rows import texts


async def workers(broker: Broker, *, seen_ms: int) -> dict[str, dict[str, str]]:
    """What the workers say of themselves, by id: those whose last heartbeat is at most `seen_ms` old."""
    since_ms = await _now_ms(broker) - seen_ms
    ids = await broker.link.call("ZRANGEBYSCORE", broker.keys.workers, since_ms, "+inf")
    rows = await broker.link.calls([["HGETALL", broker.keys.worker(raw.decode())] for raw in ids])
    return {
        raw.decode(): {k: v for k, v in texts(row).items() if not k.startswith("take_")}
        for raw, row in zip(ids, rows, strict=True)
    }


async def live_workers(broker: Broker, *, seen_ms: int) -> int:
    """How many workers have a heartbeat at most `seen_ms` old."""
    since_ms = await _now_ms(broker) - seen_ms
    return int(await broker.link.call("ZCOUNT", broker.keys.workers, since_ms, "+inf"))


async def depth(broker: Broker) -> dict[str, int]:
    """Entries by lane (running ones included), leases, delayed and parked jobs, dead letters."""
    commands = [["XLEN", broker.keys.jobs(lane)] for lane in LANES]
    commands += [
        ["ZCARD", broker.keys.leases],
        ["ZCARD", broker.keys.delayed],
        ["ZCARD", broker.keys.parked],
        ["XLEN", broker.keys.dead],
    ]
    names = (*LANES, "leases", "delayed", "parked", "dead")
    return dict(zip(names, await broker.link.calls(commands), strict=True))


async def desired(broker: Broker) -> dict[str, str]:
    """The desired state; empty where there is none."""
    return texts(await broker.link.call("HGETALL", broker.keys.desired))


async def history(broker: Broker, job_id: str) -> dict[str, str]:
    """What the reply hash says beside body and state; empty where the job is unknown."""
    row = await broker.link.call("HGETALL", broker.keys.reply(job_id))
    pairs = zip(row[::2], row[1::2], strict=True)
    return {k.decode(): v.decode() for k, v in pairs if k not in (b"body", b"state")}


async def _now_ms(broker: Broker) -> int:
    seconds, micros = await broker.link.call("TIME")
    return int(seconds) * 1000 + int(micros) // 1000
