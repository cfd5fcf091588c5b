"""How long the server has been there without a gap, and what a lease keeper keeps of an attempt that has ended."""

import gc
import weakref
from types import SimpleNamespace

import pytest

from protocols.queue.rows import Lease
from worker import lease
from worker.lease import Contact, LeaseKeeper
from worker.pipeline import Attempt


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`clock.now` is the time; nothing else moves it."""
    made = SimpleNamespace(now=1000.0)
    made.monotonic = lambda: made.now
    monkeypatch.setattr(lease, "time", made)
    return made


def seen_for(contact: Contact, clock: SimpleNamespace, seconds: float, *, opened: int = 1) -> None:
    """Contact every second."""
    for _ in range(int(seconds)):
        clock.now += 1.0
        contact.seen(opened)


def test_nothing_may_be_reclaimed_before_a_whole_lease_of_contact(clock: SimpleNamespace) -> None:
    contact = Contact(15.0)
    contact.seen(1)
    seen_for(contact, clock, 14)
    assert not contact.whole_lease
    seen_for(contact, clock, 1)
    assert contact.whole_lease
    seen_for(contact, clock, 100)
    assert contact.whole_lease


@pytest.mark.parametrize(("gap_s", "anew"), [(4.9, False), (5.1, True), (60.0, True)])
def test_a_gap_longer_than_a_third_of_a_lease_starts_it_anew(
    clock: SimpleNamespace, gap_s: float, anew: bool
) -> None:
    contact = Contact(15.0)
    contact.seen(1)
    seen_for(contact, clock, 20)
    clock.now += gap_s
    contact.seen(1)
    assert contact.whole_lease is not anew
    seen_for(contact, clock, 15)
    assert contact.whole_lease


def test_another_connection_starts_it_anew_however_short_the_gap(clock: SimpleNamespace) -> None:
    contact = Contact(15.0)
    contact.seen(1)
    seen_for(contact, clock, 20)
    clock.now += 0.01
    contact.seen(2)
    assert not contact.whole_lease
    seen_for(contact, clock, 15, opened=2)
    assert contact.whole_lease


def test_the_first_answer_late_does_not_count_what_was_before(clock: SimpleNamespace) -> None:
    contact = Contact(15.0)
    clock.now += 100
    contact.seen(1)
    assert not contact.whole_lease


def test_an_attempt_that_was_dropped_is_freed_without_a_collection() -> None:
    keeper = LeaseKeeper("redis://localhost", "pool", "w", lease_s=15, crash_limit=3)
    attempt = Attempt(Lease(job_id="j", fence="1:n", lane="normal", left_ms=None, fields={}))
    there = weakref.ref(attempt)
    gc.disable()
    try:
        keeper.hold(attempt)
        keeper.drop(attempt)
        del attempt
        assert there() is None
    finally:
        gc.enable()
