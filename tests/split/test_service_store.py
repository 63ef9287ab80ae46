"""What the server holds is bounded in bytes, in number and in time."""

from __future__ import annotations

import pytest
import torch

from fedtune.server.body_store import Released, Seen, Shelf
from fedtune.split.calls import Name, Refused, Status


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_least_used_goes_first_and_sizes_add_up() -> None:
    shelf: Shelf[str] = Shelf(10, 60.0)
    for name, size in (("a", 4), ("b", 4)):
        shelf.put(name, name, size)
    assert shelf.get("a") == "a"
    shelf.put("c", "c", 4)
    assert [shelf.get(name) for name in "abc"] == ["a", None, "c"]
    assert shelf.size == 8
    shelf.put("c", "again", 6)
    assert (shelf.get("a"), shelf.get("c"), shelf.size) == ("a", "again", 10)
    shelf.put("d", "too large", 11)
    assert shelf.get("d") is None
    assert shelf.size == 10
    assert shelf.pop("c") == "again"
    assert shelf.pop("c") is None
    assert shelf.size == 4


def test_use_lengthens_a_time_only_where_it_should() -> None:
    clock = Clock()
    used: Shelf[int] = Shelf(10, 60.0, clock=clock)
    fixed: Shelf[int] = Shelf(10, 60.0, touch=False, clock=clock)
    for shelf in (used, fixed):
        shelf.put("a", 1, 1)
    clock.now = 59.0
    assert used.get("a") == fixed.get("a") == 1
    clock.now = 61.0
    fixed.sweep()
    assert len(fixed) == fixed.size == 0
    assert used.get("a") == 1
    clock.now = 122.0
    assert used.get("a") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [0, 5])
def test_released_activations_come_back_to_the_bit(dtype: torch.dtype, length: int) -> None:
    clock = Clock()
    held = Released(1 << 20, 60.0, clock)
    values = torch.randn(length, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    held.put("run", "ann", bytes(32), 7, values)
    found = held.get("run", "ann", bytes(32), 7)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, values)
    for place in (("run", "ann", bytes(31) + b"k", 7), ("run", "ann", bytes(32), 8)):
        assert held.get(*place) is None
    clock.now = 60.0
    assert held.get("run", "ann", bytes(32), 7) is None
    with pytest.raises(Refused, match="key of 3 bytes"):
        held.put("run", "ann", b"key", 7, values)


def test_what_was_tampered_with_is_not_found() -> None:
    held = Released(1 << 20, 60.0)
    held.put("run", "ann", bytes(32), 7, torch.ones(3, 8))
    held.put("run", "bob", bytes(32), 7, torch.zeros(3, 8))
    (ann, bob) = held.shelf._found
    # One client's ciphertext in another's place: the place is sealed in.
    held.shelf._found[bob] = held.shelf._found[ann]
    assert held.get("run", "bob", bytes(32), 7) is None
    assert held.get("run", "ann", bytes(32), 7) is not None


def test_calls_are_remembered_for_each_client() -> None:
    seen = Seen(60.0, each=2)
    first = Name("run", "ann", "s1", 1)
    seen.check(first, b"a")
    seen.check(first, b"a")
    seen.check(Name("run", "ann", "s1", 2), b"b")
    seen.check(Name("run", "bob", "s1", 1), b"c")
    with pytest.raises(Refused) as caught:
        seen.check(first, b"b")
    assert caught.value.status == Status.ABORTED
    # A later step pushes out the earliest, and no other client's.
    seen.check(Name("run", "ann", "s2", 1), b"d")
    seen.check(first, b"e")
    with pytest.raises(Refused):
        seen.check(Name("run", "bob", "s1", 1), b"e")
