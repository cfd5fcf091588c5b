"""The queue's fixtures for this folder."""

from tests.queue_fixtures import (
    broker,
    client,
    look,
    nothing_left,
    serve,
    standing,
    standing_pools,
    take,
)

__all__ = [
    "broker",
    "client",
    "look",
    "nothing_left",
    "serve",
    "standing",
    "standing_pools",
    "take",
]
