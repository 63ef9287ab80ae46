import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from fedtune.privacy.rldp import sac_nets as nets
from fedtune.privacy.rldp.sac import Sac, SacSettings, Transition
from tests.privacy.sac_kit import fed, transition

# What it computes


def test_log_probability_is_that_of_torch() -> None:
    torch.manual_seed(3)
    mean, log_std, noise = torch.randn(3, 500, 4, dtype=torch.float64)
    before, ours = nets.squashed(mean, log_std, noise)
    law = TransformedDistribution(
        Independent(Normal(mean, log_std.exp()), 1), [TanhTransform(cache_size=1)]
    )
    theirs = law.log_prob(law.transforms[0](before))
    torch.testing.assert_close(ours[:, 0], theirs)


def test_log_probability_integrates_to_one_and_is_finite_far_out() -> None:
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    mean, log_std = torch.tensor(0.4, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    noise = (grid.atanh() - mean) / log_std.exp()
    _, found = nets.squashed(mean, log_std, noise[:, None])
    assert found.exp().sum().item() * 1e-5 == pytest.approx(1, abs=1e-4)
    _, far = nets.squashed(*torch.tensor([[80.0], [0.0], [1.0]]))
    assert far.item() == pytest.approx(
        2 * (80 + 1 - math.log(2)) - 0.5 - 0.5 * math.log(2 * math.pi)
    )


def reference(sac: Sac, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """One step as the paper writes it, by autograd and torch's Adam; returns the networks."""
    states, actions, rewards, going, noise = batch
    size, state, settings = len(rewards), sac.state(), sac.settings

    def layers(name: str) -> list[torch.Tensor]:
        found = (f"{name}.{at}.{kind}" for at in range(3) for kind in ("weight", "bias"))
        return [torch.from_numpy(state[key]).requires_grad_() for key in found]

    def perceptron(values: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        w1, b1, w2, b2, w3, b3 = values
        return torch.relu(torch.relu(x @ w1 + b1) @ w2 + b2) @ w3 + b3

    def policy(x: torch.Tensor, draw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = perceptron(actor, x)[0].chunk(2, -1)
        inner = Normal(mean, log_std.clamp(*nets.LOG_STD).exp())
        law = TransformedDistribution(Independent(inner, 1), [TanhTransform(cache_size=1)])
        action = law.transforms[0](mean + inner.scale * draw)
        return action, law.log_prob(action)[:, None]

    def worth(values: list[torch.Tensor], x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return perceptron(values, torch.cat([x, u], -1))

    actor, critic, target = layers("actor"), layers("critic"), layers("target")
    now, later = states[0, :size], states[0, size:]
    temperature = math.exp(state["temperature"][0])
    with torch.no_grad():
        following, log_later = policy(later, noise[0, size:])
        goal = worth(target, later, following).amin(0) - temperature * log_later
        goal = rewards + settings.gamma * going * goal
    optimiser = torch.optim.Adam(critic, lr=settings.lr)
    loss = 0.5 * ((worth(critic, now, actions) - goal) ** 2).mean(1).sum()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    optimiser = torch.optim.Adam(actor, lr=settings.lr)
    drawn, log_now = policy(now, noise[0, :size])
    optimiser.zero_grad()
    (temperature * log_now - worth(critic, now, drawn).amin(0)).mean().backward()
    optimiser.step()
    heat = torch.tensor(state["temperature"], requires_grad=True)
    optimiser = torch.optim.Adam([heat], lr=settings.lr)
    (-(heat * (log_now.detach() + sac.target_entropy).mean())).sum().backward()
    optimiser.step()
    found = {"temperature": heat.detach()}
    kinds = [f"{at}.{kind}" for at in range(3) for kind in ("weight", "bias")]
    for at, kind in enumerate(kinds):
        found[f"actor.{kind}"] = actor[at].detach()
        found[f"critic.{kind}"] = critic[at].detach()
        mixed = torch.lerp(target[at].detach(), critic[at].detach(), settings.tau)
        found[f"target.{kind}"] = mixed
    return found


@pytest.mark.parametrize("seed", range(3))
def test_one_step_is_the_one_that_autograd_takes(seed: int) -> None:
    sac = Sac(5, 3, SacSettings(hidden=(24, 16), tau=0.3, lr=1e-2), seed=seed)
    random = torch.Generator().manual_seed(seed)
    states, noise = (torch.randn(1, 64, wide, generator=random) for wide in (5, 3))
    actions = torch.randn(32, 3, generator=random).tanh()
    rewards = torch.randn(32, 1, generator=random)
    going = (torch.rand(32, 1, generator=random) > 0.3).float()
    batch = (states, actions, rewards, going, noise)
    before, wanted = sac.state(), reference(sac, batch)
    sac._step(*batch)
    after = sac.state()
    for name, value in wanted.items():
        # Adam's first step is the sign of the gradient, near zero that of rounding: 1 in 1000
        odd = ~np.isclose(after[name], value.numpy(), rtol=1e-4, atol=2e-4)
        assert odd.mean() <= 1e-3, name
        assert not np.array_equal(after[name], before[name])


def test_gradients_are_those_of_autograd() -> None:
    values, into = nets.net(2, (4, 8, 6, 1)), nets.net(2, (4, 8, 6, 1))
    random = torch.Generator().manual_seed(1)
    nets.fill(values, random)
    x = torch.randn(2, 16, 4, generator=random, requires_grad=True)
    by_out = torch.randn(2, 16, 1, generator=random)
    copies = [v.clone().requires_grad_() for v in (*values.weights, *values.biases)]
    h = x
    for at in range(3):
        h = h @ copies[at] + copies[3 + at]
        h = torch.relu(h) if at < 2 else h
    wanted = torch.autograd.grad(h, [x, *copies], by_out)
    layers = nets.forward(values, x.detach())
    torch.testing.assert_close(layers[-1], h.detach())
    nets.gradients(values, layers, by_out, into)
    found = [nets.input_gradient(values, layers, by_out), *into.weights, *into.biases]
    torch.testing.assert_close(found, list(wanted))


def test_where_every_action_pays_the_same_the_policy_becomes_uniform() -> None:
    random = np.random.default_rng(0)
    same = [Transition(random.normal(size=2), np.zeros(1), 0.0, np.zeros(2), True)] * 8
    sac = Sac(2, 1, SacSettings(hidden=(16,), lr=1e-2, target_entropy=1.0), seed=1)
    sac.pretrain(same, 400)
    losses = sac.pretrain([], 50)
    assert losses is not None
    assert losses.entropy == pytest.approx(math.log(2), abs=0.03)  # the most on (-1, 1)


@pytest.mark.parametrize(("target", "sign"), [(-20.0, -1), (5.0, 1)])
def test_temperature_moves_toward_the_target_entropy(target: float, sign: int) -> None:
    """Too much entropy cools, too little warms; 5 nats cannot be had on (-1, 1)."""
    settings = SacSettings(hidden=(16,), lr=1e-2, target_entropy=target)
    sac = fed(0, 30, settings)
    assert sign * (sac.temperature - 1) > 0.1


def test_entropy_settles_at_its_target() -> None:
    settings = SacSettings(hidden=(16, 16), lr=1e-2, target_entropy=-1.0, batch_size=128)
    sac = Sac(1, 1, settings, seed=2)
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, 200)
    tried = [
        Transition(np.zeros(1), np.array([u]), 1 - abs(float(u)), np.zeros(1), True)
        for u in actions
    ]
    sac.pretrain(tried, 1500)
    losses = sac.pretrain([], 300)
    assert losses is not None
    assert losses.entropy == pytest.approx(-1.0, abs=0.25)


def test_targets_follow_the_critics_by_tau() -> None:
    settings = SacSettings(hidden=(8,), tau=0.25, start=1, updates=1)
    sac, random = Sac(3, 2, settings, seed=1), np.random.default_rng(1)
    first = sac.state()
    assert np.array_equal(first["critic.0.weight"], first["target.0.weight"])
    sac.learn(transition(random))
    after = sac.state()
    for name in (key for key in first if key.startswith("target.")):
        mixed = 0.75 * first[name] + 0.25 * after[name.replace("target", "critic")]
        np.testing.assert_allclose(after[name], mixed, rtol=1e-5, atol=1e-7)
    assert not np.array_equal(first["target.0.weight"], after["target.0.weight"])


def test_what_is_done_has_no_future_and_a_time_limit_does() -> None:
    """Reward 1 for ever is worth 1 / (1 - gamma), and 1 when each step is the last."""

    def worth(done: bool) -> float:
        settings = SacSettings(
            hidden=(16,), gamma=0.5, tau=0.1, lr=1e-2, first_temperature=1e-9, target_entropy=-1e9
        )
        sac = Sac(1, 1, settings, seed=0)
        spread = np.linspace(-1, 1, 32)
        sac.pretrain([Transition(np.zeros(1), [u], 1.0, np.zeros(1), done) for u in spread], 800)
        asked = torch.zeros(2, 1, 2)
        return nets.forward(sac._critic, asked)[-1].mean().item()

    assert worth(done=True) == pytest.approx(1, abs=0.05)
    assert worth(done=False) == pytest.approx(2, abs=0.1)


def test_states_are_centred_by_all_that_were_seen() -> None:
    random = np.random.default_rng(0)
    states = random.normal([5, -100, 0], [1, 20, 1e-6], (500, 3))
    sac = Sac(3, 1, SacSettings(buffer=16, start=10_000))
    for state in states:
        sac.learn(Transition(state, [0.0], 0.0, state, False))
    found = sac._memory.normalised(states.astype(np.float32))
    np.testing.assert_allclose(found[:, :2].mean(0), 0, atol=0.05)
    np.testing.assert_allclose(found[:, :2].std(0), 1, atol=0.12)
    assert abs(found[:, 2]).max() < 0.01  # what hardly moves is not blown up
    assert abs(sac._memory.normalised(np.full((1, 3), 1e9, np.float32))).max() == 10


# That it learns


def test_learns_a_bandit_that_depends_on_the_state() -> None:
    random = np.random.default_rng(4)
    settings = SacSettings(hidden=(32, 32), lr=3e-3, updates=4, first_temperature=0.1)
    sac = Sac(1, 1, settings, seed=4)

    def reward(state: np.ndarray, action: np.ndarray) -> float:
        return -float(abs(action[0] - 0.7 * np.sign(state[0])))

    for _ in range(250):
        state = random.uniform(-1, 1, 1)
        action = sac.act(state)
        sac.learn(Transition(state, action, reward(state, action), random.uniform(-1, 1, 1), True))
    states = random.uniform(-1, 1, (200, 1))
    ours = np.mean([reward(state, sac.act(state, mean=True)) for state in states])
    chance = np.mean([reward(state, random.uniform(-1, 1, 1)) for state in states])
    assert chance < -0.65
    assert ours > -0.15


def test_learns_to_steer_where_only_the_future_pays() -> None:
    """A point on a line: the cost is where it stands, the action only moves it."""
    random = np.random.default_rng(5)
    settings = SacSettings(
        hidden=(32, 32), gamma=0.9, lr=3e-3, tau=0.02, updates=4, first_temperature=0.1
    )
    sac = Sac(1, 1, settings, seed=5)

    def moved(x: np.ndarray, action: np.ndarray) -> np.ndarray:
        return np.clip(x + 0.5 * action, -2, 2)

    def mean_cost(steer: bool) -> float:
        costs = []
        for start in np.linspace(-2, 2, 9):
            x = np.array([start])
            for _ in range(12):
                action = sac.act(x, mean=True) if steer else random.uniform(-1, 1, 1)
                x = moved(x, action)
                costs.append(float(x[0] ** 2))
        return float(np.mean(costs))

    x = random.uniform(-2, 2, 1)
    for at in range(400):
        action = sac.act(x)
        after = moved(x, action)
        sac.learn(Transition(x, action, -float(x[0] ** 2), after, False))
        x = after if at % 12 else random.uniform(-2, 2, 1)
    assert mean_cost(steer=False) > 1.2
    assert mean_cost(steer=True) < 0.2  # the best there is: 0.093


def test_pretraining_on_what_another_did_teaches_the_same() -> None:
    random = np.random.default_rng(6)
    actions = random.uniform(-1, 1, (150, 1))
    tried = [
        Transition(np.zeros(1), action, -float((action[0] - 0.4) ** 2), np.zeros(1), True)
        for action in actions
    ]
    sac = Sac(1, 1, SacSettings(lr=3e-3, first_temperature=0.05, hidden=(32, 32)), seed=1)
    start = abs(sac.act(np.zeros(1), mean=True)[0] - 0.4)
    assert sac.pretrain(tried, 0) is None
    assert sac.transitions == 150
    assert sac.pretrain([], 600) is not None
    assert abs(sac.act(np.zeros(1), mean=True)[0] - 0.4) < 0.1 < start
