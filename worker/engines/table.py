"""`python -m worker.engines.table docs/engines.md`: write the page's table anew, from what the engines declare.

Reads declarations only: no engine is made, and neither torch nor lmdeploy imported.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from protocols.rollout_state import SampleParams

DECLARED = {
    "torch": "torch_engine.engine",
    "lmdeploy": "lmdeploy_engine.engine",
    "lmdeploy-server": "lmdeploy_server.wire",
    "scripted": "scripted",
}
"""Engine, and the module whose CAPABILITIES it has."""
BEGIN, END = "<!-- made by worker/engines/table.py -->", "<!-- end -->"
YES, NO = "yes", "-"

INTERFACE = {
    "cancel, one sample or all": "`Generation.stop`, `Generation.close`",
    "resume after kept tokens": "`Call.kept`",
    "pause in all modes": "`Generation.close`, `Call.kept`",
    "version spans": "`Segment.policy_version`",
}
"""What the engine interface itself asks of every engine, and by which part of it."""

WEIGHTS = {
    "offload level 1: weights in host memory": {"offload"},
    "offload level 2: weights discarded": {"offload", "update_weights"},
    "update_weights": {"update_weights"},
    "scripts in a job (tests)": {"script"},
}
"""What else can be done, and which capabilities it takes."""


def declared() -> dict[str, frozenset[str]]:
    """Each engine's capabilities."""
    modules = {name: import_module(f"worker.engines.{module}") for name, module in DECLARED.items()}
    return {name: frozenset(module.CAPABILITIES) for name, module in modules.items()}


def table(engines: Mapping[str, frozenset[str]]) -> str:
    """In Markdown: one column an engine, one row a capability."""
    needed = {f"`{name}`": {name} for name in SampleParams.__struct_fields__} | WEIGHTS
    others = frozenset[str]().union(*engines.values()).difference(*needed.values())
    needed |= {f"`{name}`": {name} for name in sorted(others)}
    lines = [_line("", engines), _line("---", ["---"] * len(engines))]
    lines += [
        _line(what, [YES if need <= found else NO for found in engines.values()])
        for what, need in needed.items()
    ]
    lines += [_line(f"{what} ({by})", [YES] * len(engines)) for what, by in INTERFACE.items()]
    return "\n".join(lines)


def renewed(page: str, made: str) -> str:
    """A page with this table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def _line(first: str, rest: Mapping[str, object] | list[str]) -> str:
    return f"| {' | '.join([first, *rest])} |"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(renewed(target.read_text(), table(declared())))
