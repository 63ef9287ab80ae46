"""What the tests of nodes share: owners whose keys and text are made once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.node_kit import Ward, task_identity, ward


@pytest.fixture(scope="module")
def identity() -> Iterator[None]:
    with task_identity():
        yield


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    """Keys and text, made once and copied: keys take time."""
    return ward(tmp_path_factory.mktemp("ward"))


@pytest.fixture
def here(first: Ward, tmp_path: Path) -> Ward:
    folder = tmp_path / "here"
    shutil.copytree(first.folder, folder)
    return Ward(folder, dict(first.identities))
