from __future__ import annotations

import itertools

from fedtune.seeds import derive


def test_a_seed_never_changes_its_value() -> None:
    # Golden: a change here would change every run that was ever made.
    assert derive(0, "cohort", 1) == 5609851646329409881
    assert derive(0) == derive(0)


def test_purposes_are_independent() -> None:
    purposes: list[tuple[int | str, ...]] = [
        (), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", 1), ("a", "1"), (1, "a"),
        ("a1",), (1,), (2,), (12,), (1, 2), (21,), (-1,),
    ]  # fmt: skip
    found = [derive(seed, *parts) for seed in (0, 1, 12) for parts in purposes]
    assert len(set(found)) == len(found)
    assert all(0 <= value < 2**63 for value in found)


def test_text_and_number_are_not_the_same() -> None:
    assert derive(0, "1") != derive(0, 1)
    assert derive(1, 2) != derive(2, 1)


def test_bits_look_random() -> None:
    # 4000 seeds: each of 63 bits is set 2000 +- 32 times; 6 sigma fails once in 10^7 runs.
    seeds = [derive(0, "client", n) for n in range(4000)]
    for bit in range(63):
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 2000) < 6 * 32
    near = (a ^ b for a, b in itertools.pairwise(seeds))
    assert 30 < sum(value.bit_count() for value in near) / 3999 < 33
