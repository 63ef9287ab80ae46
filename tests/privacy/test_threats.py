"""The page on threats lists every id, and the tests it names are there."""

import re
from pathlib import Path

import pytest

from fedtune.privacy.replay_checks import CHECKS

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "threats.md").read_text(encoding="utf-8")
ROWS = {
    int(number): (how, re.findall(r"`([\w/]+\.py)`", files))
    for number, how, files in re.findall(
        r"^\| V(\d+) \| [^|]+ \| ([^|]+) \|([^|]*)\|$", PAGE, flags=re.MULTILINE
    )
}


def test_every_threat_has_a_row() -> None:
    assert sorted(ROWS) == list(range(1, 42))


@pytest.mark.parametrize("number", sorted(ROWS))
def test_a_threat_has_tests_by_its_name_or_a_reason(number: int) -> None:
    how, files = ROWS[number]
    assert files or "does not apply yet: " in how
    for name in files:
        text = (TESTS / name).read_text(encoding="utf-8")
        assert re.search(rf"^def test_(v\d\d_)*v{number:02}_", text, flags=re.MULTILINE), name


def test_every_check_of_replay_is_explained() -> None:
    section = PAGE.split("## Record and replay")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", section, flags=re.MULTILINE)) == set(CHECKS)


def test_every_claim_about_trust_names_tests_that_are_there() -> None:
    section = PAGE.split("## Who is trusted for what")[1].split("\n## ")[0]
    row = r"^\| (?!who |---)[^|]+\|[^|]+\|[^|]+\|([^|]*)\|$"
    rows = re.findall(row, section, flags=re.MULTILINE)
    assert len(rows) > 8
    assert all("`" in tests for tests in rows)
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", section)
    assert len(named) > 20
    for file, test in named:
        text = (TESTS / file).read_text(encoding="utf-8")
        assert not test or re.search(rf"^def {test}\(", text, flags=re.MULTILINE), (file, test)
