"""The control channel without a server: words, steps, and when an order is done."""

import itertools

import pytest

from protocols.control import (
    MESSAGE_BYTES,
    Command,
    Desired,
    Gate,
    Memory,
    Mode,
    Standing,
    State,
    Step,
    next_step,
    settled,
    words,
    words_of,
)
from protocols.errors import InvalidCommand

GATES: tuple[Gate, ...] = ("open", "closed")
MODES: tuple[Mode, ...] = ("release", "drain", "keep", "abort")
MEMORIES: tuple[Memory, ...] = ("loaded", "offloaded", "discarded", "stale")


def standing(
    gate: Gate = "open",
    mode: Mode | None = None,
    memory: Memory = "loaded",
    *,
    version: int = 0,
    running: int = 0,
    held: int = 0,
) -> Standing:
    return Standing(gate, mode, memory, version, running, held)


def desired(
    gate: Gate = "open",
    mode: Mode = "release",
    memory: Memory = "loaded",
    *,
    weights: int | None = None,
) -> Desired:
    return Desired(gate, mode, memory, weights, None, None, "e", 7)


def command(said: str) -> Command:
    return Command("c", said, said.partition(" ")[0], None, 7, 0, "me")


@pytest.mark.parametrize(
    ("message", "meant"),
    [
        ("pause", ["pause"]),
        ("  pause   mode=drain\n", ["pause", "mode=drain"]),
        ('{"verb": "pause", "mode": "drain"}', ["pause", "mode=drain"]),
        ('{"mode": "drain", "verb": "pause"}', ["pause", "mode=drain"]),
        (
            ' {"verb": "update_weights", "version": 3, "uri": "/a b"}',
            ["update_weights", "version=3", "uri=/a b"],
        ),
        ('{"verb": "shutdown", "now": true}', ["shutdown", "now=true"]),
        ('{"mode": "drain"}', ["", "mode=drain"]),
        ("", []),
    ],
)
def test_published_words_and_json_mean_the_same(message: str, meant: list[str]) -> None:
    assert words_of(message) == meant


@pytest.mark.parametrize(
    "message",
    [
        '{"verb": "pause"',
        '{"verb": ["pause"]}',
        '{"verb": "pause", "mode": null}',
        "x" * (MESSAGE_BYTES + 1),
    ],
)
def test_what_is_neither_words_nor_json_is_refused(message: str) -> None:
    with pytest.raises(InvalidCommand):
        words_of(message)


def test_none_leaves_an_option_out() -> None:
    options = {"mode": "keep", "worker": None, "timeout_s": 5, "now": False}
    assert words("pause", options) == ["pause", "mode=keep", "timeout_s=5", "now=false"]


@pytest.mark.parametrize(
    ("now", "state"),
    [
        (standing(), "serving"),
        (standing("closed", "drain"), "paused"),
        (standing("closed", "release", "offloaded"), "offloaded"),
        (standing("closed", "release", "discarded"), "offloaded"),
        (standing("closed", "release", "stale"), "stale"),
        (standing("open", None, "stale"), "stale"),
    ],
)
def test_a_worker_is_in_one_state(now: Standing, state: State) -> None:
    assert now.state == state


@pytest.mark.parametrize(
    ("now", "wanted", "step"),
    [
        (standing(), desired(), None),
        (standing(), desired("closed"), "pause"),
        (standing("closed"), desired("closed"), "pause"),
        (standing("closed", "drain"), desired("closed", "abort"), "pause"),
        (standing("closed", "drain"), desired("closed", "drain"), None),
        (standing("closed", "drain"), desired(), "continue"),
        (standing("closed", "release"), desired("closed", memory="offloaded"), "offload"),
        (standing("closed", "release"), desired("closed", memory="discarded"), "offload"),
        (standing("closed", "release", running=1), desired("closed", memory="offloaded"), None),
        (standing("closed", "release", held=1), desired("closed", memory="offloaded"), "offload"),
        (
            standing("closed", "release", "offloaded"),
            desired("closed", memory="discarded"),
            "offload",
        ),
        (standing("closed", "release", "discarded"), desired("closed", memory="offloaded"), None),
        (standing("closed", "release", "offloaded"), desired("closed"), "onload"),
        (
            standing("closed", "release", "discarded"),
            desired("closed", memory="stale"),
            "onload",
        ),
        (standing("closed", "release", "stale"), desired("closed", memory="stale"), None),
        (standing("closed", "release", "stale"), desired("closed"), "update_weights"),
        (standing("closed", "release"), desired("closed", weights=1), "update_weights"),
        (standing(version=1), desired(weights=1), None),
        (standing(), desired(weights=1), "update_weights"),
        (standing("closed"), desired(weights=1), "update_weights"),
        (standing("open", None, "discarded"), desired(), "onload"),
    ],
)
def test_the_next_step_leads_to_what_is_wanted(
    now: Standing, wanted: Desired, step: Step | None
) -> None:
    assert next_step(now, wanted) == step


def taken(step: Step, now: Standing, wanted: Desired) -> Standing:
    """What a worker is doing after a step that succeeded."""
    memory, version = now.memory, now.version
    match step:
        case "pause":
            return standing("closed", wanted.mode, memory, version=version)
        case "continue":
            return standing("open", None, memory, version=version)
        case "offload":
            return standing(now.gate, now.mode, wanted.memory, version=version)
        case "onload":
            memory = "stale" if memory == "discarded" else "loaded"
            return standing(now.gate, now.mode, memory, version=version)
        case "update_weights":
            version = now.version if wanted.weights is None else wanted.weights
            return standing(now.gate, now.mode, version=version)


EVERYWHERE = [
    standing(gate, mode, memory, version=version)
    for gate, mode, memory, version in itertools.product(GATES, (None, *MODES), MEMORIES, (0, 1))
    if (gate == "open") == (mode is None)
]
EVERYTHING = [
    desired(gate, mode, memory, weights=weights)
    for gate, mode, memory, weights in itertools.product(GATES, MODES, MEMORIES, (None, 0, 1))
    if gate == "closed" or memory == "loaded"
]


@pytest.mark.parametrize("wanted", EVERYTHING, ids=repr)
def test_steps_lead_from_every_state_to_every_wish(wanted: Desired) -> None:
    for start in EVERYWHERE:
        now, steps = start, list[Step]()
        while step := next_step(now, wanted):
            steps.append(step)
            assert len(steps) <= 4, (start, steps)
            now = taken(step, now, wanted)
        assert settled(now, wanted), (start, steps, now)
        assert now.gate == wanted.gate
        assert wanted.weights in (None, now.version) or wanted.memory != "loaded"


@pytest.mark.parametrize("wanted", EVERYTHING, ids=repr)
def test_no_job_is_taken_on_the_way_before_all_is_as_wanted(wanted: Desired) -> None:
    for start in EVERYWHERE:
        now = start
        while step := next_step(now, wanted):
            now = taken(step, now, wanted)
            if step == "continue":
                assert next_step(now, wanted) is None, start
            if wanted.gate == "closed":
                assert now.gate == "closed", (start, step)


@pytest.mark.parametrize(
    ("mode", "running", "held", "done"),
    [
        ("release", 0, 0, True),
        ("release", 1, 0, False),
        ("abort", 1, 0, False),
        ("abort", 0, 1, False),
        ("drain", 3, 0, True),
        ("keep", 0, 3, True),
        ("keep", 2, 1, True),
    ],
)
def test_a_pause_that_ends_jobs_is_done_when_they_have_ended(
    mode: Mode, running: int, held: int, *, done: bool
) -> None:
    now = standing("closed", mode, running=running, held=held)
    assert settled(now, desired("closed", mode)) is done


def test_an_offload_is_not_done_while_jobs_run() -> None:
    wanted = desired("closed", "drain", "offloaded")
    now = standing("closed", "drain", running=1)
    assert next_step(now, wanted) is None
    assert not settled(now, wanted)


@pytest.mark.parametrize(
    ("said", "wanted", "still"),
    [
        ("pause", desired("closed"), True),
        ("pause", desired("closed", "drain"), False),
        ("pause mode=drain", desired("closed", "drain"), True),
        ("pause", desired(), False),
        ("continue", desired(), True),
        ("continue", desired("closed"), False),
        ("offload", desired("closed", memory="offloaded"), True),
        ("offload level=2", desired("closed", memory="discarded"), True),
        ("offload", desired("closed"), False),
        ("onload", desired("closed"), True),
        ("onload", desired("closed", memory="stale"), True),
        ("onload", desired("closed", memory="offloaded"), False),
        ("update_weights version=3 uri=/w", desired(weights=3), True),
        ("update_weights version=3 uri=/w", desired(weights=4), False),
        ("update_weights version=3 uri=/w", desired(), False),
    ],
)
def test_an_order_is_replaced_by_one_that_wants_something_else(
    said: str, wanted: Desired, *, still: bool
) -> None:
    assert command(said).still_wanted(wanted) is still


def test_an_order_to_one_worker_stands_beside_those_to_all() -> None:
    fields = {
        "gate": "open",
        "mode": "release",
        "memory": "loaded",
        "weights": "",
        "uri": "",
        "sha256": "",
        "epoch": "e",
        "generation": "4",
        "gate@a": "closed",
        "mode@a": "keep",
    }
    one, other = Desired.of(fields, "a"), Desired.of(fields, "b")
    assert (one.gate, one.mode, one.memory) == ("closed", "keep", "loaded")
    assert (other.gate, other.mode) == ("open", "release")
    assert (one.weights, one.uri, one.generation) == (None, None, 4)
