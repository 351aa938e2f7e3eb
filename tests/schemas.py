"""Random JSON schemas from a seeded generator: nested objects, arrays with bounds, enums, numbers, strings, nullable
and optional fields. Every answer to one is short, so that a model that rambles comes to its end, too."""

from __future__ import annotations

import random

Json = dict[str, object]

_NAMES = ["name", "city", "age", "tags", "price", "is_open", "größe", "a b", 'quo"te', "items", "next", "x"]


def random_schema(rng: random.Random) -> Json:
    """An object, two levels deep at most."""
    return _object(rng, 2)


def _object(rng: random.Random, depth: int) -> Json:
    names = rng.sample(_NAMES, rng.randint(1, 3))
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> Json:
    kinds = [_string, _enum, _number, _integer, _boolean, _constant, _nullable, _either]
    if depth > 0:
        kinds += [_object, _object, _array, _array]
    return rng.choice(kinds)(rng, depth)


def _array(rng: random.Random, depth: int) -> Json:
    least = rng.randint(0, 1)
    return {"type": "array", "items": _value(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _string(rng: random.Random, depth: int) -> Json:
    kind = rng.choice(["length", "pattern", "format"])
    if kind == "length":
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[A-Z]{2}[0-9]{1,3}$", "^(yes|no|maybe)$", "^[^a-z]{2,5}$"])}
    return {"type": "string", "format": rng.choice(["date", "ipv4"])}


def _enum(rng: random.Random, depth: int) -> Json:
    return {
        "enum": rng.sample(["red", "green", "ブルー", 1, 2.5, None, True, 'a"b', {"k": [1]}, ""], rng.randint(1, 4))
    }


def _number(rng: random.Random, depth: int) -> Json:
    low = rng.randint(-50, 50)
    return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 100), "multipleOf": 0.25}


def _integer(rng: random.Random, depth: int) -> Json:
    low = rng.randint(-500, 500)
    return {"type": "integer", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 2000)}


def _boolean(rng: random.Random, depth: int) -> Json:
    return {"type": "boolean"}


def _constant(rng: random.Random, depth: int) -> Json:
    return {"const": rng.choice(["fixed", 7, None, [1, "two"]])}


def _nullable(rng: random.Random, depth: int) -> Json:
    return {"type": ["integer", "null"], "minimum": 0, "maximum": rng.randint(0, 99)}


def _either(rng: random.Random, depth: int) -> Json:
    return {"anyOf": [_value(rng, 0), {"type": "null"}]}
