"""Dataclasses from tables of TOML or JSON: every key, type and range is checked, every mistake named with its place."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

from cmrhpc.errors import BadInput
from cmrhpc.near import did_you_mean


def setting(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its allowed range (ends included) or its choices."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


T = TypeVar("T")


def unknown(key: str, known: Any, where: str) -> BadInput:
    return BadInput(f'unknown key "{key}"', where, f"{did_you_mean(key, known)}known: {', '.join(known)}")


def build(kind: type[T], values: Any, where: str, table: str) -> T:
    """A dataclass from a table, every key, type and range checked; `table` is the TOML path for messages."""
    brackets = table and not table.startswith("[[")
    place = f"{where} [{table}]" if brackets else f"{where} {table}".rstrip()
    if not isinstance(values, dict):
        heading = f"[{table}]" if brackets else table.partition(" number ")[0]
        raise BadInput(f"{heading} must be a table", place, f"write {heading} and its keys below")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    for key in values:
        if key not in fields:
            raise unknown(key, fields, place)
    hints = typing.get_type_hints(kind)
    made: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            path = f"{table}{'.' if brackets else ' '}{name}" if table else name
            made[name] = _value(hints[name], values[name], where, path, field.metadata)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BadInput(f'"{name}" is missing', place, f"add {name} = ...")
    return kind(**made)


def element(path: str, number: int, value: Any) -> str:
    """Where one of several tables stands, counted from 1, with its name: `[[arms]] number 2 "affine"`."""
    name = value.get("name") if isinstance(value, dict) else value
    return f"[[{path}]] number {number}" + (f' "{name[:60]}"' if isinstance(name, str) and name.isprintable() else "")


def _value(hint: Any, value: Any, where: str, path: str, limits: Any) -> Any:
    place = f"{where} {path}"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, path)
    if origin is types.UnionType:  # X | None
        return None if value is None else _value(inner[0], value, where, path, limits)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BadInput(f"must be a list, not {value!r}", place, "write [a, b]")
        tables = dataclasses.is_dataclass(inner[0])
        places = (element(path, i, v) if tables else f"{path} number {i}" for i, v in enumerate(value, 1))
        return tuple(_value(inner[0], v, where, place, limits) for v, place in zip(value, places, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise BadInput(f"must be a table, not {value!r}", place, "write key = value below its heading")
        return {str(k): _value(inner[1], v, where, f"{path}.{k}", limits) for k, v in value.items()}
    right = isinstance(value, hint) if hint is not float else isinstance(value, int | float)
    if not right or (isinstance(value, bool) and hint is not bool):
        raise BadInput(f"must be {_NAMES[hint]}, not {value!r}", place, f"write {_NAMES[hint]}")
    if hint is float:
        value = float(value) if abs(value) < 1e300 else math.inf
        if not math.isfinite(value):
            raise BadInput(f"must be a finite number, not {value}", place, "write a number")
    low, high, choices = limits.get("low"), limits.get("high"), limits.get("choices", ())
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"{low:g} to {high:g}" if high is not None else f"{low:g} or more"
        raise BadInput(f"{value} is out of range", place, f"allowed: {allowed}")
    if choices and value not in choices:
        raise BadInput(f'"{value}" is not a choice', place, f"allowed: {', '.join(choices)}")
    if hint is str and (len(value) > 4096 or any(ord(c) < 32 or ord(c) == 127 for c in value)):
        raise BadInput("control characters or more than 4,096 characters", place, "write plain text")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
