"""One server and three nodes over TLS, as the README has it; every process is a real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedtune.files import read_tensors
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.ledger import open_ledger
from tests.real.kit import Federation, federation

PRIVATE = """
[privacy]
dataset = "ward-notes"
insecure_seeded_noise = true
[privacy.example]
relation = "add-or-remove-one"
population = 20
delta = 1e-3
noise_multiplier = 1.0
clip = "rldp"
[privacy.example.rldp]
mode = "federated"
interval = 1
warmup = 0.0
"""

UNIFORM = 'weighting = "uniform"\n'

DISTRIBUTED = """
[privacy]
dataset = "ward-notes"
insecure_seeded_noise = true
[privacy.client]
relation = "replace-special"
population = 3
delta = 1e-3
noise_multiplier = 2.0
noise_at = "clients"
sampler = "everyone"
clip_norm = 0.5
"""


def run_to_end(made: Federation, seconds: float = 240) -> None:
    server = made.serve()
    for name in made.names:
        made.join(name)
    assert server.wait(seconds) == 0, made.logs()


def simulated(made: Federation, *more: str) -> Path:
    """Run the same file as a simulation; return its folder."""
    process = made.command(
        "simulate", made.file.name, "-s", "output.folder=simulated", *more, log="simulate"
    )
    assert process.wait(240) == 0, process.text
    return max((made.folder / "simulated").glob("*"))


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


@pytest.mark.slow
def test_a_private_run_over_tls_is_the_simulated_one_bit_for_bit(tmp_path: Path) -> None:
    """Under one clipping policy for all, which the server learns."""
    with federation(tmp_path, rounds=3, more=PRIVATE, settings=UNIFORM) as made:
        made.file.write_text(made.file.read_text().replace("steps = 2", "steps = 4"))
        run_to_end(made)
        alone = simulated(made, "-s", f'privacy.ledger="{tmp_path}/simulated.db"')
        assert same(made.adapter(), made.adapter(alone))
        kept, other = (
            read_tensors(max((run / "checkpoints").glob("*.safetensors")))[0]
            for run in (made.run(), alone)
        )
        assert int(kept["learner:steps"][0]) > 0
        assert same(kept, other)
        statement, stated = (
            json.loads((run / "adapter" / "privacy.json").read_text())
            for run in (made.run(), alone)
        )
        assert statement["differential_privacy"] == stated["differential_privacy"]
        chosen = sorted(
            next(tmp_path.glob(f"{name}.node/runs/*/000000/decisions.jsonl")).read_text()
            for name in made.names
        )
        assert chosen == sorted(
            file.read_text() for file in (alone / "clients").glob("*/decisions.jsonl")
        )
        assert all(text.count('"action"') >= 3 * 4 - 1 for text in chosen)
        for name in made.names:
            what = [line["what"] for line in made.sent(name)]
            updates = [words for words in what if "an update" in words]
            # 84 tensors of 40,704 numbers are the adapter's, 71 numbers a transition.
            assert updates == [
                "round 1: an update, 89 tensors of 40,846 numbers",
                "round 2: an update, 89 tensors of 40,988 numbers",
                "round 3: an update, 89 tensors of 40,988 numbers",
            ]
            ledger = open_ledger(tmp_path / f"{name}.node" / "ledger.db")
            account = ledger.find(f"{name}/{name}", Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE)
            assert account is not None
            assert sum(ledger.groups(account).values()) == 3 * 4
            assert (account.epsilon, account.delta) == (50.0, 1e-3)


@pytest.mark.slow
def test_a_secure_sum_with_noise_at_the_clients_is_charged_at_both_ends(tmp_path: Path) -> None:
    settings = UNIFORM + "[federation.secure]\nthreshold = 1.0\n"
    with federation(tmp_path, rounds=2, more=DISTRIBUTED, settings=settings) as made:
        run_to_end(made)
        alone = simulated(made, "-s", f'privacy.ledger="{tmp_path}/simulated.db"')
        assert same(made.adapter(), made.adapter(alone))
        for place, name in (("server-ledger.db", "ward-notes"), ("ward-1.node/ledger.db",
                                                                "ward-1/ward-1")):  # fmt: skip
            ledger = open_ledger(tmp_path / place)
            account = ledger.find(name, Unit.CLIENT, Relation.REPLACE_SPECIAL)
            assert account is not None, ledger.accounts()
            assert sum(ledger.groups(account).values()) == 2
        statement = json.loads((made.run() / "adapter" / "privacy.json").read_text())
        assert statement["differential_privacy"] is False  # whoever knows the seed knows the noise
        what = [line["what"] for line in made.sent("ward-1")]
        assert "round 1: a masked update, 2 tensors of 40,768 numbers" in what
        assert not any("an update, 84" in words for words in what)
