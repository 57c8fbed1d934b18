"""The fields of a row, read one by one and checked, and the error that names a bad one."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, TypeAlias

from lora_rm.errors import DataError

Fields: TypeAlias = Mapping[str, Any]

MAX_DEPTH = 100
"""Levels of lists and objects in a tool definition or call: templates and `json` walk them by recursion."""


MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns, and keys of messages, that go with models of more than text."""


class RowError(DataError):
    """A row that cannot be used; `reason` is a few words to count it under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        """Crosses to another process, as in `datasets.map(num_proc=...)`."""
        return RowError, (self.reason, self.args[0])


def check_text(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    """Returns a text that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise wrong_type(field, value, "a text")
    if not may_be_empty and not value.strip():
        raise empty(field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = (
            f"field '{field}' has half a character (a lone surrogate) at position {error.start}. "
            "Text must be valid Unicode; see what cut it."
        )
        raise RowError("not valid text", message) from error
    return value


def check_no_media(values: Fields, field: str = "") -> None:
    """Raises if a row, or the message `field`, has pictures or sounds: without them the answers mean something else."""
    for name in MEDIA:
        if values.get(name):
            raise not_text(f"{field}.{name}" if field else name)


def read_content(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    """Returns the text of a message, which may come in parts: {"type": "text", "text": ...}."""
    if not isinstance(value, list | tuple):
        return check_text(value, field, may_be_empty=may_be_empty)
    for index, part in enumerate(value):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise not_text(f"{field}[{index}]")
    texts = [part.get("text") if isinstance(part, dict) else None for part in value]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(texts):
        raise wrong_type(field, value, 'a text, or a list of {"type": "text", "text": ...}')
    return check_text("".join(known), field, may_be_empty=may_be_empty)


def not_text(field: str) -> RowError:
    """The error for what is a picture, a video or a sound."""
    message = f"field '{field}' is no text, and reward models here read text alone. Leave such rows out."
    return RowError("not text", message)


def read_optional_text(row: Fields, name: str) -> str:
    """Returns a text, or "" where the column is not there or blank."""
    text = check_text(row.get(name, ""), name, may_be_empty=True)
    return text if text.strip() else ""


def read_number(row: Fields, name: str) -> float:
    """Returns a finite number from a column that is there."""
    return check_number(row[name], name)


def check_number(value: Any, field: str) -> float:
    """Returns a finite number; true and false are none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    elif not isinstance(value, bool):
        raise wrong_type(field, value, "a number")
    message = f"field '{field}' is {shown(value)}. Allowed: a finite number; correct it or leave it out."
    raise RowError("not a number", message)


def read_boolean(row: Fields, name: str) -> bool:
    """Returns true or false; false where the column is not there."""
    value = row.get(name, False)
    if not isinstance(value, bool):
        raise wrong_type(name, value, "true or false")
    return value


def read_list(row: Fields, name: str) -> list[Any]:
    """Returns a list that is not empty, from a column that is there."""
    value = row[name]
    if not isinstance(value, list | tuple):
        raise wrong_type(name, value, "a list")
    if not value:
        raise empty(name)
    return list(value)


def check_objects(value: Any, field: str) -> list[dict[str, Any]]:
    """Returns a list of JSON objects, such as tool calls."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
        raise wrong_type(field, value, "a list of objects")
    if _depth_exceeds(value, MAX_DEPTH):
        message = (
            f"field '{field}' is no JSON for a template: nested deeper than {MAX_DEPTH} levels. Flatten it."
        )
        raise RowError("wrong type", message)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        message = f"field '{field}' has half a character (a lone surrogate). Text must be valid Unicode."
        raise RowError("not valid text", message) from error
    except (TypeError, ValueError, RecursionError) as error:
        message = f"field '{field}' is no JSON: {error}. Allowed: a list of objects."
        raise RowError("wrong type", message) from error
    return list(value)


def read_tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Returns the tool calls of a message, their arguments as objects: OpenAI's API gives them as JSON text."""
    return [_read_call(call, f"{field}[{index}]") for index, call in enumerate(check_objects(value, field))]


def _read_call(call: dict[str, Any], field: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _read_call(call["function"], f"{field}.function")}
    if not isinstance(call.get("arguments"), str):
        return call
    arguments = parse_json(call["arguments"] or "{}", f"{field}.arguments", "an object, or its JSON")
    return call | {"arguments": check_objects([arguments], f"{field}.arguments")[0]}


def parse_json(text: str, field: str, allowed: str) -> Any:
    """Returns what a JSON text says; `allowed` puts in words what the field may hold."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"field '{field}' is no JSON ({error}). Allowed: {allowed}."
        raise RowError("broken JSON", message) from error


def read_tools(row: Fields) -> tuple[dict[str, Any], ...]:
    """Returns the tool definitions of a row, given as a list or as its JSON."""
    if "tools" not in row:
        return ()
    value = row["tools"]
    if isinstance(value, str):
        value = parse_json(value, "tools", "a list of tool definitions, or its JSON") if value.strip() else ()
    return tuple(check_objects(value, "tools"))


def require(row: Fields, name: str) -> None:
    """Raises if a column is not there."""
    if name not in row:
        raise missing(name, row)


def missing(field: str, found: Mapping[str, Any]) -> RowError:
    """The error for a field that is not in `found`."""
    message = f"field '{field}' is missing (found: {listed(found)}). Add it; null counts as missing."
    return RowError("missing field", message)


def empty(field: str) -> RowError:
    """The error for a blank text or an empty list."""
    return RowError(
        "empty field", f"field '{field}' is empty. It needs content; fill it in, or remove the row."
    )


def wrong_type(field: str, value: Any, allowed: str) -> RowError:
    """The error for a value of another type than `allowed`, which is put in words."""
    message = f"field '{field}' is {shown(value)}. Allowed: {allowed}; convert it."
    return RowError("wrong type", message)


def listed(found: Iterable[str]) -> str:
    """The names of columns, for a message: the first twenty, each printable and short."""
    first = list(map(str, islice(found, 21)))
    names = [name if name.isprintable() else repr(name) for name in first[:20]]
    more = ["..."] if len(first) > 20 else []
    return ", ".join([name if len(name) <= 60 else name[:57] + "..." for name in names] + more) or "nothing"


def shown(value: Any) -> str:
    """A value, for a message: short, and printable whatever it is."""
    if isinstance(value, dict | list | tuple):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > 10**18:
        return "a huge number"
    words = "null" if value is None else repr(value[:80] if isinstance(value, str | bytes) else value)
    return words if len(words) <= 60 else words[:57] + "..."


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than `limit`; without recursion, which has a limit of its own."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
