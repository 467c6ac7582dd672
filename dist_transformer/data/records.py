"""Lines that are records: JSON objects, and columns separated by tabs."""

import json
from typing import Any

_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class BadLineError(Exception):
    """Why a line is no record; what becomes of it is the caller's policy."""


def parse_json(line: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The string values of fields of a JSON object.

    Args:
        line: One JSON object.
        fields: Their names; `a.b` is the field b of the object in a, unless a field is called so itself.

    Raises:
        BadLineError: it is not a JSON object, or a field is missing or not a string.
    """
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise BadLineError("JSON that is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BadLineError(f"not a JSON object on one line ({error.msg}, column {error.colno})") from error
    except ValueError as error:  # a number of thousands of digits
        raise BadLineError(f"JSON that cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise BadLineError(f"{_name(record)} where one JSON object a line is expected")
    return tuple(_field(record, field) for field in fields)


def _field(record: dict[str, Any], field: str) -> str:
    value: Any = record
    if field in record:
        value = record[field]
    else:
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                raise BadLineError(f"no field {field!r} (there are {_listed(record)})")
            value = value[name]
    if not isinstance(value, str):
        raise BadLineError(f"field {field!r} is {_name(value)}, not a string")
    return value


def _listed(record: dict[str, Any]) -> str:
    names = [f"{name!r}"[:40] for name in list(record)[:8]]
    return ", ".join(names) + (", ..." if len(record) > 8 else "") if names else "none"


def _name(value: Any) -> str:
    return _NAMES.get(type(value), "a number")


def parse_columns(line: str) -> tuple[str, str]:
    """Source and target of a line with a tab between them.

    Raises:
        BadLineError: there are more or fewer columns.
    """
    columns = line.split("\t")
    if len(columns) != 2:
        raise BadLineError(f"{len(columns)} columns where source, tab, target are expected")
    return columns[0], columns[1]
