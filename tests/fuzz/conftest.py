"""Every fuzzing test has an identity of Flower's for its messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.node_kit import task_identity


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with task_identity():
        yield
