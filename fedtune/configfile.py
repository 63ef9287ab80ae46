"""Reading, overriding, comparing and writing the experiment file."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedtune.config import SCHEMA, Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.prompt import prompted

__all__ = ["difference", "dumps", "load", "parse"]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read one experiment file.

    Parameters
    ----------
    path : Path
        The TOML file. Relative paths inside it start at its folder.
    overrides : iterable of str
        ``"table.key=value"`` with a TOML value; a bare word counts as a string.

    Returns
    -------
    Config
        Validated, with every path absolute, and ``model.pooling`` decided where
        ``auto`` becomes ``prompt``.

    Raises
    ------
    FedtuneError
        The file is missing, not TOML, from a newer schema, or has a wrong or
        unknown key; the message names it.
    """
    if not path.is_file():
        raise FedtuneError(
            f"no experiment file '{path}'",
            hint="write one with: fedtune init",
            code=ExitCode.CONFIG,
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedtuneError(
            f"'{path}' is not valid TOML: {error}",
            hint="quote strings and check the line named above",
            code=ExitCode.CONFIG,
        ) from error
    for text in overrides:
        _override(table, text)
    return prompted(parse(table, base=path.parent))


def parse(table: Mapping[str, Any], base: Path | None = None) -> Config:
    """Validate a table of settings.

    Parameters
    ----------
    table : mapping
        As TOML or JSON gives it.
    base : Path, optional
        Folder that relative paths start at; without it paths stay as they are.
    """
    version = table.get("schema", SCHEMA)
    if isinstance(version, int) and version > SCHEMA:
        raise FedtuneError(
            f"schema = {version} is newer than this fedtune reads ({SCHEMA})",
            hint="update fedtune, or write the file anew with: fedtune init",
            code=ExitCode.CONFIG,
        )
    try:
        config = Config.model_validate(dict(table))
    except ValidationError as error:
        raise FedtuneError(
            _explain(error), hint="fedtune init writes a file with every key", code=ExitCode.CONFIG
        ) from error
    return config if base is None else _with_paths(config, base)


def dumps(config: Config) -> str:
    """Return the effective settings as TOML; ``parse`` gives the same value back."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def difference(old: Config, new: Config) -> tuple[str, ...]:
    """Return ``"key: old -> new"`` for every setting that differs.

    Examples
    --------
    >>> difference(Config(seed=1), Config(seed=2))
    ('seed: 1 -> 2',)
    """
    before, after = _flat(old.model_dump(by_alias=True)), _flat(new.model_dump(by_alias=True))
    keys = sorted(before.keys() | after.keys())
    return tuple(
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in keys
        if before.get(key) != after.get(key)
    )


def _override(table: dict[str, Any], text: str) -> None:
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise FedtuneError(
            f"override '{text}' is not key=value",
            hint="for example: -s federation.rounds=5",
            code=ExitCode.CONFIG,
        )
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    *tables, leaf = key.strip().split(".")
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise FedtuneError(
                f"override '{text}': '{name}' is a value, not a table", code=ExitCode.CONFIG
            )
    table[leaf] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key '{place}'{_nearest(problem['loc'])}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
            lines.append(f"{place}{shown}: {message}")
    return "; ".join(lines)


def _nearest(place: tuple[int | str, ...]) -> str:
    """Suggest the known key closest to an unknown one, in its own table first."""
    here: type[BaseModel] = Config
    for name in place[:-1]:
        field = next((f for k, f in here.model_fields.items() if name in (k, f.alias)), None)
        found = [kind for kind in _kinds(field) if issubclass(kind, BaseModel)]
        if not found:
            return ""
        here = found[0]
    wrong, near = str(place[-1]), [field.alias or key for key, field in here.model_fields.items()]
    if close := difflib.get_close_matches(wrong, near, n=1, cutoff=0.6):
        return f" (did you mean '{close[0]}'?)"
    everywhere = list(_flat(Config().model_dump(by_alias=True)))
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == wrong]
    return f" (did you mean '{elsewhere[0]}'?)" if elsewhere else f" (known: {', '.join(near)})"


def _kinds(field: FieldInfo | None) -> list[type]:
    """Return the classes a field may hold; a table that may be left out has two."""
    if field is None:
        return []
    kinds = get_args(field.annotation) or (field.annotation,)
    return [kind for kind in kinds if isinstance(kind, type)]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _with_paths(config: Config, base: Path) -> Config:
    data = config.data.model_copy(
        update={
            "source": _resolve(config.data.source, base),
            "eval": _resolve(config.data.eval, base) if config.data.eval else "",
        }
    )
    model = config.model.model_copy(update={"base": _resolve_model(config.model.base, base)})
    privacy = config.privacy
    if privacy.ledger and "://" not in privacy.ledger:
        ledger = _resolve(privacy.ledger, base)
        privacy = privacy.model_copy(update={"ledger": ledger})
    for unit in ("example", "client"):
        promised = getattr(privacy, unit)
        if promised is not None and promised.rldp is not None and promised.rldp.public:
            public = _resolve(promised.rldp.public, base)
            rldp = promised.rldp.model_copy(update={"public": public})
            promised = promised.model_copy(update={"rldp": rldp})
            privacy = privacy.model_copy(update={unit: promised})
    server = config.federation.server
    places = {name: _resolve(getattr(server, name), base) for name in ("keys", "state")}
    if server.status_token:
        places["status_token"] = _resolve(server.status_token, base)
    federation = config.federation.model_copy(update={"server": server.model_copy(update=places)})
    found = {"data": data, "model": model, "privacy": privacy, "federation": federation}
    return config.model_copy(update=found)


def _resolve(text: str, base: Path) -> str:
    """Make a path absolute: from a variable at the working folder, else at ``base``."""
    if text.startswith(("fedtune:", "hub:")):
        return text
    came_from_variable = False

    def fill(match: re.Match[str]) -> str:
        nonlocal came_from_variable
        name, default = match.group(1), match.group(2)
        if name in os.environ:
            came_from_variable = True
            return os.environ[name]
        if default is None:
            raise FedtuneError(
                f"'{text}' needs the environment variable {name}",
                hint=f"set it, or give a default: ${{{name}:-folder}}",
                code=ExitCode.CONFIG,
            )
        return default

    path = Path(_VARIABLE.sub(fill, text)).expanduser()
    start = Path.cwd() if came_from_variable else base
    return os.path.normpath(start.resolve() / path)


def _resolve_model(text: str, base: Path) -> str:
    """Leave names alone; a hub id such as ``org/name`` is a path only if it exists here."""
    if text.startswith("fedtune:"):
        return text
    looks_like_path = text.startswith((".", "/", "~", "$")) or (base / text).is_dir()
    return _resolve(text, base) if looks_like_path else text
