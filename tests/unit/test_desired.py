"""What a worker knows of the desired state, and when it writes it back."""

from types import SimpleNamespace

import pytest

from protocols.control import default_desired
from protocols.queue.rows import Beaten
from worker import controller
from worker.controller import FRESH_WAIT_S, Controller
from worker.steps import Steps


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=1000.0)
    made.monotonic = lambda: made.now
    monkeypatch.setattr(controller, "time", made)
    return made


def _controller() -> Controller:
    return Controller("w", Steps.__new__(Steps), lambda _: {})


def _told(desired: dict[str, str]) -> Beaten:
    return Beaten(0, desired, "0-0", [])


def test_a_fresh_worker_waits_for_one_that_knows(clock: SimpleNamespace) -> None:
    fresh = _controller()
    assert fresh.to_restore() is None
    clock.now += FRESH_WAIT_S - 0.1
    assert fresh.to_restore() is None
    clock.now += 0.2
    restored = fresh.to_restore()
    assert restored is not None
    assert (restored["gate"], restored["generation"]) == ("open", "0")


@pytest.mark.usefixtures("clock")
def test_what_was_seen_last_is_restored_at_once() -> None:
    knowing = _controller()
    closed = {**default_desired(), "gate": "closed", "generation": "4"}
    knowing.hear(_told(default_desired()))
    knowing.hear(_told(closed))
    assert knowing.to_restore() == closed
    knowing.hear(_told({}))  # the server lost it: a loss is no wish
    assert knowing.to_restore() == closed


def test_defaults_of_two_workers_differ_in_their_epoch() -> None:
    assert default_desired()["epoch"] != default_desired()["epoch"]


@pytest.mark.usefixtures("clock")
def test_a_desired_state_that_is_none_is_no_wish() -> None:
    knowing = _controller()
    good = {**default_desired(), "generation": "4"}
    knowing.hear(_told(good))
    knowing.hear(_told({**good, "gate": "ajar"}))
    knowing.hear(_told({"by": "somebody"}))
    assert knowing.to_restore() == good


@pytest.mark.usefixtures("clock")
def test_an_entry_that_no_step_has_written_is_no_command() -> None:
    knowing = _controller()
    knowing.hear(Beaten(0, default_desired(), "0-0", [[b"1-1", [b"verb", b"pause"]]]))
    assert knowing.answers() == {}
