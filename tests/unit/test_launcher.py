"""Which worker gets which GPUs."""

import pytest

from protocols.errors import ConfigError
from worker.config import Config
from worker.launcher import Launcher, groups


@pytest.mark.parametrize(
    ("gpus", "size", "expected"),
    [
        ("0", 1, [(0,)]),
        ("0-3", 1, [(0,), (1,), (2,), (3,)]),
        ("0-7", 2, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("0,2, 4-5", 2, [(0, 2), (4, 5)]),
        ("3-6", 4, [(3, 4, 5, 6)]),
    ],
)
def test_gpus_are_divided_in_their_order(
    gpus: str, size: int, expected: list[tuple[int, ...]]
) -> None:
    assert groups(gpus, size) == expected


@pytest.mark.parametrize(
    ("gpus", "size"),
    [
        ("0-2", 2),
        ("a", 1),
        ("", 1),
        ("3-1", 1),
        ("0,0", 2),
        ("0-1,1", 1),
        ("-1", 1),
        ("0-", 1),
        ("0-99999", 1),
        ("0,,1", 1),
        ("\u00b2", 1),
    ],
)
def test_what_is_no_list_of_whole_groups_is_refused(gpus: str, size: int) -> None:
    with pytest.raises(ConfigError, match=r"^--gpus: ") as refused:
        groups(gpus, size)
    assert refused.value.param == "gpus"


def test_an_id_leaves_room_for_the_numbers_of_its_workers() -> None:
    Launcher(Config.from_command(["--gpus", "0", "--worker-id", "x" * 56]), [])
    with pytest.raises(ConfigError, match=r"^--worker-id: 57 characters"):
        Launcher(Config.from_command(["--gpus", "0", "--worker-id", "x" * 57]), [])
