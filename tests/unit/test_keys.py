"""The names of keys: one slot a pool, and the same names in Python and in the functions."""

import re

import pytest

from protocols.errors import ConfigError
from protocols.queue.broker import LIBRARY
from protocols.queue.keys import LANES, Keys

KEYS = Keys("p-1")
NAMES = {
    KEYS.leases,
    KEYS.delayed,
    KEYS.parked,
    KEYS.alone,
    KEYS.deadlines,
    KEYS.collected,
    KEYS.dead,
    KEYS.desired,
    KEYS.workers,
    KEYS.jobs("high"),
    KEYS.reply("j"),
    KEYS.run("r"),
    KEYS.session("s"),
    KEYS.progress("j"),
    KEYS.inbox("c"),
    KEYS.worker("w"),
    KEYS.commands,
    KEYS.acks("c-1"),
}


def test_every_key_of_a_pool_is_in_one_slot() -> None:
    assert all(name.startswith("rollout:{p-1}:") for name in NAMES)
    assert len(NAMES) == 18


def test_the_keys_of_the_docs_keep_their_names() -> None:
    assert KEYS.prefix == "rollout:{p-1}"
    assert KEYS.jobs("normal") == "rollout:{p-1}:jobs:normal"
    assert KEYS.reply("hello") == "rollout:{p-1}:reply:hello"


def test_the_functions_build_the_same_names() -> None:
    built = {found.rstrip(":") for found in re.findall(r"\.\. ':([a-z]+:?)", LIBRARY)}
    kinds = {name.split(":")[2] for name in NAMES}
    assert built <= kinds | {"jobs"}
    assert kinds - built == set()


def test_the_functions_know_the_same_lanes() -> None:
    told = re.search(r"LANES = \{([^}]+)\}", LIBRARY)
    assert told is not None
    assert tuple(re.findall(r"'(\w+)'", told[1])) == LANES


@pytest.mark.parametrize("pool", ["a", "default", "qwen-7b-2", "x" * 64, "0"])
def test_a_good_pool_is_accepted(pool: str) -> None:
    assert Keys(pool).prefix == f"rollout:{{{pool}}}"


@pytest.mark.parametrize("pool", ["", "A", "a_b", "a:b", "a}b", "a b", "x" * 65, "ä", "a\n"])
def test_a_wrong_pool_is_refused(pool: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Keys(pool)
    assert refused.value.param == "pool"
    assert len(refused.value.message) < 200
