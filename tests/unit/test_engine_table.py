"""docs/engines.md says what the engines declare, and they declare what was promised of them."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from tests.engines import MINIMUM
from worker.config import Config
from worker.engines.table import declared, renewed, table

ROOT = Path(__file__).parents[2]


def test_the_page_says_what_the_engines_declare() -> None:
    page = (ROOT / "docs/engines.md").read_text()
    assert page == renewed(page, table(declared())), (
        "run `python -m worker.engines.table docs/engines.md`"
    )


def test_every_engine_that_a_worker_may_have_is_in_the_table() -> None:
    assert set(declared()) == set(get_args(Config.model_fields["engine"].annotation))


@pytest.mark.parametrize("name", sorted(declared()))
def test_an_engine_declares_at_least_what_was_promised(name: str) -> None:
    assert declared()[name] >= MINIMUM[name]


def test_lmdeploy_s_server_is_not_asked_for_what_its_route_lacks() -> None:
    penalties = {"repetition_penalty", "presence_penalty", "frequency_penalty"}
    lacking = {"sampling_seed", "min_tokens", *penalties}
    assert declared()["lmdeploy-server"].isdisjoint({*lacking, "update_weights", "script"})


def test_declarations_are_read_without_an_engine_s_packages() -> None:
    heavy = "{'torch', 'lmdeploy', 'transformers', 'httpx2'}"
    program = (
        "import sys; from worker.engines.table import declared; declared(); "
        f"sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
