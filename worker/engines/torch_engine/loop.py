"""The thread that steps a runner while there is work, and sleeps while there is none."""

import logging
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from protocols.errors import EngineFailed, RolloutError
from worker.engines.base import Counters
from worker.engines.stream import put_all

from .runner import Runner
from .schedule import Request

Act = Callable[[], None]

logger = logging.getLogger(__name__)


class SlotLoop:
    """A runner at work. Whatever ends it reaches every reader as EngineFailed."""

    def __init__(
        self,
        runner: Runner,
        readers: AbstractEventLoop,
        policy_version: Callable[[], int],
        broken: Callable[[EngineFailed], None],
    ) -> None:
        """Starts the thread; segments are put, and `broken` is told of its end, in the event loop `readers`."""
        self._runner = runner
        self._readers = readers
        self._policy_version = policy_version
        self._broken = broken
        self._inbox: list[Request] = []
        self._acts: list[tuple[Future[None], Act]] = []
        self._due: list[tuple[Future[None], Act]] = []
        """Acts taken in together with the requests that came before them."""
        self._counters = runner.counters()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Hand a request to the thread; raises EngineFailed where it has ended."""
        with self._changed:
            self._refuse_if_ended()
            self._inbox.append(request)
            self._changed.notify()

    def at_rest(self, act: Act) -> "Future[None]":
        """Call `act` in the thread, between two steps, when all that was computed is forgotten.

        The future raises EngineBusy where samples are under way, what `act` refuses, and EngineFailed where the thread
        has ended or `act` broke, which ends the thread too: nobody knows what was done by then.
        """
        done: Future[None] = Future()
        with self._changed:
            self._refuse_if_ended()
            self._acts.append((done, act))
            self._changed.notify()
        return done

    @property
    def counters(self) -> Counters:
        """As of the last step, with the requests that came since."""
        with self._changed:
            arrived = sum(not one.ended for request in self._inbox for one in request.samples)
            return {
                **self._counters,
                "waiting_samples": self._counters["waiting_samples"] + arrived,
            }

    def close(self, limit_s: float) -> None:
        """End the thread after its step; open streams fail. Blocks, at most `limit_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(limit_s)
        if self._thread.is_alive():
            logger.warning("the torch engine's step did not end within %.0f s", limit_s)

    def _refuse_if_ended(self) -> None:
        if self._failure is not None:
            raise EngineFailed(self._failure)

    def _run(self) -> None:
        failure = "the torch engine was closed; another worker can take the job"
        try:
            with torch.inference_mode():
                while self._collect():
                    while self._due:
                        self._act(*self._due.pop(0))
                    self._step()
        except Exception as error:
            # whatever broke the step, memory included, the rows can no longer be trusted and every reader must know
            logger.exception("the torch engine ended")
            failure = (
                f"the torch engine failed while it generated ({type(error).__name__}); its worker must "
                "be restarted"
            )
            self._post(partial(self._broken, EngineFailed(failure)))
        finally:
            self._end(failure)

    def _step(self) -> None:
        batch = self._runner.step(self._policy_version())
        self._count()
        if batch:
            self._post(partial(put_all, batch))

    def _count(self) -> None:
        with self._changed:
            self._counters = self._runner.counters()

    def _act(self, done: "Future[None]", act: Act) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            self._runner.vacate()
            self._count()
            # what is made in inference mode could not be put into a parameter
            with torch.inference_mode(mode=False), torch.no_grad():
                act()
        except RolloutError as refusal:
            done.set_exception(refusal)
        except BaseException:
            done.set_exception(
                EngineFailed("the torch engine failed while its weights were changed")
            )
            raise
        else:
            done.set_result(None)

    def _collect(self) -> bool:
        """Wait until there is something to do, and take in new requests; False when closing."""
        with self._changed:
            while not (self._closing or self._inbox or self._acts or self._runner.busy):
                self._changed.wait()
            for request in self._inbox:
                self._runner.submit(request)
            self._inbox.clear()
            self._due.extend(self._acts)
            self._acts.clear()
            self._counters = self._runner.counters()
            return not self._closing

    def _end(self, failure: str) -> None:
        with self._changed:
            self._failure = failure
            requests = self._runner.requests().union(self._inbox)
            for done, _ in (*self._due, *self._acts):
                if done.set_running_or_notify_cancel():
                    done.set_exception(EngineFailed(failure))
        self._post(partial(put_all, [(one.stream, EngineFailed(failure)) for one in requests]))

    def _post(self, put: Callable[[], None]) -> None:
        """Call `put` in the readers' event loop, if that still runs."""
        try:
            self._readers.call_soon_threadsafe(put)
        except RuntimeError:
            if not self._readers.is_closed():
                raise
            self._closing = True
