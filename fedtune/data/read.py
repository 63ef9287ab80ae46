"""Reads the rows of a source: a file, a folder, a saved data set, a hub name, or our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config import DataConfig
from fedtune.data import formats, stdlib
from fedtune.data.row import Row, nearest
from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Table", "read_rows", "read_table"]

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Table:
    """Rows with the same columns each, and what was left out, in plain words."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def read_rows(data: DataConfig, source: str) -> list[Row]:
    """Read all rows of a source; see :func:`read_table`."""
    return list(read_table(data, source).rows)


def read_table(data: DataConfig, source: str) -> Table:
    """Read all rows of a source, and say what was left out.

    Nothing is fetched from the network unless ``source`` starts with ``hub:``.

    Parameters
    ----------
    data : DataConfig
        Format, encoding, separator, pattern and split.
    source : str
        ``fedtune:stdlib``, a file, a folder, or ``hub:NAME[:CONFIG]``.

    Returns
    -------
    Table
        Rows of strings, in the order of the files (folders: sorted by name).

    Raises
    ------
    FedtuneError
        If there is nothing there, the format is unknown, a line is broken, bytes
        do not decode, or no row is left.
    """
    if source.startswith("fedtune:"):
        if source != "fedtune:stdlib":
            raise _error(f"data.source='{source}' is unknown", "use 'fedtune:stdlib'")
        table = Table(stdlib.read_half(stdlib.PRIVATE))
    elif source.startswith("hub:"):
        table = Table(tuple(formats.as_rows(_read_hub(data, source), data.encoding)))
    else:
        table = _read_path(data, Path(source).expanduser())
    if not table.rows:
        raise _error(f"'{source}' holds no rows", "check data.source, data.format and the file")
    return table


def _error(message: str, hint: str) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode.DATA)


def _read_path(data: DataConfig, path: Path) -> Table:
    if not path.exists():
        near = nearest(path.name, _names(path.parent))
        raise _error(f"'{path}' does not exist", near or "check the path in data.source")
    saved = path.is_dir() and any((path / name).is_file() for name in _SAVED)
    if data.format == "datasets" or (data.format == "auto" and saved):
        return Table(tuple(formats.as_rows(_read_saved(data, path), data.encoding)))
    kind, files = _files(data, path)
    if kind == "text":
        return _read_texts(data, path, files)
    records = (record for file in files for record in _records(data, kind, file))
    return Table(tuple(formats.as_rows(records, data.encoding)))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _files(data: DataConfig, path: Path) -> tuple[str, list[Path]]:
    """Decide the format, and which files of a folder have it."""
    if path.is_file():
        if data.format != "auto":
            return data.format, [path]
        kind = _KINDS.get(path.suffix.lower())
        if kind is None:
            raise _error(
                f"'{path}': the extension '{path.suffix}' is unknown; known are "
                + ", ".join(sorted(_KINDS)),
                "set data.format, for example data.format='text'",
            )
        return kind, [path]
    entries = (path / name for name in _names(path) if not name.startswith("."))
    found = [(_KINDS.get(entry.suffix.lower()), entry) for entry in entries if entry.is_file()]
    kinds = {kind for kind, _ in found if kind is not None}
    wanted = data.format if data.format != "auto" else (min(kinds) if len(kinds) == 1 else "")
    if not wanted and kinds:
        raise _error(
            f"'{path}' holds files of several formats: {', '.join(sorted(kinds))}",
            "set data.format to one of them, or name one file",
        )
    files = [entry for kind, entry in found if kind == wanted]
    if not files:
        wording = f"{wanted} file" if wanted else "file of a known format"
        raise _error(
            f"'{path}' holds no {wording}; extensions read are {', '.join(sorted(_KINDS))}",
            "name a file, or a folder of a saved data set",
        )
    return wanted, files


def _records(data: DataConfig, kind: str, file: Path) -> Iterator[dict[str, Any]]:
    if kind == "jsonl":
        yield from formats.read_jsonl(file, data.encoding)
    elif kind == "csv":
        yield from formats.read_csv(file, data.encoding)
    else:
        yield from formats.read_parquet(file)


def _read_texts(data: DataConfig, path: Path, files: list[Path]) -> Table:
    pattern = formats.compile_pattern(data.pattern)
    rows: list[Row] = []
    unmatched = 0
    for file in files:
        found, missed = formats.read_text(file, data.encoding, data.separator, pattern)
        rows += found
        unmatched += missed
    if unmatched and not rows:
        raise _error(
            f"data.pattern='{data.pattern}' matches none of the {unmatched} rows of '{path}'",
            "the pattern must match a whole row; check data.separator too",
        )
    total = unmatched + len(rows)
    note = f"{unmatched} of {total} rows do not match data.pattern and were left out"
    return Table(tuple(rows), (note,) if unmatched else ())


def _read_saved(data: DataConfig, path: Path) -> list[dict[str, Any]]:
    """Read a folder written by ``save_to_disk``."""
    import datasets
    import pyarrow as pa

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise _error(
            f"'{path}' is not a saved data set: {error}", "write it with Dataset.save_to_disk"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if data.split not in saved:
            listed = ", ".join(f"'{name}'" for name in saved)
            raise _error(
                f"data.split='{data.split}' is not in '{path}'; the splits are {listed}",
                nearest(data.split, saved) or "name one of these splits",
            )
        saved = saved[data.split]
    elif saved.split is not None and str(saved.split).split("[")[0] != data.split:
        raise _error(
            f"data.split='{data.split}', but '{path}' is the split '{saved.split}'",
            f"set data.split='{saved.split}'",
        )
    return _plain(saved)


def _read_hub(data: DataConfig, source: str) -> list[dict[str, Any]]:
    """Fetch ``hub:NAME[:CONFIG]``."""
    import datasets
    import pyarrow as pa

    name, _, config = source.removeprefix("hub:").partition(":")
    if not name:
        raise _error(
            f"data.source='{source}' names no data set", "write hub:NAME or hub:NAME:CONFIG"
        )
    if data.format not in ("auto", "datasets"):
        raise _error(
            f"data.format='{data.format}' does not go with data.source='{source}'",
            "use data.format='auto'",
        )
    try:
        found = datasets.load_dataset(name, config or None, split=data.split)
    except (OSError, ValueError, RuntimeError, KeyError, pa.ArrowException) as error:
        raise _error(
            f"data.source='{source}', split '{data.split}', cannot be loaded: {error}",
            "check the name, data.split and the network; or save it and name the folder",
        ) from error
    return _plain(found)


def _plain(dataset: Any) -> list[dict[str, Any]]:
    """Return records with class numbers as class names; -1 (no label) is empty."""
    features = dict(dataset.features)
    named = {name: f.names for name, f in features.items() if type(f).__name__ == "ClassLabel"}
    records: list[dict[str, Any]] = dataset.with_format("arrow")[:].to_pylist()
    for record in records:
        for name, names in named.items():
            number = record[name]
            record[name] = names[number] if number is not None and number >= 0 else ""
    return records
