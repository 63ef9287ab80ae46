"""What a server tells its nodes of an experiment, and what a node makes of it.

The server proposes how to tune. Where the text is, where the model is, how the machine
is used and who keeps the budget is the owner's, and nothing of it is read from a server.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config import Config, EngineConfig
from fedtune.configfile import parse
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import same_text
from fedtune.privacy.plan import resolve
from fedtune.privacy.rldp.travel import shared_policy

__all__ = ["MOST_BYTES", "Own", "accept", "check_length", "digest_of", "leaving", "propose"]

MOST_BYTES = 256 * 1024
"""Terms are settings and labels; more than this is not read."""

_DEEPEST = 16
_WHOLE = ("tuning", "evaluation")
_TOLD: dict[str, frozenset[str]] = {
    "model": frozenset({"base", "task", "pooling", "words"}),
    "data": frozenset(
        "kind text prompt completion label labels template max_length pack holdout max_rows".split()
    ),
    "federation": frozenset(
        "rounds cohort quorum deadline retries weighting aggregation residual_rank "
        "server_optimizer secure".split()
    ),
    "privacy": frozenset("example client records_per_person insecure_seeded_noise".split()),
}
_TOP = frozenset({"schema", "name", "seed", *_WHOLE, *_TOLD})
_OWNED = "another folder of the owner's"
"""Stands for a base model that is not embedded: whoever joins has it on disk."""

_PUBLIC = "another file of the owner's"
"""Stands for public text that a clipping policy is rewarded by, likewise."""


@dataclass(frozen=True)
class Own:
    """What the owner of the data sets, whatever a server proposes.

    Attributes
    ----------
    name : str
        The node's enrolled name.
    source : str
        File or folder with the text.
    dataset : str
        Name of the text in the owner's ledger.
    ledger : str
        The owner's ledger.
    model : str
        Folder of the base model; empty: an embedded one.
    data : mapping
        The owner's names for columns, format and so on: ``[data]`` of the policy. There
        ``public`` is a file of public text, for a clipping policy that is rewarded by it.
    threads : int
        Of torch.
    device : str
    rows : int
        Public bound on the number of rows: never the number itself.
    body, body_root, body_key : str
        Split tuning: where the body is served, its certificate, and this node's key.
    """

    name: str
    source: str
    dataset: str
    ledger: str
    model: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    device: str = "cpu"
    rows: int = 1
    body: str = ""
    body_root: str = ""
    body_key: str = ""


def propose(config: Config) -> str:
    """Return an experiment's terms as canonical JSON: no path, no place, no name of data.

    Examples
    --------
    >>> told = json.loads(propose(Config(seed=3)))
    >>> told["seed"], told["model"]["base"], "source" in told["data"], "engine" in told
    (3, 'fedtune:tiny', False, False)
    """
    whole = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    told: dict[str, Any] = {key: whole[key] for key in ("schema", "name", "seed", *_WHOLE)}
    for table, names in _TOLD.items():
        told[table] = {key: value for key, value in whole[table].items() if key in names}
    if not config.model.base.startswith("fedtune:"):
        told["model"]["base"] = _OWNED
    for unit in ("example", "client"):
        rldp = told["privacy"].get(unit, {}).get("rldp", {})
        if rldp.get("public") and not rldp["public"].startswith("fedtune:"):
            rldp["public"] = _PUBLIC
    return json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)


def leaving(config: Config) -> tuple[str, ...]:
    """Return in plain words what leaves a client in each round beside its update.

    Examples
    --------
    >>> leaving(Config())
    ()
    """
    if shared_policy(config) is None:
        return ()
    return (
        "what its clipping policy decided, saw of its own releases, and was rewarded with: made "
        "of what the promise about examples covers already",
    )


def digest_of(terms: str) -> str:
    """Return the SHA-256 of terms: the same experiment, the same digest."""
    return hashlib.sha256(terms.encode()).hexdigest()


def accept(terms: str, own: Own) -> Config:
    """Return the settings that a node works with: the server's terms, the owner's places.

    Raises
    ------
    FedtuneError
        The terms are too long, not JSON, set what is not a server's to set, do not fit
        together, or promise a bound that their own noise does not keep.
    """
    told = _read(terms)
    engine = EngineConfig(
        executor="threads", workers=1, threads=own.threads, body=own.body or "local",
        body_root=own.body_root, body_key=own.body_key,
    )  # fmt: skip
    if extra := sorted(told.keys() - _TOP):
        raise _refused(f"the terms set '{extra[0]}', which is the owner's")
    for table, names in _TOLD.items():
        if extra := sorted(_table(told, table).keys() - names):
            raise _refused(f"the terms set '{table}.{extra[0]}', which is the owner's")
    columns = {name: value for name, value in own.data.items() if name != "public"}
    data = {**told["data"], **columns, "source": own.source, "eval": ""}
    if data.get("kind") == "classification" and not data.get("labels"):
        raise _refused("the terms name no data.labels: owners of data cannot agree on classes")
    data["partition"] = {"by": "owner", "column": own.name}
    whole = told | {
        "data": data,
        "model": {**told["model"], "base": _base(told, own), "device": own.device},
        "privacy": {**_promised(told, own), "ledger": own.ledger, "dataset": own.dataset},
        "engine": engine.model_dump(),
    }
    return resolve(parse(whole))


def _base(told: Mapping[str, Any], own: Own) -> str:
    base = told["model"].get("base", "")
    if isinstance(base, str) and base.startswith("fedtune:") and not own.model:
        return base
    if not own.model:
        raise FedtuneError(
            "the server's base model is not one that comes with fedtune",
            hint="get it from its publisher, compare, and join with --model FOLDER",
            code=ExitCode.MODEL,
        )
    folder = Path(own.model).expanduser().resolve()
    if not folder.is_dir():
        raise FedtuneError(
            f"no model folder '{own.model}'", hint="check --model", code=ExitCode.MODEL
        )
    return str(folder)


def _promised(told: Mapping[str, Any], own: Own) -> dict[str, Any]:
    """Return the promises; public text is the owner's copy, and no path of a server's."""
    promised = dict(told["privacy"])
    for unit in ("example", "client"):
        table = promised.get(unit)
        if not isinstance(table, dict):
            continue
        rldp = table.get("rldp")
        if not isinstance(rldp, dict) or not rldp.get("public"):
            continue
        place = _PUBLIC  # a policy at the server: nothing is read here
        if unit == "example":
            place = _public(rldp["public"], own)
        promised[unit] = {**table, "rldp": {**rldp, "public": place}}
    return promised


def _public(proposed: object, own: Own) -> str:
    given = own.data.get("public", "")
    if not given:
        if isinstance(proposed, str) and proposed.startswith("fedtune:"):
            return proposed
        raise FedtuneError(
            "the clipping policy is rewarded by public text, and there is none here",
            hint="ask the server's operator for its file of public text, read it, and name it in "
            'the policy: [data] public = "FILE"',
            code=ExitCode.CONFIG,
        )
    found = str(Path(str(given)).expanduser().resolve())
    if same_text(found, own.source):
        raise FedtuneError(
            "data.public of the policy is the private text itself",
            hint="name a file that anybody may have", code=ExitCode.PRIVACY,
        )  # fmt: skip
    return found


def check_length(terms: str) -> None:
    """Refuse terms that are too long to be read, or no text.

    Raises
    ------
    FedtuneError
        More than ``MOST_BYTES``, or half of a surrogate pair.
    """
    try:
        size = len(terms.encode())
    except UnicodeEncodeError as error:
        raise _refused("the terms are no text") from error
    if size > MOST_BYTES:
        raise _refused(f"the terms are longer than {MOST_BYTES} bytes")


def _read(terms: str) -> dict[str, Any]:
    check_length(terms)
    # Python's parser recurses: a thousand brackets are no settings.
    if _depth(terms) > _DEEPEST:
        raise _refused("the terms are nested too deep")
    try:
        told = json.loads(terms, parse_constant=_no_constant, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise _refused(f"the terms cannot be read: {type(error).__name__}") from error
    if not isinstance(told, dict) or not told.keys() >= _TOP:
        raise _refused("the terms are not whole")
    return told


def _depth(text: str) -> int:
    deepest = depth = 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        deepest = max(deepest, depth)
    return deepest


def _whole(text: str) -> int:
    """Return a whole number that any field could hold: 400 digits are no float."""
    number = int(text)
    if abs(number) >= 1 << 64:
        raise ValueError(text[:20])
    return number


def _no_constant(text: str) -> float:
    raise ValueError(text)


def _table(told: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = told[name]
    if not isinstance(found, dict):
        raise _refused(f"the terms' '{name}' is no table")
    return found


def _refused(what: str) -> FedtuneError:
    return FedtuneError(what, hint="the server is broken, of another version, or lies",
                        code=ExitCode.CONFIG)  # fmt: skip
