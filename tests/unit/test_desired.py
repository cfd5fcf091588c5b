"""What a worker knows of the desired state, and when it writes it back."""

from types import SimpleNamespace

import pytest

from protocols.control import default_desired
from worker import controller
from worker.controller import FRESH_WAIT_S, Desired


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=1000.0)
    made.monotonic = lambda: made.now
    monkeypatch.setattr(controller, "time", made)
    return made


def test_a_fresh_worker_waits_for_one_that_knows(clock: SimpleNamespace) -> None:
    desired = Desired()
    assert desired.to_restore() is None
    clock.now += FRESH_WAIT_S - 0.1
    assert desired.to_restore() is None
    clock.now += 0.2
    restored = desired.to_restore()
    assert restored is not None
    assert (restored["gate"], restored["generation"]) == ("open", "0")


def test_what_was_seen_last_is_restored_at_once(clock: SimpleNamespace) -> None:
    desired = Desired()
    closed = {**default_desired(), "gate": "closed", "generation": "4"}
    desired.saw(default_desired())
    desired.saw(closed)
    assert desired.to_restore() == closed
    desired.saw({})  # the server lost it: a loss is no wish
    assert desired.to_restore() == closed


def test_defaults_of_two_workers_differ_in_their_epoch() -> None:
    assert default_desired()["epoch"] != default_desired()["epoch"]
