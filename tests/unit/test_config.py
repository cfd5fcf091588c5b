"""A worker's settings: flags, then the environment, then defaults; an error names the flag."""

import pytest

from protocols.errors import ConfigError
from worker.config import Config


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    for name in Config.model_fields:
        monkeypatch.delenv(f"ROLLOUTQ_{name.upper()}", raising=False)


def test_defaults_are_those_of_the_docs() -> None:
    config = Config.from_command([])
    assert (config.url, config.pool) == ("redis://localhost:6379/0", "default")
    assert (config.lease_s, config.crash_limit, config.fail_limit) == (15.0, 3, 5)
    assert config.policy_version == 0


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUTQ_SLOTS", "3")
    monkeypatch.setenv("ROLLOUTQ_LEASE_S", "7.5")
    config = Config.from_command(["--slots", "5"])
    assert (config.slots, config.lease_s) == (5, 7.5)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--slots", "0"], "--slots"),
        (["--slots", "many"], "--slots"),
        (["--lease-s", "nan"], "--lease-s"),
        (["--grace-s", "-1"], "--grace-s"),
        (["--crash-limit", "0"], "--crash-limit"),
        (["--context-tokens", "3"], "--context-tokens"),
        (["--engine", "warp"], "--engine"),
        (["--dtype", "int8"], "--dtype"),
        (["--pool", "No_Pool"], "--pool"),
        (["--worker-id", "a b"], "--worker-id"),
        (["--model", "/no/such/place"], "--model"),
        (["--log-level", "loud"], "--log-level"),
    ],
)
def test_a_wrong_flag_is_named(words: list[str], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        Config.from_command(words)


def test_a_wrong_url_is_named_and_its_secret_is_not_shown() -> None:
    with pytest.raises(ConfigError) as refused:
        Config.from_command(["--url", "http://me:s3cret@host"])
    assert refused.value.message.startswith("--url: ")
    assert "s3cret" not in refused.value.message


def test_a_wrong_variable_is_named_as_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUTQ_FAIL_LIMIT", "none")
    with pytest.raises(ConfigError, match="--fail-limit"):
        Config.from_command([])


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        Config.from_command(["--slots", "0", "--pool", "No"])
    assert "--slots" in refused.value.message
    assert "--pool" in refused.value.message


def test_what_is_no_flag_is_named_without_a_password() -> None:
    with pytest.raises(ConfigError, match="--slotz 1") as refused:
        Config.from_command(["--slotz", "1", "redis://me:s3cret@host"])
    assert "s3cret" not in str(refused.value)
    assert "rolloutq worker --help" in str(refused.value)


def test_worker_ids_are_made_where_none_is_given() -> None:
    first, second = (Config.from_command([]).worker_id for _ in range(2))
    assert first != second
    assert len(first) <= 64


@pytest.mark.parametrize(
    "url", ["gpu-1:23333", "ftp://gpu-1", "http://", "http://me:s3cret@gpu-1:23333"]
)
def test_an_engine_s_url_is_http_without_a_secret(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Config.from_command(["--engine-url", url])
    assert refused.value.message.startswith("--engine-url: ")
    assert "s3cret" not in refused.value.message


def test_an_engine_s_key_comes_from_the_environment_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROLLOUTQ_ENGINE_KEY", "s3cret")
    config = Config.from_command(["--engine-url", "http://gpu-1:23333"])
    assert config.engine_key is not None
    assert config.engine_key.get_secret_value() == "s3cret"
    assert "s3cret" not in f"{config!r} {config} {config.model_dump_json()}"
    with pytest.raises(SystemExit):
        Config.from_command(["--help"])
    assert "engine-key" not in capsys.readouterr().out
