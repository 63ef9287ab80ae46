"""Clipping policies in the experiment file: what does not go together says so in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedtune.config import Config

BASE: dict[str, Any] = {
    "relation": "replace-special", "population": 64, "delta": 1e-3, "noise_multiplier": 1.0,
}  # fmt: skip
EACH = (
    "per-adapter", "quantile-per-adapter", "closed-form", "dp-lac", "geoclip", "random", "constant",
    "rldp",
)  # fmt: skip
PUBLIC = {"reward": "public", "public": "public.jsonl"}


def config(**tables: Any) -> Config:
    whole: dict[str, Any] = {
        "data": {"pack": False, "holdout": 0.0}, "evaluation": {"clients": 0},
        "federation": {"weighting": "uniform"}, "tuning": {"steps": 4},
    }  # fmt: skip
    for name, table in tables.items():
        whole[name] = {**whole.get(name, {}), **table}
    return Config.model_validate(whole)


def example(clip: str = "rldp", rldp: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    held = {"constant": (0.0,) * 9} if clip == "constant" else {}
    return {"example": BASE | {"clip": clip} | held | ({"rldp": rldp} if rldp else {}) | more}


def client(clip: str = "rldp", rldp: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    held = {"constant": (0.0,) * 9} if clip == "constant" else {}
    return {"client": BASE | {"clip": clip} | held | ({"rldp": rldp} if rldp else {}) | more}


@pytest.mark.parametrize("clip", EACH)
def test_every_policy_goes_with_gradients(clip: str) -> None:
    told = PUBLIC if clip == "rldp" else None
    config(privacy=example(clip))
    config(privacy=client(clip, told))


def words(**tables: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        config(**tables)
    return str(refused.value)


@pytest.mark.parametrize("clip", EACH)
def test_policies_of_several_blocks_need_gradients_or_no_pool(clip: str) -> None:
    mezo = {"method": "mezo"}
    assert f"'{clip}' is for gradients of examples" in words(privacy=example(clip), tuning=mezo)
    told = PUBLIC if clip == "rldp" else None
    pool = {"method": "fedkseed", "pool": {"entropy": "seed"}}
    assert f"and '{clip}' is for several" in words(privacy=client(clip, told), tuning=pool)
    config(privacy=client("quantile"), tuning=pool)


SECURE = {"secure": {"colluding": 0}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "federated with secure aggregation": (
        {
            "privacy": example(rldp={"mode": "federated"}),
            "federation": {"secure": {"clip_norm": 1.0}},
        },
        "with [federation.secure]",
    ),
    "federated with a promise about clients": (
        {"privacy": example(rldp={"mode": "federated"}) | client("flat")},
        "with [privacy.client]",
    ),
    "federated without gradients": (
        {"privacy": example(rldp={"mode": "federated"}), "tuning": {"method": "mezo"}},
        "is for gradients of examples",
    ),
    "federated at the server": (
        {"privacy": client(rldp=PUBLIC | {"mode": "federated"})},
        "here is one policy",
    ),
    "losses at the server": ({"privacy": client()}, "a server sees no losses"),
    "held-out rows at the server": (
        {"privacy": client(rldp={"reward": "held-out"})},
        "a server sees no losses",
    ),
    "public text of a cut model": (
        {"privacy": example(rldp=PUBLIC), "tuning": {"method": "sfprompt", "adapter": "prompt"}},
        "has not the body",
    ),
    "public text that is the private": (
        {"privacy": example(rldp=PUBLIC | {"public": "fedtune:stdlib"})},
        "is not data.source",
    ),
    "public text without its name": ({"privacy": example(rldp={"reward": "public"})}, "together"),
    "an order at the server": (
        {"privacy": client(rldp=PUBLIC | {"mode": "online", "noise": "order"})},
        "with nothing to order",
    ),
    "an order of two": (
        {"privacy": example(rldp={"mode": "online", "noise": "order"}), "tuning": {"steps": 2}},
        "with 2 there is nothing to order",
    ),
    "a filter over rounds": (
        {"privacy": client(rldp=PUBLIC | {"mode": "online", "noise": "filtered"})},
        "the ledger cannot hold a filter over rounds",
    ),
    "noise that the shipped policy never moves": (
        {"privacy": example(rldp={"noise": "order"})},
        "learnt with constant noise",
    ),
    "noise at the clients": (
        {
            "privacy": client("rldp", PUBLIC, noise_at="clients", sampler="everyone"),
            "federation": SECURE,
        },
        "use sampler='everyone', clip='flat'",
    ),
    "a table for another policy": (
        {"privacy": example("quantile", {"mode": "online"})},
        "it is for clip='rldp'",
    ),
    "a constant that is none": ({"privacy": example("flat", constant=(0.5,))}, "belong together"),
    "no constant": ({"privacy": example("constant", constant=())}, "belong together"),
    "a constant too large": ({"privacy": example("constant", constant=(1.5,))}, "from -1 to 1"),
    "laplace noise": ({"privacy": example(noise="laplace")}, "use clip='flat'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    tables, said = REFUSED[case]
    assert said in words(**tables)


@pytest.mark.parametrize(
    "tables",
    [
        {"privacy": example(rldp={"mode": "federated"})},
        {"privacy": example(rldp={"mode": "online"}), "federation": {"secure": {"clip_norm": 1.0}}},
        {"privacy": example(rldp={"mode": "meta"}) | client("flat")},
        {"privacy": example(rldp={"mode": "federated"} | PUBLIC)},
        {"privacy": example(rldp={"mode": "federated", "reward": "held-out"})},
        {"privacy": example(rldp={"mode": "online", "noise": "order"})},
        {"privacy": example(rldp={"mode": "online", "noise": "filtered"})},
        {"privacy": example("random", {"noise": "order"})},
    ],
    ids=str,
)
def test_what_goes_together_is_taken(tables: dict[str, Any]) -> None:
    config(**tables)


def test_public_text_is_found_beside_the_experiment(tmp_path: Path) -> None:
    from fedtune.configfile import load

    folder = tmp_path / "experiments"
    folder.mkdir()
    file = folder / "one.toml"
    file.write_text(
        """schema = 1
[data]
source = "notes.jsonl"
pack = false
holdout = 0.0
[evaluation]
clients = 0
[federation]
weighting = "uniform"
[privacy.example]
relation = "add-or-remove-one"
population = 400
delta = 1e-5
epsilon = 8.0
clip = "rldp"
[privacy.example.rldp]
mode = "online"
reward = "public"
public = "open.jsonl"
"""
    )
    example = load(file, []).privacy.example
    assert example is not None
    assert example.rldp is not None
    assert example.rldp.public == str(folder / "open.jsonl")
