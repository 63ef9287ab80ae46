"""The controller on real releases: honest, exact after a restart, and hard to upset."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.config_privacy import RldpConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.noise import InsecureSeededNoise, NoiseSource, SecureNoise
from fedtune.privacy.replay import Stage
from fedtune.privacy.replay_checks import audit, neighbours
from fedtune.privacy.rldp.actions import ActionSpace
from fedtune.privacy.rldp.controller import (
    ACTIONS,
    STATES,
    raw_sensing,
    rldp,
    settings_of,
)
from fedtune.privacy.rldp.joint import Collected, Seen
from fedtune.privacy.rldp.policy import Job, Peeking, Policy, require_honest
from fedtune.privacy.rldp.rules import quantile_per_adapter
from fedtune.privacy.rldp.sac import Sac, Transition
from fedtune.privacy.rldp.sight import Public, unseal
from fedtune.privacy.rldp.transitions import packed, transitions_of
from fedtune.privacy.sampling import Poisson

torch.set_num_threads(1)

SIZES = {f"m.{i}.{m}.lora_{x}.w": 6 + 2 * i for i in range(2) for m in "qv" for x in "AB"}
WIDTH, ROWS, STEPS = sum(SIZES.values()), 80, 24
MECHANISM = Mechanism(Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(0.2), 0.9, denominator=16.0)


def _job(steps: int = STEPS, utility: Any = None, **options: Any) -> Job:
    settings = RldpConfig.model_validate({"mode": "online", "interval": 2} | options)
    return Job(SIZES, steps, 0.9, 16.0, 1.0, seed=5, utility=utility, options={"rldp": settings})


def _rows(seed: int = 0, rows: int = ROWS) -> list[NDArray[np.float64]]:
    """Each row is one example's gradient, and its loss at the end."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(rows, WIDTH + 1)) + np.linspace(-1, 1, WIDTH + 1)
    found[:, -1] = rng.uniform(1.0, 7.0, rows)
    return list(found)


def _step(
    policy: Policy, number: int, data: NDArray[np.float64], mechanism: Mechanism,
    source: NoiseSource,
) -> Seen:  # fmt: skip
    """One step as in training: draw, clip, sense, release."""
    shape = policy.shape()
    names = list(SIZES)
    starts = np.cumsum([0, *SIZES.values()])
    drawn = mechanism.draw(len(data), source)
    grads = {
        n: torch.from_numpy(data[drawn, starts[i] : starts[i + 1]]) for i, n in enumerate(names)
    }
    losses = torch.from_numpy(data[drawn, -1])
    norms = torch.stack(
        [torch.cat([grads[n] for n in block], 1).norm(dim=1) for block in shape.names], 1
    )
    weights = shape.rule.weights(norms)
    sums = {n: np.zeros(SIZES[n]) for n in names}
    collected = Collected(shape, policy.sensing, sums)
    if policy.sensing.held:
        collected.held_share = 0.2
    for i, block in enumerate(shape.names):
        collected.add({n: (weights[:, i : i + 1] * grads[n]).sum(0).numpy() for n in block})
    collected.sense(norms, losses)
    if policy.sensing.held:
        collected.sense_held(losses[:2])
    if isinstance(policy, Peeking):
        policy.peek(norms, losses)
    seen = collected.release(mechanism, source, number)
    policy.observe(seen)
    return seen


def _seen(count: int = STEPS, job: Job | None = None, make: Any = rldp) -> list[Seen]:
    """What a controller of this job is shown in a run."""
    policy, source = make(job or _job()), InsecureSeededNoise(3)
    data = np.array(_rows())
    return [_step(policy, number, data, MECHANISM, source) for number in range(count)]


def _follow(policy: Policy, seen: list[Seen]) -> Iterator[tuple[float, ...]]:
    for one in seen:
        yield policy.shape().norms + policy.shape().shares
        policy.observe(one)


def _utility() -> Callable[[], Public[float]]:
    calls = [0]

    def measured() -> Public[float]:
        calls[0] += 1
        return Public(-2.0 + math.sin(calls[0]))

    return measured


def test_decisions_fall_on_the_first_release_of_each_interval() -> None:
    controller, steps = rldp(_job(warmup=0.25)), []
    for number, one in enumerate(_seen()):
        controller.shape()
        if said := controller.decisions():
            steps.append(number)
            assert set(said[0]) == {"decision", "action", "reward", "utility"}
            assert len(said[0]["action"]) == ACTIONS
            assert abs(said[0]["reward"]) <= 1.0
        controller.observe(one)
    assert steps == list(range(6, STEPS, 2))


def test_until_then_it_is_the_quantile_rule_to_the_bit() -> None:
    job = _job(warmup=0.9)
    rule = quantile_per_adapter(replace(job, options={"sensing": 0.005}))
    seen = _seen(job=job)
    one, two = list(_follow(rldp(job), seen)), list(_follow(rule, seen))
    assert one[:20] == two[:20]
    assert len(set(one[:20])) == 20


def test_between_decisions_the_rule_goes_on_with_the_targets_of_the_last_action() -> None:
    controller, seen = rldp(_job(warmup=0.0, interval=12)), _seen(12)
    list(_follow(controller, seen))
    decided = controller.shape()
    push = ActionSpace(SIZES, 1.0).move(np.array(controller.decisions()[0]["action"]))
    assert len(set(push)) > 1
    controller.observe(seen[0])
    inside = seen[0].inside
    assert inside is not None
    for old, new, share, want in zip(
        decided.norms, controller.shape().norms, inside.value, push, strict=True
    ):
        target = min(max(0.5 + 0.4 * want, 0.05), 0.95)
        assert new == pytest.approx(old * math.exp(0.2 * (target - share)), rel=1e-5)
    paper = rldp(_job(warmup=0.0, interval=12, preset="paper"))
    list(_follow(paper, seen))
    decided = paper.shape()
    paper.observe(seen[0])
    assert paper.shape() == decided


@pytest.mark.parametrize("mode", ["online", "meta", "federated"])
@pytest.mark.parametrize("reward", ["loss", "held-out", "public"])
def test_on_a_restart_it_goes_on_to_the_bit(mode: str, reward: str) -> None:
    public = "a file" if reward == "public" else ""
    job = _job(mode=mode, reward=reward, public=public, noise="order", warmup=0.1)
    job = replace(job, utility=_utility())
    seen = _seen(job=replace(job, utility=_utility()))
    whole = rldp(replace(job, utility=_utility()))
    expected = list(_follow(whole, seen))
    wanted = whole.wanted_noise()
    utility = _utility()
    now = rldp(replace(job, utility=utility))
    found = []
    for one in seen:
        kept = now.state()
        now = rldp(replace(job, utility=utility, seed=99))
        now.restore({name: value.copy() for name, value in kept.items()})
        found += list(_follow(now, [one]))
    assert found == expected
    assert now.wanted_noise() == wanted
    assert len(set(expected)) > 8
    end, again = whole.state(), now.state()
    assert end.keys() == again.keys()
    for name in end:
        np.testing.assert_array_equal(end[name], again[name], err_msg=name)


def test_a_state_that_is_not_its_own_is_refused_and_changes_nothing() -> None:
    controller = rldp(_job())
    seen = _seen(10)
    list(_follow(controller, seen))
    good = controller.state()
    bad = {
        "a name less": {k: v for k, v in good.items() if k != "norms"},
        "nan": good | {"numbers": good["numbers"] * np.nan},
        "size": good | {"shares": np.full(5, 0.2)},
        "type": good | {"counts": good["counts"].astype(np.float64)},
        "norm": good | {"norms": good["norms"] * 1e9},
        "gradient": good | {"interval.before": np.zeros(3, np.float32)},
        "network": good | {"sac.actor.0.weight": good["sac.actor.0.weight"] * np.nan},
        "transitions": good | {"new.reward": np.full(3, 9.0, np.float32)},
    }
    for name, state in bad.items():
        elsewhere = state | {"action": good["action"] + 0.25} if "action" in state else state
        with pytest.raises(FedtuneError):
            controller.restore(elsewhere)
        for key, value in controller.state().items():
            np.testing.assert_array_equal(value, good[key], err_msg=f"{name}: {key}")


def test_a_private_tensor_reaches_no_controller() -> None:
    controller, seen = rldp(_job()), _seen(1)[0]
    smuggled: list[dict[str, Any]] = [
        {"loss": torch.tensor(1.0)}, {"loss": 1.0}, {"inside": (0.5,) * 4},
        {"means": seen.means.value}, {"deviations": np.ones(4)}, {"step": 0},
        {"held": np.float64(1.0)}, {"inside_deviation": 0.1}, {"noise_multiplier": 0.9},
        {"loss_deviation": torch.ones(1)}, {"held_deviation": 2.0},
    ]  # fmt: skip
    for change in smuggled:
        with pytest.raises(FedtuneError, match="was shown a"):
            controller.observe(replace(seen, **change))
    controller.observe(seen)


def test_a_utility_is_public_or_refused() -> None:
    for value in (1.5, torch.tensor(1.5)):
        controller = rldp(_job(reward="public", public="a file", utility=lambda v=value: v))
        controller.observe(_seen(1)[0])
        controller.observe(replace(_seen(1)[0], step=Public(1)))
        with pytest.raises(FedtuneError, match="was shown a"):
            controller.shape()


def test_it_keeps_no_tensor_and_no_function_but_the_utility() -> None:
    controller = rldp(_job())
    list(_follow(controller, _seen(10)))
    held = {k: v for k, v in vars(controller).items() if isinstance(v, torch.Tensor)}
    assert not held


def _program(stage: Stage, rows: list[NDArray[np.float64]], make: Callable[[Job], Policy]) -> Any:
    policy, source = make(_job(warmup=0.2)), SecureNoise()
    mechanism = stage.watch(MECHANISM)
    for number in range(STEPS):
        _step(policy, number, np.array(rows).reshape(-1, WIDTH + 1), mechanism, source)
        stage.emit("decisions", policy.decisions())
        stage.emit("shape", policy.shape().facts())
    stage.emit("state", policy.state())


def test_on_neighbouring_data_it_acts_the_same_to_the_bit() -> None:
    odd = {
        "huge": np.full(WIDTH + 1, 1e6), "none": np.zeros(WIDTH + 1),
        "at every norm": np.full(WIDTH + 1, 0.2), "loss": np.append(np.zeros(WIDTH), 1e9),
    }  # fmt: skip
    pairs = neighbours(_rows(), odd)[:6]
    assert audit(partial(_program, make=rldp), pairs) == []


def test_the_harness_sees_raw_sensing() -> None:
    pairs = neighbours(_rows(), {"huge": np.full(WIDTH + 1, 1e6)})[:2]
    found = {finding.check for finding in audit(partial(_program, make=raw_sensing), pairs)}
    assert "messages" in found


def test_raw_sensing_is_refused_where_privacy_is_stated() -> None:
    raw = raw_sensing(_job())
    assert not raw.honest
    assert raw.sensing.left == 1.0
    with pytest.raises(FedtuneError, match="NOT differentially private"):
        require_honest(raw)
    require_honest(rldp(_job()))
    seen = _seen(make=raw_sensing)
    assert all(one.inside is None and one.loss is None for one in seen)


def test_raw_sensing_learns_from_what_it_peeked_at() -> None:
    raw, source, data = raw_sensing(_job(warmup=0.1)), InsecureSeededNoise(2), np.array(_rows())
    utilities = []
    for number in range(STEPS):
        _step(raw, number, data, MECHANISM, source)
        raw.shape()
        utilities += [said["utility"] for said in raw.decisions()]
    assert len(utilities) >= 10
    assert -6.0 < min(utilities) <= max(utilities) < -2.0
    assert len(set(raw.shape().norms)) == 4


def test_no_random_numbers_but_its_own() -> None:
    torch.manual_seed(0)
    before, also = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002 the global one
    list(_follow(rldp(_job(factors=True)), _seen(job=_job(factors=True))))
    assert torch.equal(before, torch.get_rng_state())
    assert str(np.random.get_state()) == also  # noqa: NPY002


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-38])
def test_whatever_is_released_the_next_shape_is_sound(value: float) -> None:
    controller, seen = rldp(_job(warmup=0.0)), _seen(4)
    for number in range(STEPS):
        one = seen[number % 4]
        means = {n: np.full_like(v, value) for n, v in one.means.value.items()}
        bits = tuple(value for _ in one.shape.names)
        controller.observe(replace(
            one, step=Public(number), shape=controller.shape(),
            means=unseal(means, by=MECHANISM), inside=unseal(bits, by=MECHANISM),
            loss=unseal(value, by=MECHANISM),
        ))  # fmt: skip
        shape = controller.shape()
        assert all(5e-4 <= norm <= 500 for norm in shape.norms)
        assert math.fsum(shape.shares) == pytest.approx(1.0)
    assert controller.faults == 0
    again = rldp(_job(warmup=0.0))
    again.restore(controller.state())


def test_a_network_gone_wrong_is_replaced_and_the_shape_kept() -> None:
    controller, seen = rldp(_job(warmup=0.0)), [replace(s, inside=None) for s in _seen()]
    list(_follow(controller, seen[:6]))
    before = controller.shape()
    controller.observe(seen[6])
    controller.observe(seen[7])
    controller._sac._actor.flat.fill_(math.nan)
    assert controller.shape() == before
    assert controller.faults == 1
    assert controller.decisions()[-1]["fault"] is True
    list(_follow(controller, seen[8:]))
    assert controller.faults == 1
    assert controller.shape() != before
    again = rldp(_job(warmup=0.0))
    again.restore(controller.state())
    assert again.faults == 1


def test_federated_it_acts_for_the_server_and_leaves_learning_to_it() -> None:
    job = _job(mode="federated", warmup=0.0)
    controller, seen = rldp(job), _seen(job=job)
    start = controller._sac.actor_state()
    list(_follow(controller, seen))
    for name, value in controller._sac.actor_state().items():
        np.testing.assert_array_equal(value, start[name])
    made = controller.transitions()
    rows = transitions_of(made)
    assert len(rows) == STEPS // 2 - 2
    assert not len(controller.transitions()["reward"])
    np.testing.assert_array_equal(packed(rows)["state"], made["state"])
    np.testing.assert_array_equal(made["state"][1:], made["next_state"][:-1])
    server = Sac(STATES, ACTIONS, settings_of(RldpConfig(mode="federated")), 0)
    assert server.pretrain(rows, 20) is not None
    other = rldp(job)
    other.load_actor(server.actor_state())
    assert list(_follow(other, seen)) != list(_follow(rldp(job), seen))
    with pytest.raises(FedtuneError) as caught:
        other.load_actor({k: v * np.nan for k, v in server.actor_state().items()})
    assert caught.value.code == ExitCode.MODEL


def test_the_shipped_policy_needs_no_luck() -> None:
    job = _job(mode="meta", warmup=0.1)
    seen = _seen(job=job)
    one, two = (list(_follow(rldp(replace(job, seed=s)), seen[:12])) for s in (1, 2))
    assert one == two
    assert len(set(one)) > 4


@pytest.mark.parametrize("noise", ["order", "filtered"])
def test_the_noise_it_wants_is_within_the_spread(noise: str) -> None:
    controller = rldp(_job(noise=noise, spread=0.2, warmup=0.0))
    wanted = []
    for one in _seen():
        wanted.append(controller.wanted_noise())
        controller.observe(one)
    found = [w for w in wanted if w is not None]
    assert len(found) == STEPS
    assert min(found) >= 0.9 * 0.8
    assert max(found) <= 0.9 * 1.2
    assert len(set(found)) > 5
    assert rldp(_job()).wanted_noise() is None


def test_settings_that_leave_nothing_to_learn_from_are_refused() -> None:
    with pytest.raises(FedtuneError, match="without public text"):
        rldp(_job(reward="public", public="a file"))
    clients = replace(_job(), losses=False)
    with pytest.raises(FedtuneError, match="have no loss"):
        rldp(clients)
    frozen = rldp(replace(_job(mode="meta"), losses=False))
    assert frozen.sensing.loss == 0.0
    assert frozen.sensing.bits == 0.01


def test_the_papers_settings() -> None:
    paper = rldp(_job(preset="paper", interval=0))
    assert paper.interval == 112
    assert rldp(_job(preset="paper", interval=3)).interval == 3
    assert rldp(_job(steps=400, interval=0)).interval == 10


def test_what_it_remembers_stays_small() -> None:
    sizes = {f"m.{i}.q.lora_{x}.w": 40_000 for i in range(16) for x in "AB"}
    controller = rldp(replace(_job(), sizes=sizes, steps=120))
    source = InsecureSeededNoise(0)
    zeros = {n: np.zeros(size) for n, size in sizes.items()}
    collected = Collected(controller.shape(), controller.sensing, zeros)
    one = collected.release(MECHANISM, source, 0)
    for number in range(6):
        controller.observe(replace(one, step=Public(number)))
        controller.shape()
    whole = sum(value.nbytes for value in controller.state().values())
    assert whole + 2048 * (2 * STATES + ACTIONS + 2) * 4 < 5_000_000


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_what_it_did_at_random_teaches_it_which_way_norms_should_go(better: str) -> None:
    # Without bits, so that the quantile rule moves nothing.
    seen, sign = [replace(s, inside=None) for s in _seen()], -1.0 if better == "lower" else 1.0

    def run(seed: int, actor: dict[str, NDArray[Any]] | None) -> tuple[float, list[Transition]]:
        def utility() -> Public[float]:
            return Public(sign * float(np.log(policy._shape.norms).mean()))

        job = _job(
            steps=50, interval=1, warmup=0.0, reward="public", public="a file", utility=utility,
            mode="federated",
        )  # fmt: skip
        policy = rldp(replace(job, seed=seed))
        if actor is not None:
            policy.load_actor(actor)
            policy.mean = True
        for number in range(50):
            policy.observe(replace(seen[number % len(seen)], step=Public(number)))
            policy.shape()
        moved = float(np.log(policy.shape().norms).mean()) - math.log(0.5)
        return sign * moved, transitions_of(policy.transitions())

    server = Sac(STATES, ACTIONS, settings_of(RldpConfig(mode="federated")), 1)
    runs = [run(seed, None) for seed in range(8)]
    server.pretrain([one for _, made in runs for one in made], 600)
    learnt, _ = run(0, server.actor_state())
    assert learnt > 3.0 > 2.0 + float(np.mean([moved for moved, _ in runs]))
