"""The attacks on what crosses the cut, on heads whose text is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.privacy.inversion import (
    invert_by_gradient,
    invert_causal,
    invert_lookup,
    refine,
    scales,
)
from fedtune.privacy.inversion_labels import labels_by_direction, labels_by_tail, matched
from fedtune.privacy.inversion_linear import fit_forward, fit_inverse, likeliest, nearest
from fedtune.privacy.inversion_picture import draw
from fedtune.privacy.inversion_words import Finding, Level, Share, lines, share, to_json

VOCABULARY, WIDTH, LENGTH = 40, 16, 7


class Head:
    """A small head written out: each place mixes its token with others' mean.

    ``sees``: "before" mixes in the places before it, "all" every place, "none" no other.
    """

    def __init__(self, sees: str, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, WIDTH, generator=source)
        self.mix = torch.randn(WIDTH, WIDTH, generator=source) / 4
        self.sees = sees

    def states_of(self, embedded: torch.Tensor) -> torch.Tensor:
        length = embedded.shape[1]
        if self.sees == "none":
            return torch.tanh(embedded @ self.mix) + embedded
        seen = torch.ones(length, length)
        seen = seen.tril() if self.sees == "before" else seen
        context = (seen / seen.sum(1, keepdim=True)) @ embedded
        return torch.tanh(context @ self.mix) + embedded

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.states_of(self.table[tokens])

    def after(self, before: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        batch, count = candidates.shape
        rows = torch.cat([before.repeat_interleave(count, 0), candidates.reshape(-1, 1)], 1)
        return self.states(rows)[:, -1].reshape(batch, count, -1)


def text(rows: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and a mask with rows of several lengths."""
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=source)
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    mask[1, 4:] = False
    return tokens * mask, mask


def rate(found: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor) -> float:
    return float((found == truth)[mask].float().mean())


def test_a_causal_text_is_found_whole() -> None:
    head = Head("before")
    tokens, mask = text()
    found = invert_causal(head.after, head.states(tokens), mask, VOCABULARY)
    assert torch.equal(found, tokens)


def test_a_wrong_head_finds_next_to_nothing() -> None:
    tokens, mask = text()
    wrong = Head("before", seed=5)
    found = invert_causal(wrong.after, Head("before").states(tokens), mask, VOCABULARY)
    assert rate(found, tokens, mask) < 0.3


def test_noise_alone_is_no_better_than_guessing() -> None:
    head = Head("before")
    tokens, mask = text(rows=40)
    torch.manual_seed(0)
    found = invert_causal(head.after, torch.randn(40, LENGTH, WIDTH), mask, VOCABULARY)
    # 276 tokens at 1 in 40: more than 10 % has a chance of 1e-9.
    assert rate(found, tokens, mask) < 0.1


def test_clipping_by_an_unknown_factor_hides_nothing() -> None:
    head = Head("before")
    tokens, mask = text()
    factor = torch.tensor([0.9, 0.5, 0.1, 0.01])
    seen = head.states(tokens) * factor[:, None, None]
    found = invert_causal(head.after, seen, mask, VOCABULARY, clipped=True)
    assert torch.equal(found, tokens)
    # One that takes no account of it does worse, so the estimate is of use.
    plain = invert_causal(head.after, seen, mask, VOCABULARY)
    assert rate(plain, tokens, mask) < 0.9


def test_what_a_language_model_expects_helps_under_noise() -> None:
    head = Head("before")
    tokens, mask = text(rows=30)
    torch.manual_seed(3)
    deviation = 1.5
    seen = head.states(tokens) + deviation * torch.randn(30, LENGTH, WIDTH)

    def prior(before: torch.Tensor) -> torch.Tensor:
        """Know the next token up to four."""
        hints = torch.full((30, VOCABULARY), -20.0)
        true = tokens[:, before.shape[1]]
        for more in range(4):
            hints[torch.arange(30), (true + more) % VOCABULARY] = -1.4
        return hints

    blind = invert_causal(head.after, seen, mask, VOCABULARY)
    told = invert_causal(head.after, seen, mask, VOCABULARY, deviation=deviation, prior=prior)
    assert rate(told, tokens, mask) > rate(blind, tokens, mask) + 0.1


def test_places_that_see_no_other_are_looked_up() -> None:
    head = Head("none")
    tokens, mask = text()
    scale = torch.tensor([1.0, 0.5, 0.25, 0.8])
    seen = head.states(tokens) * scale[:, None, None]
    assert torch.equal(invert_lookup(head.states, seen, mask, VOCABULARY, scale, chunk=7), tokens)
    wrong = invert_lookup(Head("none", seed=5).states, seen, mask, VOCABULARY)
    assert rate(wrong, tokens, mask) < 0.3


def test_a_text_seen_both_ways_is_found() -> None:
    head = Head("all")
    tokens, _ = text()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    seen = head.states(tokens)
    torch.manual_seed(0)
    made_up = torch.randint(VOCABULARY, (200, LENGTH))
    made = head.states(made_up)
    guess = fit_inverse(made, head.table[made_up])(seen)
    ranked = likeliest(fit_forward(made, head.table[made_up]), head.table, seen, count=8)
    assert rate(ranked[..., 0], tokens, mask) > 0.8
    moved = invert_by_gradient(head.states_of, guess, seen, mask, steps=200)
    assert rate(nearest(moved, head.table)[..., 0], tokens, mask) == 1.0
    wrong = (tokens + (torch.arange(LENGTH) % 3 == 0)) % VOCABULARY
    candidates = torch.arange(VOCABULARY).expand(*tokens.shape, -1)
    assert torch.equal(refine(head.states, wrong, seen, mask, candidates, sweeps=4), tokens)


def test_refining_cannot_find_what_is_not_among_the_candidates() -> None:
    head = Head("all")
    tokens, mask = text()
    wrong = (tokens + 1) % VOCABULARY
    found = refine(head.states, wrong, head.states(tokens), mask, wrong[..., None])
    assert rate(found, tokens, mask) == 0.0


def test_the_metric_of_noise_and_context_beats_the_inverse() -> None:
    """The linear inverse loses much more under noise than the likeliest token does."""
    head = Head("all")
    source = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCABULARY, (60, LENGTH), generator=source)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    made_up = torch.randint(VOCABULARY, (300, LENGTH), generator=source)
    # A direction that says little, made small: the inverse blows its noise up.
    head.table[:, 0] *= 8.0
    seen = head.states(tokens)
    seen = seen + 1.0 * torch.randn(seen.shape, generator=source)
    made, embedded = head.states(made_up), head.table[made_up]
    inverse = nearest(fit_inverse(made, embedded)(seen), head.table)[..., 0]
    likely = likeliest(fit_forward(made, embedded), head.table, seen, deviation=1.0)[..., 0]
    assert rate(likely, tokens, mask) >= rate(inverse, tokens, mask)
    assert rate(likely, tokens, mask) > 0.3


def test_scales_are_at_most_one() -> None:
    made = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    found = scales(made * torch.tensor([0.25, 3.0])[:, None, None], made, mask)
    assert found.tolist() == pytest.approx([0.25, 1.0])


# ---------------------------------------------------------------- labels


def gradients(labels: np.ndarray, noise: float) -> torch.Tensor:
    """Return gradients as a tail gives them: a direction per class, a length per example."""
    source = torch.Generator().manual_seed(4)
    ways = torch.randn(3, 1, 5, generator=source)
    sizes = torch.rand(len(labels), 1, 1, generator=source) + 0.01
    clean = ways[torch.from_numpy(labels)] * sizes
    return clean.expand(-1, 2, -1) + noise * torch.randn(len(labels), 2, 5, generator=source)


def test_labels_are_read_from_gradients() -> None:
    labels = np.arange(60) % 3
    back = gradients(labels, 0.0)
    assert matched(labels_by_direction(back, 3), labels).all()
    made = torch.stack([gradients(np.full(60, c), 0.0) for c in range(3)])
    assert (labels_by_tail(back, made) == labels).all()


def test_labels_are_not_read_from_noise() -> None:
    labels = np.arange(300) % 3
    back = gradients(labels, 100.0)
    assert matched(labels_by_direction(back, 3), labels).mean() < 0.5
    made = torch.stack([gradients(np.full(300, c), 0.0) for c in range(3)])
    assert (labels_by_tail(back, made) == labels).mean() < 0.5


def test_matching_names_clusters_and_makes_none_right() -> None:
    truth = np.array([0, 0, 1, 1, 2, 2])
    assert matched(np.array([2, 2, 0, 0, 1, 1]), truth).all()
    assert matched(np.array([0, 1, 0, 1, 0, 1]), truth).mean() < 1.0


# ---------------------------------------------------------------- words


def level(z: float, right: int, accuracy: float, epsilon: float | None) -> Level:
    one = share([right], [100])
    return Level(z, epsilon, {"search": one}, share([right == 100], [1]), {},
                 {"loss": 1.0, "accuracy": accuracy})  # fmt: skip


def finding(*levels: Level) -> Finding:
    return Finding(
        "tiny", "a model", "prompt", 1, 1, 6, 1, 100, 1.0, 1.0, 1e-5, 0.05, 0.5,
        {"accuracy": 0.5}, tuple(levels),
    )  # fmt: skip


def test_words_say_what_is_lost() -> None:
    said = "\n".join(lines(finding(level(0.0, 100, 0.9, None), level(0.1, 80, 0.6, 290.0))))
    assert "Without noise the server that runs the body can reconstruct the text: 100 %" in said
    assert "None of the noise that was tried both keeps the model useful and hides" in said


def test_words_admit_when_noise_helps() -> None:
    said = "\n".join(lines(finding(level(0.0, 100, 0.9, None), level(1.4, 6, 0.89, 8.0))))
    assert "With noise z = 1.4 the attacks recovered 6.0 %" in said
    assert "None of the noise" not in said


def test_words_do_not_claim_a_success_that_is_guessing() -> None:
    said = "\n".join(lines(finding(level(0.0, 4, 0.9, None))))
    assert "could not reconstruct the text" in said
    assert "proves nothing" in said


def test_ninety_nine_and_a_bit_is_not_a_hundred() -> None:
    all_but_one = Level(0.0, None, {"search": share([9999], [10000])}, share([0], [1]), {},
                        {"loss": 1.0, "accuracy": 0.9})  # fmt: skip
    said = "\n".join(lines(finding(all_but_one)))
    assert "99.9 %" in said
    assert "100 %" not in said


def test_shares_widen_where_rows_differ() -> None:
    even = share([5] * 20, [10] * 20)
    uneven = share([10, 0] * 10, [10] * 20)
    assert even.rate == uneven.rate == 0.5
    assert uneven.high - uneven.low > 2 * (even.high - even.low)
    assert share([], []) == Share(0, 0, 0.0, 1.0)


def test_picture_and_json() -> None:
    found = finding(level(0.0, 100, 0.9, None), level(0.1, 80, 0.6, 290.0))
    assert draw(found).startswith(b"\x89PNG")
    made = to_json(found)
    assert made["levels"][1]["tokens"]["search"]["rate"] == 0.8
    assert made["levels"][0]["epsilon_record"] is None
