"""What the scripted engine says under a guide: the smallest value that a schema allows."""

import json

import pytest

from protocols.errors import InvalidRequest
from worker.engines.instance import smallest


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({}, {}),
        (True, {}),
        ({"type": "object"}, {}),
        ({"type": "string"}, ""),
        ({"type": "string", "minLength": 3}, "xxx"),
        ({"type": "string", "format": "date"}, "1970-01-01"),
        ({"type": "boolean"}, False),
        ({"type": "null"}, None),
        ({"type": ["integer", "null"]}, 0),
        ({"type": "integer", "minimum": 2.5}, 3),
        ({"type": "integer", "exclusiveMinimum": 2, "multipleOf": 5}, 5),
        ({"type": "integer", "maximum": -3}, -3),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, 0.25),
        ({"type": "array"}, []),
        ({"items": {"type": "null"}, "minItems": 2}, [None, None]),
        ({"prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 3}, [1, 2, 2]),
        ({"enum": ["b", "a"]}, "b"),
        ({"const": {"k": 1}}, {"k": 1}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 0),
        ({"oneOf": [{"const": "one"}]}, "one"),
        (
            {
                "properties": {"b": {"type": "integer"}, "a": {"type": "string"}, "c": {}},
                "required": ["a", "b", "d"],
            },
            {"b": 0, "a": "", "d": {}},
        ),
        (
            {
                "allOf": [
                    {"properties": {"a": {"const": 1}}, "required": ["a"]},
                    {"properties": {"b": {"const": 2}}, "required": ["b"]},
                ]
            },
            {"a": 1, "b": 2},
        ),
        (
            {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "array", "items": {"$ref": "#"}}}},
            [],
        ),
    ],
)
def test_the_smallest_value_of_a_schema(schema: object, value: object) -> None:
    assert json.loads(smallest(json.dumps(schema))) == value


def test_properties_come_in_the_order_of_the_schema() -> None:
    schema = {"properties": {"b": {"const": 1}, "a": {"const": 2}}, "required": ["a", "b"]}
    assert smallest(json.dumps(schema)) == '{"b":1,"a":2}'


@pytest.mark.parametrize(
    "schema",
    [
        "no json",
        '{"$ref":"#"}',
        '{"$ref":"#/nowhere"}',
        '{"properties":{"a":{"$ref":"#"}},"required":["a"]}',
        '{"type":"integer","minimum":5,"maximum":4}',
        '{"enum":[]}',
        '{"anyOf":3}',
        '{"properties":3,"required":["a"]}',
        '{"type":"number","minimum":"x"}',
        '{"type":"string","minLength":1000000000}',
        '{"type":"array","minItems":1000000000}',
        '{"type":"array","minItems":400,"items":{"type":"array","minItems":400}}',
    ],
)
def test_a_schema_without_a_value_is_the_jobs_fault(schema: str) -> None:
    with pytest.raises(InvalidRequest, match="the schema allows nothing"):
        smallest(schema)
