"""What the tests of the status page share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fedtune.server.status_page import Status


@pytest.fixture
def serve() -> Iterator[Callable[..., Status]]:
    """Start pages that are closed afterwards."""
    from fedtune.server.status_page import start_status

    started: list[Status] = []

    def start(source: Any, *rest: Any, **named: Any) -> Status:
        look = source if callable(source) else lambda: source
        started.append(start_status(look, *rest, **named))
        return started[-1]

    yield start
    for one in started:
        one.close()
