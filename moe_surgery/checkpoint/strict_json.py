"""Untrusted JSON: the standard parser, made strict.

Python's json module accepts NaN, keeps the last of two equal keys, recurses as deep as the text
says, turns "\\ud800" into a string that cannot be encoded, and reads integers of any length. A
file that uses any of these means something else to another reader, or is an attack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import accumulate

from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError

__all__ = ["MAX_CONTAINERS", "MAX_DEPTH", "parse_json"]

MAX_DEPTH = 64
MAX_CONTAINERS = 4_000_000
"""Objects and arrays in one document: they cost far more memory than the two bytes they take."""

_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**64 - 1
_MAX_DIGITS = len(str(_MAX_INTEGER))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SCAN_BYTES = 1 << 20
_BRACKETS = b"[]{}"
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in _BRACKETS)
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(
    raw: bytes,
    *,
    where: str,
    max_depth: int = MAX_DEPTH,
    allow_floats: bool = False,
) -> object:
    """The value of one JSON text: dict, list, str, int, bool, None, and float if `allow_floats`.

    Refused beyond what RFC 8259 calls invalid: a byte order mark, equal keys in one object
    (compared after unescaping), lone surrogates, integers outside -2**63 .. 2**64 - 1, nesting
    beyond `max_depth`, more than MAX_CONTAINERS objects and arrays; floats past double range, or
    without `allow_floats` every number written with a fraction, an exponent or as -0.
    Time and memory are proportional to `raw`; memory peaks at about 13 times its size for the header
    of a checkpoint, 30 times for a text of tiny objects.

    Raises InvalidInputError: one line that begins with `where` (taken as printable).
    """
    if raw.startswith(_BYTE_ORDER_MARK):
        raise InvalidInputError(f"{where}: begins with a byte order mark; JSON has none")
    text = _decode(raw, where)
    _check_nesting(raw, max_depth, where)
    value = _decoded_value(text, where, _decoder(where, allow_floats))
    if _SURROGATE_ESCAPE.search(raw):
        _check_surrogates(value, where)
    return value


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start} ({error.reason})"
    # Raised outside the handler: inside, the exception would keep the whole text alive as its context.
    raise InvalidInputError(f"{where}: {problem}")


def _check_nesting(raw: bytes, max_depth: int, where: str) -> None:
    """Count brackets outside strings, block by block, before the parser recurses into them.

    Backslashes are legal in strings only, where a run of them pairs up from its left: with the
    pairs and then the escaped quotes taken out, every quote left opens or closes a string. In text
    that is not JSON the count is right up to the first error, and the parser stops there.
    """
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth = containers = in_string = 0
    for start in range(0, len(plain), _SCAN_BYTES):
        pieces = plain[start : start + _SCAN_BYTES].split(b'"')
        brackets = b"".join(pieces[in_string::2]).translate(None, _NOT_BRACKETS)
        in_string ^= (len(pieces) - 1) & 1
        if not brackets:
            continue
        depths = list(accumulate(map(_STEP.__getitem__, brackets), initial=depth))
        depth = depths[-1]
        containers += brackets.count(b"[") + brackets.count(b"{")
        if max(depths) > max_depth:
            raise InvalidInputError(f"{where}: nested deeper than {max_depth} levels")
        if containers > MAX_CONTAINERS:
            raise InvalidInputError(f"{where}: more than {MAX_CONTAINERS} objects and arrays")


def _decoded_value(text: str, where: str, decoder: json.JSONDecoder) -> object:
    try:
        value: object = decoder.decode(text)
        return value
    except json.JSONDecodeError as error:
        problem = f"not valid JSON at character {error.pos}: {error.msg}"
    except RecursionError:
        # Reachable only when the caller itself is close to the interpreter's limit.
        problem = "nested too deeply for the remaining stack"
    raise InvalidInputError(f"{where}: {problem}")


def _decoder(where: str, allow_floats: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object_builder(where),
        parse_int=_integer_parser(where, allow_floats),
        parse_float=_float_parser(where, allow_floats),
        parse_constant=_constant_refuser(where),
    )


def _object_builder(where: str) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise InvalidInputError(f"{where}: duplicate key '{printable(_first_repeated(pairs))}'")
        return members

    return build


def _first_repeated(pairs: list[tuple[str, object]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("called for pairs that repeat no key")


def _integer_parser(where: str, allow_floats: bool) -> Callable[[str], int]:
    def parse(digits: str) -> int:
        if len(digits) <= _MAX_DIGITS and digits.isascii():
            value = int(digits)
            if _MIN_INTEGER <= value <= _MAX_INTEGER and (value or allow_floats or digits == "0"):
                return value
        raise InvalidInputError(f"{where}: {printable(digits, limit=32)} is not a 64-bit integer")

    return parse


def _float_parser(where: str, allow_floats: bool) -> Callable[[str], float]:
    def parse(digits: str) -> float:
        if not allow_floats:
            raise InvalidInputError(f"{where}: {printable(digits, limit=32)} is not a plain integer")
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise InvalidInputError(f"{where}: {printable(digits, limit=32)} is out of range")
        return value

    return parse


def _constant_refuser(where: str) -> Callable[[str], object]:
    def refuse(constant: str) -> object:
        raise InvalidInputError(f"{where}: {constant} is not JSON")

    return refuse


def _check_surrogates(value: object, where: str) -> None:
    pending: list[object] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                raise InvalidInputError(f"{where}: lone surrogate in the string '{printable(item)}'")
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
