"""What an owner's policy says of itself, and of experiments; each case is one line of a table."""

from __future__ import annotations

from datetime import datetime, time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.client.policy import OwnerPolicy, asleep, judge, judge_model, read_policy, within
from fedtune.errors import ExitCode, FedtuneError
from fedtune.model_files import weights_digest
from fedtune.privacy.plan import client_promise, example_promise
from tests.client.node_kit import BY_SERVER, CLIENTS, EXAMPLE, experiment

DAY = datetime(2026, 3, 2)  # noqa: DTZ001 - local time, as the policy's
BARE = experiment(privacy__example=None)
BOTH = experiment(privacy__client=BY_SERVER)
CENTRAL = experiment(privacy__example=None, privacy__client=BY_SERVER)
SHARED = experiment(
    privacy__example=None, privacy__client=CLIENTS, federation__secure={"threshold": 1.0}
)


def test_the_defaults_are_those_of_the_page() -> None:
    policy = OwnerPolicy()
    assert (policy.max_epsilon, policy.max_epsilon_per_run, policy.max_delta) == (8.0, 8.0, 1e-5)
    assert policy.promises == ("example", "client")
    assert "sfprompt" not in policy.methods
    page = (Path(__file__).parents[2] / "docs" / "join.md").read_text(encoding="utf-8")
    section = page.split("## The owner's policy")[1].split("\n## ")[0]
    told = set(OwnerPolicy.model_fields) - {"insecure_noise"}  # that one is for tests
    assert {name for name in told if f"`{name}`" not in section} == set()


@pytest.mark.parametrize(
    ("promises", "allowed"),
    [
        (("example",), {"plain": True, "both": True, "central": False, "shared": False}),
        (("client",), {"plain": False, "both": False, "central": False, "shared": True}),
        (("client-by-server",), {"plain": False, "both": True, "central": True, "shared": False}),
        (("none",), {"plain": False, "both": False, "central": False, "shared": False}),
        ((), {"plain": False, "both": False, "central": False, "shared": False}),
    ],
)
def test_a_promise_that_is_good_enough_must_be_there(
    promises: tuple[str, ...], allowed: dict[str, bool]
) -> None:
    policy = OwnerPolicy.model_validate({"promises": promises, "max_epsilon_per_run": 100.0})
    runs = {"plain": experiment(), "both": BOTH, "central": CENTRAL, "shared": SHARED}
    assert {name: judge(policy, config) == () for name, config in runs.items()} == allowed
    assert (judge(policy, BARE) == ()) == ("none" in promises)


@pytest.mark.parametrize("limit", [1.0, 1.92, 1.93, 5.0])
def test_the_bound_of_a_run_is_the_accounted_one(limit: float) -> None:
    promise = example_promise(experiment())
    assert promise is not None
    planned = promise.spent().epsilon
    assert (judge(OwnerPolicy(max_epsilon_per_run=limit), experiment()) == ()) == (planned <= limit)


def test_shares_of_noise_count_on_so_many_honest() -> None:
    """Three members, all of whom must survive, of whom one may be the server's: 2 of 3."""
    assert judge(OwnerPolicy(max_honest_share=0.7), SHARED) == ()
    assert "67% honest survivors" in judge(OwnerPolicy(max_honest_share=0.6), SHARED)[0]
    alone = experiment(
        privacy__example=None, privacy__client=CLIENTS, federation__secure={"colluding": 0}
    )
    lax = OwnerPolicy(max_honest_share=0.99, min_colluding=0)
    assert "100% honest survivors" in judge(lax, alone)[0]
    assert judge(OwnerPolicy(min_colluding=0), alone) == ()
    assert "colluding=0 (at least 1)" in judge(OwnerPolicy(), alone)[0]


def test_models_are_known_by_their_bytes() -> None:
    digest = weights_digest("fedtune:tiny")
    assert judge_model(OwnerPolicy(models=(digest,)), "fedtune:tiny") == ""
    assert judge_model(OwnerPolicy(models=("fedtune:tiny",)), "fedtune:tiny") == ""
    assert digest in judge_model(OwnerPolicy(models=("0" * 64,)), "fedtune:tiny")


@given(st.times(), st.times(), st.times())
def test_hours_are_a_part_of_the_day(first: time, last: time, now: time) -> None:
    policy = OwnerPolicy(hours=(f"{first:%H:%M}-{last:%H:%M}",))
    minute = now.hour * 60 + now.minute
    start, end = first.hour * 60 + first.minute, last.hour * 60 + last.minute
    inside = start <= minute < end if start <= end else (minute >= start or minute < end)
    assert (asleep(policy, datetime.combine(DAY, now)) == "") == inside


def test_the_runs_own_bound_is_lowered_and_never_raised() -> None:
    for limit in (1.0, 8.0):
        for bound in (0.0, 2.0, 100.0):
            asked = experiment(
                privacy__example=EXAMPLE | {"epsilon": bound},
                privacy__client=BY_SERVER | {"epsilon": bound},
            )
            found = within(OwnerPolicy(max_epsilon_per_run=limit), asked)
            for before, after in (
                (example_promise(asked), example_promise(found)),
                (client_promise(asked), client_promise(found)),
            ):
                assert before is not None
                assert after is not None
                assert after.limit == (min(bound or limit, limit), before.delta)
                assert after.mechanism == before.mechanism


BROKEN = {
    "unknown": ("max_epsilonn = 1", "unknown key 'max_epsilonn'"),
    "infinite": ("max_epsilon = inf", "max_epsilon"),
    "nan": ("max_epsilon = nan", "max_epsilon"),
    "negative": ("max_epsilon = -1", "greater than 0"),
    "nothing": ("max_epsilon = 0", "greater than 0"),
    "delta": ("max_delta = 1.0", "less than 1"),
    "promise": ('promises = ["always"]', "promises.0"),
    "hours": ('hours = ["25:00-07:00"]', "HH:MM-HH:MM"),
    "cohort": ("min_cohort = 0", "min_cohort"),
    "place": ('[data]\nsource = "/etc/passwd"', "unknown key 'source'"),
    "public text that is no file": ("[data]\npublic = 3", "public is the name of a file"),
    "no table": ("max_epsilon", "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_policy_that_says_something_else_is_refused(tmp_path: Path, case: str) -> None:
    text, said = BROKEN[case]
    file = tmp_path / "owner.toml"
    file.write_text(text)
    with pytest.raises(FedtuneError, match=said) as caught:
        read_policy(file)
    assert caught.value.code == ExitCode.CONFIG
    assert "join.md" in caught.value.hint


def test_the_command_line_wins_and_no_file_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "owner.toml"
    file.write_text("max_epsilon = 3.0\nrounds = 4\n")
    assert read_policy(file, max_epsilon=2.0, dataset=None).max_epsilon == 2.0
    assert read_policy(file).rounds == 4
    assert read_policy(None) == OwnerPolicy()
    with pytest.raises(FedtuneError, match="cannot be read"):
        read_policy(tmp_path / "nowhere.toml")
