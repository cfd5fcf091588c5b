"""What a trainer imports: submit jobs, wait for their replies, from any process.

`from producer_sdk import Client, SampleParams`
"""

from producer_sdk.client import Client
from producer_sdk.fleet import Fleet
from producer_sdk.future import Future, Pending
from producer_sdk.group import Group
from producer_sdk.official import anthropic_client, openai_client
from producer_sdk.results import Results
from producer_sdk.session import Session, SessionSample
from producer_sdk.stream import Stream
from protocols.control import Ack, Issued
from protocols.errors import (
    Aborted,
    BodyTooLarge,
    Cancelled,
    ConfigError,
    ContextLengthExceeded,
    ControlBusy,
    ControlError,
    ControlIncomplete,
    ControlRefused,
    DeadlineExceeded,
    EngineFailed,
    InvalidCommand,
    InvalidRequest,
    JobConflict,
    JobError,
    JobNotFound,
    ModelNotFound,
    NoLiveWorker,
    PoolNotPrepared,
    QueueError,
    QueueFull,
    RequestError,
    ResultTimeout,
    RolloutError,
    ServerUnavailable,
    SessionReleased,
    StalenessExceeded,
    UnknownProtocol,
    UnsupportedOption,
    WorkerLost,
)
from protocols.job import JobStatus, Lane, Reply
from protocols.queue.control import Answers
from protocols.rollout_state import Logprobs, RolloutState, SampleParams, Status, TokenIds
from protocols.session import SessionTurn

__all__ = [
    "Aborted",
    "Ack",
    "Answers",
    "BodyTooLarge",
    "Cancelled",
    "Client",
    "ConfigError",
    "ContextLengthExceeded",
    "ControlBusy",
    "ControlError",
    "ControlIncomplete",
    "ControlRefused",
    "DeadlineExceeded",
    "EngineFailed",
    "Fleet",
    "Future",
    "Group",
    "InvalidCommand",
    "InvalidRequest",
    "Issued",
    "JobConflict",
    "JobError",
    "JobNotFound",
    "JobStatus",
    "Lane",
    "Logprobs",
    "ModelNotFound",
    "NoLiveWorker",
    "Pending",
    "PoolNotPrepared",
    "QueueError",
    "QueueFull",
    "Reply",
    "RequestError",
    "ResultTimeout",
    "Results",
    "RolloutError",
    "RolloutState",
    "SampleParams",
    "ServerUnavailable",
    "Session",
    "SessionReleased",
    "SessionSample",
    "SessionTurn",
    "StalenessExceeded",
    "Status",
    "Stream",
    "TokenIds",
    "UnknownProtocol",
    "UnsupportedOption",
    "WorkerLost",
    "anthropic_client",
    "openai_client",
]
