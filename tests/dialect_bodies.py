"""Bodies of every dialect, for the tests of all of them."""

from copy import deepcopy

from protocols.codec import encode_json
from protocols.dialects import dialect_of
from protocols.dialects.base import Normal

Body = dict[str, object]
Path = tuple[str | int, ...]

USER: Body = {"role": "user", "content": "Hi"}
PLAIN: dict[str, Body] = {
    "openai.chat": {"messages": [USER]},
    "openai.completions": {"prompt": "Hi"},
    "claude.messages": {"messages": [USER], "max_tokens": 8},
    "claude.count_tokens": {"messages": [USER]},
    "generate": {"messages": [USER], "sample_params": {}},
}
BLOCKS: dict[str, Body] = {
    name: body | {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    for name, body in PLAIN.items()
    if "messages" in body
}
WEATHER: Body = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
FUNCTION: Body = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": WEATHER},
}
CUSTOM: Body = {"name": "weather", "description": "Of a city.", "input_schema": WEATHER}


def normalize(protocol: str, body: object) -> Normal:
    return dialect_of(protocol).normalize(encode_json(body))


def put(body: Body, at: Path, value: object) -> Body:
    """A copy of `body` with `value` at path `at`."""
    changed = deepcopy(body)
    holder: object = changed
    for step in at[:-1]:
        holder = holder[step]  # type: ignore[index]
    holder[at[-1]] = value  # type: ignore[index]
    return changed


def dotted(at: Path) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).lstrip(".")
