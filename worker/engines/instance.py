"""The smallest JSON value that a schema allows, made without a model: what the scripted engine says under a guide.

It knows types, const, enum, required, anyOf, oneOf, allOf, local references, and bounds of numbers, strings and arrays.
"""

import math
import operator
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import cast

import msgspec

from protocols.errors import InvalidRequest

DEPTH = 64
MOST = 100_000
"""Values and characters that are made before a schema is refused."""
_FORMATS = {
    "date-time": "1970-01-01T00:00:00Z",
    "date": "1970-01-01",
    "time": "00:00:00Z",
    "duration": "PT0S",
    "email": "a@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_BOUNDS = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}

Schema = Mapping[str, object]


def smallest(schema: str) -> str:
    """JSON text of it; raises InvalidRequest for a schema that is none, or that has no end."""
    try:
        root = _Root(msgspec.json.decode(schema))
        return msgspec.json.encode(_value(root.schema, root, 0)).decode()
    # a schema is the sender's: any part of it may be of another kind than JSON schema says
    except (
        msgspec.MsgspecError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise InvalidRequest(f"the schema allows nothing that can be made here: {error}") from None


class _Root:
    """The whole schema, and what may still be made of it."""

    def __init__(self, schema: object) -> None:
        self.schema, self.left = schema, MOST

    def take(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise ValueError(f"it asks for more than {MOST} values and characters")


def _value(schema: object, root: _Root, depth: int) -> object:
    root.take(1)
    if depth > DEPTH:
        raise ValueError("it is nested too deeply")
    if not isinstance(schema, dict):
        return {}
    one = _one(cast("Schema", schema), root)
    if "const" in one:
        return one["const"]
    if "enum" in one:
        return cast("list[object]", one["enum"])[0]
    made = _MADE.get(_type(one))
    return made(one, root, depth + 1) if made else None


def _one(schema: Schema, root: _Root) -> Schema:
    """With references followed and the first of all alternatives taken."""
    for _ in range(DEPTH):
        rest = {k: v for k, v in schema.items() if k not in ("$ref", "anyOf", "oneOf", "allOf")}
        found = [_referred(cast("str", schema["$ref"]), root)] if "$ref" in schema else []
        for name in ("anyOf", "oneOf"):
            found += cast("list[Schema]", schema.get(name, []))[:1]
        found += cast("list[Schema]", schema.get("allOf", []))
        if not found:
            return schema
        schema = rest
        for other in found:
            schema = _both(schema, other)
    raise ValueError("its references have no end")


def _both(one: Schema, other: Schema) -> Schema:
    joined = {**other, **one}
    for name in ("properties", "$defs"):
        if name in one and name in other:
            joined[name] = {**cast("Schema", other[name]), **cast("Schema", one[name])}
    if "required" in one and "required" in other:
        joined["required"] = [
            *cast("list[str]", one["required"]),
            *cast("list[str]", other["required"]),
        ]
    return joined


def _referred(ref: str, root: _Root) -> Schema:
    found = root.schema
    for step in ref.removeprefix("#").strip("/").split("/"):
        if step:
            found = cast("Schema", found)[step.replace("~1", "/").replace("~0", "~")]
    return cast("Schema", found)


def _type(schema: Schema) -> str:
    told = schema.get("type")
    if isinstance(told, list):
        told = cast("list[object]", told)[0]
    if isinstance(told, str):
        return told
    return "array" if "items" in schema or "prefixItems" in schema else "object"


def _object(schema: Schema, root: _Root, depth: int) -> dict[str, object]:
    properties = cast("Schema", schema.get("properties", {}))
    required = cast("list[str]", schema.get("required", []))
    ordered = [name for name in properties if name in required]
    ordered += [name for name in required if name not in properties]
    return {name: _value(properties.get(name, {}), root, depth) for name in ordered}


def _array(schema: Schema, root: _Root, depth: int) -> list[object]:
    first = cast("list[object]", schema.get("prefixItems", []))
    least = cast("int", schema.get("minItems", 0))
    lacking = max(0, least - len(first))
    root.take(lacking)
    rest = [schema.get("items", {})] * lacking
    return [_value(item, root, depth) for item in [*first[:least], *rest]]


def _string(schema: Schema, root: _Root, _depth: int) -> str:
    text = _FORMATS.get(str(schema.get("format")), "")
    lacking = max(0, cast("int", schema.get("minLength", 0)) - len(text))
    root.take(lacking)
    return text + "x" * lacking


def _number(schema: Schema, _root: _Root, _depth: int) -> float:
    """The first of a few numbers about the bounds that lies within them."""
    of = cast("float", schema.get("multipleOf", 1 if _type(schema) == "integer" else 0))
    bounds = [cast("float", schema[name]) for name in _BOUNDS if name in schema]
    step = of or 1
    near = [0.0, *(bound + off for bound in bounds for off in (0, step, -step))]
    near += [(one + other) / 2 for one, other in combinations(bounds, 2)]
    if of:
        near = [rounded(number / of) * of for number in near for rounded in (math.floor, math.ceil)]
    allowed = [number for number in near if _within(number, schema)]
    if not allowed:
        raise ValueError("no number lies within its bounds")
    return int(allowed[0]) if allowed[0] == int(allowed[0]) else allowed[0]


def _within(number: float, schema: Schema) -> bool:
    bounds = [(compare, schema[name]) for name, compare in _BOUNDS.items() if name in schema]
    return all(compare(number, cast("float", bound)) for compare, bound in bounds)


def _boolean(_schema: Schema, _root: _Root, _depth: int) -> bool:
    return False


_MADE: dict[str, Callable[[Schema, _Root, int], object]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _number,
    "number": _number,
    "boolean": _boolean,
}
