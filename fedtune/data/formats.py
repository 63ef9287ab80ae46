"""Parsers for the file formats: decoded text or bytes in, rows of strings out."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtune.data.row import Row
from fedtune.errors import ExitCode, FedtuneError

__all__ = [
    "as_rows",
    "compile_pattern",
    "decode",
    "read_csv",
    "read_jsonl",
    "read_parquet",
    "read_text",
]


def as_rows(records: Iterable[Mapping[str, Any]], encoding: str) -> list[Row]:
    """Turn records of any values into rows of strings with the same columns each.

    ``None`` and missing keys become ``""``; booleans, lists and objects are
    written as JSON; bytes are decoded.

    Raises
    ------
    FedtuneError
        If bytes are not in ``encoding``.
    """
    found = list(records)
    columns = dict.fromkeys(str(name) for record in found for name in record)
    return [
        dict.fromkeys(columns, "")
        | {str(name): _string(value, str(name), encoding) for name, value in record.items()}
        for record in found
    ]


def _string(value: object, column: str, encoding: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return decode(value, encoding, f"column '{column}'")
    if isinstance(value, bool | list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def decode(content: bytes, encoding: str, name: str) -> str:
    """Decode bytes; a UTF-8 byte order mark is dropped.

    Raises
    ------
    FedtuneError
        If the encoding is unknown, or the bytes are not in it (with the line).
    """
    try:
        codec = codecs.lookup(encoding).name
        return content.decode("utf-8-sig" if codec == "utf-8" else codec)
    except LookupError as error:
        raise FedtuneError(
            f"data.encoding='{encoding}' is not a known text encoding",
            hint="use for example 'utf-8' or 'latin-1'",
            code=ExitCode.DATA,
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        shown = content[error.start : error.start + 1].hex()
        raise FedtuneError(
            f"{name}, line {line}: byte 0x{shown} is not {encoding}",
            hint="set data.encoding to the encoding of the file, for example 'latin-1'",
            code=ExitCode.DATA,
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FedtuneError(
            f"{path} cannot be read: {error.strerror}",
            hint="check the file and who may read it",
            code=ExitCode.DATA,
        ) from error


def _broken(path: Path, line: int, what: str, hint: str) -> FedtuneError:
    return FedtuneError(f"{path}, line {line}: {what}", hint=hint, code=ExitCode.DATA)


def read_jsonl(path: Path, encoding: str) -> list[dict[str, Any]]:
    """Read JSON objects, one per line, or a file that is one JSON list of objects.

    Raises
    ------
    FedtuneError
        For a line that is not a JSON object, with its number.
    """
    text = decode(_bytes(path), encoding, str(path))
    if text.lstrip().startswith("["):
        records = _json(text, path, 0)
        for number, record in enumerate(records, 1):
            _check_record(record, path, f"item {number}")
        return list(records)
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [
        _check_record(_json(line, path, number), path, f"line {number}") for number, line in lines
    ]


def _json(text: str, path: Path, line: int) -> Any:
    hint = "each line holds one JSON object; or the file is one list of objects"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(path, line or error.lineno, f"not JSON: {error.msg}", hint) from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, line or 1, f"not usable JSON: {error}", hint) from error


def _check_record(record: object, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise FedtuneError(
            f"{path}, {place}: a JSON object is needed, not {type(record).__name__}",
            hint='write {"text": "..."}',
            code=ExitCode.DATA,
        )
    for name, value in record.items():
        if isinstance(value, str) and not value.isascii() and _has_surrogate(value):
            raise FedtuneError(
                f"{path}, {place}: '{name}' holds half of a surrogate pair, which is no character",
                hint="correct the \\ud... escape",
                code=ExitCode.DATA,
            )
    return record


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def read_csv(path: Path, encoding: str) -> list[Row]:
    """Read comma-separated values with a header; every value stays the text it is.

    Raises
    ------
    FedtuneError
        For a broken line (with its number), or a header that repeats a name.
    """
    text = decode(_bytes(path), encoding, str(path))
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        return list(_csv_rows(path, csv.reader(io.StringIO(text, newline=""), strict=True)))
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, reader: Any) -> Iterator[Row]:
    hint = "quote fields that hold commas, quotes or line breaks"
    header: list[str] = []
    try:
        for fields in reader:
            if not header:
                header = _csv_header(path, fields)
            elif fields and len(fields) != len(header):
                what = f"{len(fields)} fields, but the header has {len(header)}"
                raise _broken(path, reader.line_num, what, hint)
            elif fields:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise _broken(path, reader.line_num, f"not CSV: {error}", hint) from error


def _csv_header(path: Path, fields: list[str]) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise _broken(path, 1, f"the header repeats '{twice[0]}'", "give each column its own name")
    return fields


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read a parquet file.

    Raises
    ------
    FedtuneError
        If the file is not parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            records: list[dict[str, Any]] = file.read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise FedtuneError(
            f"{path} cannot be read as parquet: {error}",
            hint="write it again, or set data.format",
            code=ExitCode.DATA,
        ) from error
    return records


def compile_pattern(pattern: str) -> re.Pattern[str] | None:
    """Compile ``data.pattern``; ``None`` if it is empty.

    Raises
    ------
    FedtuneError
        If it is no regular expression, or has no named group.
    """
    if not pattern:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise FedtuneError(
            f"data.pattern='{pattern}' is not a regular expression: {error}",
            hint="correct it; in TOML write it between single quotes",
            code=ExitCode.DATA,
        ) from error
    if not compiled.groupindex:
        raise FedtuneError(
            f"data.pattern='{pattern}' has no named group, so there would be no column",
            hint="name the columns, for example '(?P<label>\\d) (?P<text>.+)'",
            code=ExitCode.DATA,
        )
    return compiled


def read_text(
    path: Path, encoding: str, separator: str, pattern: re.Pattern[str] | None
) -> tuple[list[Row], int]:
    """Read plain text: rows between separators, blank ones skipped.

    Line breaks around a row are dropped, and CRLF reads as LF. An empty
    separator makes the whole file one row.

    Returns
    -------
    list of Row
        Column ``text``, or the named groups of the pattern.
    int
        Rows that the whole pattern did not match; they are left out.
    """
    text = decode(_bytes(path), encoding, str(path)).replace("\r\n", "\n")
    between = separator.replace("\r\n", "\n")
    pieces = text.split(between) if between else [text]
    found = [piece.strip("\n") for piece in pieces if piece.strip()]
    if pattern is None:
        return [{"text": piece} for piece in found], 0
    matches = [match for match in map(pattern.fullmatch, found) if match]
    return [match.groupdict(default="") for match in matches], len(found) - len(matches)
