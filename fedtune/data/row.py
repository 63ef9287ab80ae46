"""A row of the data: its columns, its templates, and whether it can be used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from string import Formatter

from fedtune.config import DataConfig
from fedtune.errors import ExitCode, FedtuneError

__all__ = [
    "Row",
    "check_columns",
    "check_label",
    "columns_of",
    "nearest",
    "render",
    "require_column",
    "template_columns",
    "usable",
]

Row = dict[str, str]


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` for the closest choice, or an empty string."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean '{found[0]}'?" if found else ""


def columns_of(rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Return the columns that occur in any row, in order of appearance."""
    return tuple(dict.fromkeys(name for row in rows for name in row))


def require_column(name: str, columns: Sequence[str], where: str) -> None:
    """Refuse a column that does not exist.

    Parameters
    ----------
    name : str
        The column.
    columns : sequence of str
        The columns that exist.
    where : str
        The setting that names the column, such as ``data.text='body'``.

    Raises
    ------
    FedtuneError
        With the columns that exist, and the nearest of them.
    """
    if name in columns:
        return
    listed = ", ".join(f"'{column}'" for column in columns) or "none"
    raise FedtuneError(
        f"{where}: there is no column '{name}'; the columns are {listed}",
        hint=nearest(name, columns) or "name one of these columns",
        code=ExitCode.DATA,
    )


@lru_cache(maxsize=256)
def _parts(template: str, where: str) -> tuple[tuple[str, str | None], ...]:
    """Split a template into (literal, column or None), refusing all but ``{column}``."""
    try:
        parsed = [
            (literal, name, spec, conversion)
            for literal, name, spec, conversion in Formatter().parse(template)
        ]
    except ValueError as error:
        raise FedtuneError(
            f"{where}: '{template}' is not a template: {error}",
            hint="write {{ and }} for a brace that is text",
            code=ExitCode.DATA,
        ) from error
    for _, name, spec, conversion in parsed:
        if name is not None and (not name or spec or conversion or set(name) & set(".[]{}")):
            field = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise FedtuneError(
                f"{where}: the field '{{{field}}}' is refused; only plain {{column}} is allowed",
                hint="name one column between the braces; write {{ and }} for a brace that is text",
                code=ExitCode.DATA,
            )
    return tuple((literal, name) for literal, name, _, _ in parsed)


def template_columns(template: str, where: str = "template") -> tuple[str, ...]:
    """Return the columns that a template uses.

    Parameters
    ----------
    template : str
        Text with plain ``{column}`` fields; ``{{`` and ``}}`` are braces.
    where : str
        The setting the template comes from, for the message.

    Raises
    ------
    FedtuneError
        If a field is anything else: an attribute, an index, a conversion, a format.
    """
    return tuple(dict.fromkeys(name for _, name in _parts(template, where) if name is not None))


def render(template: str, row: Mapping[str, str], where: str = "template") -> str:
    """Fill a template from a row.

    Raises
    ------
    FedtuneError
        If a field is not a plain ``{column}``, or the row has no such column.

    Examples
    --------
    >>> render("Question: {question}", {"question": "why?"})
    'Question: why?'
    """
    filled = []
    for literal, name in _parts(template, where):
        filled.append(literal)
        if name is not None:
            if name not in row:
                require_column(name, tuple(row), where)
            filled.append(row[name])
    return "".join(filled)


def check_columns(columns: Sequence[str], data: DataConfig) -> None:
    """Refuse data without the columns that ``data`` names.

    Raises
    ------
    FedtuneError
        For the first column that is missing, or a template that is refused.
    """
    if data.kind == "instruction":
        for where, template in (("data.prompt", data.prompt), ("data.completion", data.completion)):
            for name in template_columns(template, where):
                require_column(name, columns, where)
        return
    require_column(data.text, columns, f"data.text='{data.text}'")
    if data.kind == "classification":
        require_column(data.label, columns, f"data.label='{data.label}'")


def check_label(label: str, labels: Sequence[str], whose: str) -> None:
    """Refuse a label that is not in the set.

    Raises
    ------
    FedtuneError
        With the label, whose it is, the set and the nearest label.
    """
    if label in labels:
        return
    listed = ", ".join(f"'{known}'" for known in labels)
    raise FedtuneError(
        f"{whose}: the label '{label}' is not one of the labels {listed}",
        hint=nearest(label, labels) or "add it to data.labels, or correct the data",
        code=ExitCode.DATA,
    )


def fits(row: Mapping[str, str], data: DataConfig) -> bool:
    """Tell whether a row has every column that ``data`` names."""
    if data.kind == "instruction":
        wanted = (*template_columns(data.prompt), *template_columns(data.completion))
        return all(name in row for name in wanted)
    return data.text in row and (data.kind != "classification" or data.label in row)


def usable(row: Mapping[str, str], data: DataConfig, labels: Sequence[str]) -> bool:
    """Tell whether a row can become an example: it has text, and a label where one is needed.

    Parameters
    ----------
    row : mapping of str to str
        One row. Columns that are missing read as empty.
    data : DataConfig
        The kind of example and its columns.
    labels : sequence of str
        The label set; ``classification`` only. A label outside of it is not usable.
    """
    if data.kind == "instruction":
        return bool(render(data.completion, row, "data.completion").strip())
    if not row.get(data.text, "").strip():
        return False
    return data.kind != "classification" or row.get(data.label, "") in labels
