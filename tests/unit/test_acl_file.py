"""deploy/redis/users.acl beside the library: a worker may run whatever a step runs."""

import re
from pathlib import Path

from protocols.queue.broker import LIBRARY

USERS = Path(__file__).resolve().parents[2] / "deploy/redis/users.acl"
CALL = re.compile(r"redis\.p?call\('([A-Z]+)'(?:, '([A-Z]+)')?")
WITH_SUBCOMMANDS = ("XGROUP",)


def commands_of_the_library() -> set[str]:
    calls = [match.groups() for match in CALL.finditer(LIBRARY)]
    return {
        f"{command}|{sub}".lower() if command in WITH_SUBCOMMANDS else command.lower()
        for command, sub in calls
    }


def test_a_worker_may_run_every_command_of_the_library() -> None:
    (line,) = [text for text in USERS.read_text().splitlines() if text.startswith("user worker ")]
    allowed = set(re.findall(r"\+([a-z|]+)", line))
    assert commands_of_the_library() - allowed == set()


def test_the_library_is_read_as_it_is_written() -> None:
    assert {"hset", "xreadgroup", "xgroup|setid", "publish"} <= commands_of_the_library()


def test_every_line_is_a_user_as_an_aclfile_wants_it() -> None:
    lines = USERS.read_text().splitlines()
    assert all(re.match(r"user [a-z]+ (on #[A-Z]+-SHA256|off) ", line) for line in lines)


def test_the_user_default_is_off_and_may_still_replay_an_append_only_file() -> None:
    first = USERS.read_text().splitlines()[0]
    assert first == "user default off resetpass ~* &* +@all"
