import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FedtuneError
from fedtune.privacy.clipping import (
    Automatic,
    Clip,
    Flat,
    PerBlock,
    Quantile,
    adapter_blocks,
    bits_sensitivity,
    clip_bits,
    split_noise,
)

TWO = (("a", "b"), ("c",))
RULES: list[Clip] = [
    Flat(0.3),
    Automatic(2.0),
    Automatic(0.5, gamma=1.0),
    PerBlock(TWO, (3.0, 4.0)),
    PerBlock(TWO, (3.0, 4.0), gamma=0.01),
]

# ---------------------------------------------------------------- what one example may add


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=50, deadline=None)
@given(size=st.lists(st.floats(0.0, 1e300), min_size=2, max_size=2))
def test_no_example_adds_more_than_the_sensitivity(rule: Clip, size: list[float]) -> None:
    norms = torch.tensor([size[: len(rule.norms)]], dtype=torch.float64)
    added = rule.weights(norms) * norms
    for block, bound in enumerate(rule.norms):
        assert float(added[0, block]) <= bound * (1 + 1e-12)
    assert float(added.square().sum().sqrt()) <= rule.sensitivity * (1 + 1e-12)


def test_v18_one_example_can_reach_every_block_at_once() -> None:
    rule = PerBlock(TWO, (3.0, 4.0))
    norms = torch.tensor([[1e6, 1e6]], dtype=torch.float64)
    assert float((rule.weights(norms) * norms).square().sum().sqrt()) == pytest.approx(5.0)
    assert rule.sensitivity == 5.0


def test_small_gradients_stay_as_they_are_only_in_hard_clipping() -> None:
    norms = torch.tensor([[0.1]], dtype=torch.float64)
    assert float(Flat(0.3).weights(norms)) == 1.0
    assert float(Automatic(0.3).weights(norms)) == pytest.approx(0.3 / 0.11)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_column_depends_on_itself_alone(rule: Clip) -> None:
    blocks = len(rule.norms)
    norms = torch.rand(5, blocks, dtype=torch.float64) * 10
    for block in range(blocks):
        other = torch.rand(5, blocks, dtype=torch.float64)
        other[:, block] = norms[:, block]
        assert torch.equal(rule.weights(norms)[:, block], rule.weights(other)[:, block])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_v01_what_is_not_finite_weighs_nothing(rule: Clip) -> None:
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1.0]).unsqueeze(1)
    weights = rule.weights(bad.expand(4, len(rule.norms)))
    assert weights[:3].eq(0.0).all()
    assert weights[3].gt(0.0).all()


def test_v02_a_gradient_of_zero_is_fine() -> None:
    for rule in RULES:
        assert torch.isfinite(rule.weights(torch.zeros(1, len(rule.norms)))).all()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_norm_must_be_a_number_above_zero(value: float) -> None:
    with pytest.raises(FedtuneError):
        Flat(value)
    with pytest.raises(FedtuneError):
        Automatic(value)
    with pytest.raises(FedtuneError):
        Automatic(1.0, gamma=value)
    with pytest.raises(FedtuneError):
        PerBlock((("a",),), (value,))


def test_blocks_cover_every_parameter_once() -> None:
    rule = PerBlock(TWO, (1.0, 1.0))
    assert rule.blocks(("a", "b", "c")) == TWO
    assert Flat(1.0).blocks(("a", "b")) == (("a", "b"),)
    for names in (("a", "b"), ("a", "b", "c", "d")):
        with pytest.raises(FedtuneError):
            rule.blocks(names)
    for blocks, norms in [((("a",), ("a",)), (1.0, 1.0)), (((), ("a",)), (1.0, 1.0)),
                          ((("a",),), (1.0, 1.0)), ((), ())]:  # fmt: skip
        with pytest.raises(FedtuneError):
            PerBlock(blocks, norms)
    with pytest.raises(FedtuneError):
        rule.weights(torch.zeros(3, 1))


def test_both_factors_of_a_layer_are_one_block() -> None:
    names = [
        "m.0.q.lora_A.default.weight", "m.0.q.lora_B.default.weight",
        "m.1.q.lora_A.default.weight", "m.1.q.lora_B.default.weight",
        "m.norm.weight", "m.norm.bias", "emb.lora_embedding_A.default",
        "emb.lora_embedding_B.default",
    ]  # fmt: skip
    blocks = adapter_blocks(names)
    assert [len(block) for block in blocks] == [2, 2, 2, 2]
    assert sorted(name for block in blocks for name in block) == sorted(names)


# ---------------------------------------------------------------- the quantile rule


def test_v13_bits_of_one_example_have_the_stated_norm() -> None:
    clips = (1.0, 2.0, 3.0)
    some = torch.rand(6, 3, dtype=torch.float64) * 4
    for sizes in itertools.product([0.0, 2.0, 9.0, math.nan], repeat=3):
        more = torch.cat([some, torch.tensor([sizes], dtype=torch.float64)])
        moved = clip_bits(more, clips) - clip_bits(some, clips)
        assert float(moved.norm()) == pytest.approx(bits_sensitivity(3), abs=1e-12)


def test_v13_an_empty_batch_moves_the_norm_by_its_noise_alone() -> None:
    bits = clip_bits(torch.zeros(0, 1), (1.0,))
    assert bits.tolist() == [0.0]
    assert Quantile().updated(1.0, float(bits), expected_batch=32) == 1.0


@pytest.mark.parametrize("target", [0.25, 0.5, 0.8])
def test_the_norm_walks_to_the_quantile_and_stays(target: float) -> None:
    random = torch.Generator().manual_seed(0)
    rule, batch = Quantile(target=target), 256
    for start in (1e-3, 1e3):
        norm, tail = start, []
        for step in range(400):
            # Poisson sampling: the number of examples is not the public one.
            count = int(torch.poisson(torch.tensor(float(batch)), generator=random))
            norms = torch.randn(count, 1, generator=random).exp().double()
            noisy = float(clip_bits(norms, (norm,))) + 12.8 * float(
                torch.randn((), generator=random)
            )
            norm = rule.updated(norm, noisy, expected_batch=batch)
            tail += [norm] if step >= 300 else []
        wanted = math.exp(float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(target))))
        assert math.exp(sum(map(math.log, tail)) / len(tail)) == pytest.approx(wanted, rel=0.08)


def test_the_norm_falls_when_too_few_are_clipped() -> None:
    rule = Quantile(target=0.5)
    assert rule.updated(1.0, 30.0, expected_batch=64) < 1.0
    assert rule.updated(1.0, -30.0, expected_batch=64) > 1.0


def test_bits_and_gradient_together_cost_the_whole_release() -> None:
    for z, sigma, blocks in [(1.0, 3.2, 1), (0.5, 20.0, 12), (4.0, 2.01, 1), (1.0, 0.9, 3)]:
        gradient = split_noise(z, sigma, blocks)
        bits = sigma / bits_sensitivity(blocks)
        assert gradient > z
        assert gradient**-2 + bits**-2 == pytest.approx(z**-2, rel=1e-12)


@pytest.mark.parametrize(("z", "sigma", "blocks"), [(1.0, 0.5, 1), (2.0, 0.9, 1), (1.0, 1.9, 16)])
def test_bits_that_cost_too_much_are_refused(z: float, sigma: float, blocks: int) -> None:
    with pytest.raises(FedtuneError, match="leaves nothing"):
        split_noise(z, sigma, blocks)


@pytest.mark.parametrize(
    ("norm", "noisy", "batch"),
    [(math.nan, 0.0, 1.0), (1.0, math.nan, 1.0), (1.0, math.inf, 1.0), (1.0, 0.0, 0.0),
     (0.0, 0.0, 1.0), (1e300, -1e9, 1.0), (1e-300, 1e9, 1.0)],
)  # fmt: skip
def test_the_quantile_rule_refuses_what_is_not_a_number(
    norm: float, noisy: float, batch: float
) -> None:
    with pytest.raises(FedtuneError):
        Quantile().updated(norm, noisy, expected_batch=batch)


def test_a_target_is_a_share() -> None:
    for target in (0.0, 1.0, math.nan):
        with pytest.raises(FedtuneError):
            Quantile(target=target)
    with pytest.raises(FedtuneError):
        bits_sensitivity(0)
