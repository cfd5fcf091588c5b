"""The client: one object, sync and async, cheap to pickle."""

import importlib
import itertools
import os
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack

import msgspec
from msgspec.structs import replace
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from producer_sdk.control import WAIT_S, control, who
from producer_sdk.courier import Courier
from producer_sdk.fleet import Fleet, look
from producer_sdk.future import Future, Pending, converted
from producer_sdk.group import Group
from producer_sdk.progress import Progress
from producer_sdk.promise import Doorbell, Promise
from producer_sdk.results import Results
from producer_sdk.session import Session
from producer_sdk.stream import Source, Stream
from protocols import codec
from protocols.control import words
from protocols.dialects.generate import request_params
from protocols.errors import ConfigError, InvalidRequest
from protocols.job import DEFAULT_PROTOCOL, DEFAULT_REPLY_TTL_MS, Job, Lane, Reply
from protocols.queue.broker import Broker
from protocols.queue.control import Answers
from protocols.queue.keys import Keys
from protocols.queue.link import check_url
from protocols.queue.rows import check_job, checked_session
from protocols.rollout_state import SampleParams, TokenIds

if TYPE_CHECKING:
    from types import ModuleType

    from producer_sdk.transport import AsyncTransport, Transport

CANCEL_MOST = 500
MAP_WINDOW = 1024

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text as it stands, token ids, or messages."""
OnFull = Literal["wait", "raise"]
"""What becomes of a job that meets a full backlog: sent again until it is accepted, or its future fails."""
Value = TypeVar("Value")


class Settings(BaseSettings):
    """By argument, then by environment: `ROLLOUTQ_URL`, `ROLLOUTQ_POOL` and so on."""

    model_config = SettingsConfigDict(
        env_prefix="ROLLOUTQ_", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    url: str = Field(default="redis://localhost:6379/0", repr=False)
    pool: str = "default"
    run: str | None = None
    no_worker_s: float = 60.0
    wait_replicas: int = 0
    on_full: OnFull = "wait"
    auto_collect: bool = True


class JobOptions(TypedDict, total=False):
    """What a job may carry beside its body."""

    job_id: str
    group: str
    session: str
    lane: Lane
    timeout_s: float
    min_version: int
    max_staleness: int
    reply_ttl_s: float


class Client:
    """Submits jobs to one pool and hands out their replies."""

    def __init__(
        self,
        url: str | None = None,
        *,
        pool: str | None = None,
        run: str | None = None,
        no_worker_s: float | None = None,
        wait_replicas: int | None = None,
        on_full: OnFull | None = None,
        auto_collect: bool | None = None,
    ) -> None:
        """`no_worker_s`: how long waits go on while the pool has no live worker, then NoLiveWorker.

        `wait_replicas`: a job counts as accepted once so many replicas of the server have it.
        `on_full`: where the pool's backlog is full, `wait` sends the job again until it is accepted,
        `raise` fails its future with QueueFull, whose `retry_after_s` says when there may be room.
        `auto_collect`: a reply counts as collected once this client has it; if false, once `collected` says so.
        Connects when first used. Raises ConfigError where a setting is wrong.
        """
        self.settings = _settings(
            url=url,
            pool=pool,
            run=run,
            no_worker_s=no_worker_s,
            wait_replicas=wait_replicas,
            on_full=on_full,
            auto_collect=auto_collect,
        )
        check_url(self.settings.url)
        Keys(self.settings.pool)
        self._reset()

    def _reset(self) -> None:
        self._courier: Courier | None = None
        self._starting = threading.Lock()
        self._pid = os.getpid()
        self._stem = secrets.token_hex(8)
        self._count = itertools.count()
        self._wake = Doorbell().wake

    def __getstate__(self) -> Settings:
        return self.settings

    def __setstate__(self, settings: Settings) -> None:
        self.settings = settings
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Send what was submitted and disconnect. Jobs go on; `get` finds them from any process."""
        if self._courier is not None and self._courier.pid == os.getpid():
            self._courier.close()
        self._courier = None

    # jobs

    def submit(
        self,
        body: Mapping[str, Any] | bytes,
        *,
        protocol: str = DEFAULT_PROTOCOL,
        **options: Unpack[JobOptions],
    ) -> Future[Reply]:
        """Enqueue a request body in its dialect; as bytes, it is JSON already and travels as it is.

        The same `job_id` with the same body is the same job, however often it is submitted. Raises
        InvalidRequest or BodyTooLarge at once; whatever else is wrong stands in the reply.
        """
        courier = self._started()
        job = self._job(courier, body, protocol, options)
        return Future(courier.submit(job), job.id, self._cancel_one, self._wake)

    def stream(
        self,
        body: Mapping[str, Any] | bytes,
        *,
        protocol: str = DEFAULT_PROTOCOL,
        **options: Unpack[JobOptions],
    ) -> Stream:
        """Enqueue a request body as `submit` does, and follow its answer while it is generated.

        Nobody needs to read it: the job goes on by itself, and another process may follow it too.
        """
        courier = self._started()
        job = replace(self._job(courier, body, protocol, options), stream=True)
        return self._stream(courier, courier.submit(job), job.id, _known(protocol))

    def follow(self, job_id: str) -> Stream:
        """The answer of a job submitted by this or any other process, from its start.

        Of a job that is not streamed, tokens come with its checkpoints and frames when it has ended.
        """
        inner = self._get(job_id)
        protocol = self._started().ask(lambda broker: broker.protocol(job_id))
        return self._stream(self._started(), inner, job_id, protocol)

    def _stream(
        self,
        courier: Courier,
        inner: Promise[Reply],
        job_id: str,
        protocol: Promise[str | None],
    ) -> Stream:
        reply = Future(inner, job_id, self._cancel_one, self._wake)
        return Stream(Source(courier, reply, inner, Pending(protocol, f"protocol of job {job_id}")))

    def sample(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        params: SampleParams | None = None,
        **options: Unpack[JobOptions],
    ) -> Future[Group]:
        """Draw `n` samples of one prompt: text, token ids, or messages."""
        params = msgspec.structs.replace(params or SampleParams(), n=n)
        body = {**_prompt_field(prompt), "sample_params": request_params(params)}
        courier = self._started()
        job = self._job(courier, body, "generate", options)
        inner = converted(courier.submit(job), lambda reply: Group.of(reply, n))
        return Future(inner, job.id, self._cancel_one, self._wake)

    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        n: int = 1,
        params: SampleParams | None = None,
        progress: bool = False,
        window: int = MAP_WINDOW,
        **options: Unpack[JobOptions],
    ) -> Iterator[Group]:
        """Sample every prompt; groups come in the order of the prompts, at most `window` jobs are in flight."""
        total = len(prompts) if isinstance(prompts, Sequence) else None
        flight: list[Future[Group]] = []
        with Progress(total or 0, shown=progress and total is not None, what="prompts") as bar:
            for prompt in prompts:
                if len(flight) >= window:
                    bar.advance()
                    yield flight.pop(0).result()
                flight.append(self.sample(prompt, n=n, params=params, **options))
            for future in flight:
                bar.advance()
                yield future.result()

    def as_completed(
        self,
        futures: Iterable[Pending[Value]],
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Results[Value]:
        """The answers in the order of their completion, for `for` and `async for`."""
        return Results(futures, timeout=timeout, progress=progress)

    def get(self, job_id: str) -> Future[Reply]:
        """The reply of a job submitted by this or any other process; JobNotFound where there is none."""
        return Future(self._get(job_id), job_id, self._cancel_one, self._wake)

    def _get(self, job_id: str) -> Promise[Reply]:
        if not codec.JOB_ID.fullmatch(job_id):
            raise InvalidRequest(f"`job_id` {job_id[:80]!r}: 1 to 128 of A-Z a-z 0-9 . _ : ~ -")
        return self._started().get(job_id)

    def collected(self, replies: Sequence[Reply]) -> Pending[None]:
        """Say that these replies are kept elsewhere: the server need not keep them whole any longer."""
        ends = [(reply.job_id, reply.finished_ms) for reply in replies]
        return self._ask(lambda broker: broker.collected(ends), "collected")

    def attach(self, run: str) -> Results[Reply]:
        """The replies of all jobs of a run, for a trainer that was restarted."""
        ids = self._ask(lambda broker: broker.run_ids(run), "attach").result(30)
        return Results([self.get(job_id) for job_id in ids])

    def cancel(self, *, job_id: str | None = None, run: str | None = None) -> Pending[int]:
        """Cancel a job or all jobs of a run; the answer is how many had not ended yet."""
        if (job_id is None) == (run is None):
            raise InvalidRequest("cancel: give either job_id= or run=")

        courier = self._started()

        async def cancel(broker: Broker) -> int:
            ids = [job_id] if job_id is not None else await broker.run_ids(str(run))
            dropped = await courier.withdraw(ids)
            answers: list[str] = []
            for start in range(0, len(ids), CANCEL_MOST):
                answers += await broker.cancel(ids[start : start + CANCEL_MOST])
            return dropped + sum(answer in ("cancelled", "stopping") for answer in answers)

        return self._ask(cancel, "cancel")

    def control(
        self, verb: str, /, *, wait_s: float = WAIT_S, **options: str | int | bool | None
    ) -> Pending[Answers]:
        """Command the pool's workers: `pause`, `continue`, `update_weights` and so on.

        Verbs and options are those of docs/control.md, such as `mode=`, `worker=`, `timeout_s=`; None leaves one out.
        The answer comes when every live worker has obeyed; where none lives, nobody is asked, and an order waits for
        those that come. It raises InvalidCommand or ControlRefused at once, ControlIncomplete when a worker has refused
        or `wait_s` has passed, and ControlBusy where a worker was not ready for it by then.
        """
        said = words(verb, options)
        return self._ask(
            lambda broker: control(broker, said, by=who(), wait_s=wait_s), f"control {verb}"
        )

    def session(self, session_id: str) -> Session:
        """The turns that carry this session, by this or any other process: their samples, their release."""
        return Session(checked_session(session_id), self._ask)

    def fleet(self) -> Pending[Fleet]:
        """The pool's live workers and what waits for them."""
        return self._ask(look, "fleet")

    def transport(self) -> "AsyncTransport":
        """For `httpx2.AsyncClient(transport=…)`: official clients then talk over Redis, with no port open."""
        return _transports().AsyncTransport(self)

    def sync_transport(self) -> "Transport":
        """For `httpx2.Client(transport=…)`, as `transport`."""
        return _transports().Transport(self)

    def _cancel_one(self, job_id: str) -> Pending[int]:
        return self.cancel(job_id=job_id)

    def _ask(self, question: Callable[[Broker], Awaitable[Value]], what: str) -> Pending[Value]:
        return Pending(self._started().ask(question), what)

    def _started(self) -> Courier:
        """The courier of this process; a forked child gets its own."""
        courier = self._courier
        if courier is None or courier.pid != os.getpid():
            with self._starting:
                if self._courier is None or self._courier.pid != os.getpid():
                    if self._pid != os.getpid():
                        # job ids of its own, and no lock of a thread that is not here
                        self._pid = os.getpid()
                        self._stem = secrets.token_hex(8)
                        self._wake = Doorbell().wake
                    settings = self.settings
                    self._courier = Courier(
                        settings.url,
                        settings.pool,
                        no_worker_s=settings.no_worker_s,
                        wait_replicas=settings.wait_replicas,
                        wait_when_full=settings.on_full == "wait",
                        auto_collect=settings.auto_collect,
                    )
                courier = self._courier
        return courier

    def _job(
        self,
        courier: Courier,
        body: Mapping[str, Any] | bytes,
        protocol: str,
        options: JobOptions,
    ) -> Job:
        timeout_s, reply_ttl_s = options.get("timeout_s"), options.get("reply_ttl_s")
        try:
            encoded = body if isinstance(body, bytes) else codec.encode_json(body)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"body: not JSON: {error}", param="body") from None
        return check_job(
            Job(
                id=options.get("job_id") or f"{self._stem}-{next(self._count):x}",
                body=encoded,
                protocol=protocol,
                lane=_checked_lane(options.get("lane", "normal")),
                inbox=courier.inbox,
                run=self.settings.run,
                group=options.get("group"),
                session=options.get("session"),
                timeout_ms=None if timeout_s is None else max(1, int(timeout_s * 1000)),
                min_version=options.get("min_version"),
                max_staleness=options.get("max_staleness"),
                reply_ttl_ms=DEFAULT_REPLY_TTL_MS
                if reply_ttl_s is None
                else max(1, int(reply_ttl_s * 1000)),
            )
        )


def _transports() -> "ModuleType":
    try:
        return importlib.import_module("producer_sdk.transport")
    except ImportError:
        raise ConfigError("the transport needs httpx2: pip install 'rolloutq[transport]'") from None


def _settings(**given: Any) -> Settings:  # noqa: ANN401 - judged here
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        (where, *_), told = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise ConfigError(
            f"{where}: {told}; by argument or ROLLOUTQ_{str(where).upper()}", param=str(where)
        ) from None


def _known(protocol: str) -> Promise[str | None]:
    known: Promise[str | None] = Promise()
    known.set_result(protocol)
    return known


def _checked_lane(lane: Lane) -> Lane:
    if lane not in ("high", "normal", "low"):
        raise ConfigError(f"lane {lane!r}: high, normal or low", param="lane")
    return lane


def _prompt_field(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, TokenIds) or all(isinstance(item, int) for item in prompt):
        return {"input_ids": list(prompt)}
    return {"messages": list(prompt)}
