"""docs/rldp.md names every policy and every setting, and the experiment it speaks of is valid."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedtune.config_privacy import RldpConfig
from fedtune.configfile import load
from fedtune.privacy.report_fields import _CLIP
from fedtune.privacy.rldp.named import POLICIES

ROOT = Path(__file__).resolve().parents[2]


def _names(heading: str) -> list[str]:
    page = (ROOT / "docs" / "rldp.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w-]+)` \|", section, flags=re.MULTILINE)


def test_every_policy_has_a_row_and_no_other() -> None:
    assert _names("Policies") == list(POLICIES)


def test_every_setting_has_a_row_with_its_default_and_no_other() -> None:
    page = (ROOT / "docs" / "rldp.md").read_text(encoding="utf-8")
    assert _names("Settings") == list(RldpConfig.model_fields)
    for name, field in RldpConfig.model_fields.items():
        default = re.search(rf"^\| `{name}` \| `([^`]+)` \|", page, flags=re.MULTILINE)
        assert default is not None
        assert json.loads(default.group(1)) == field.default, name


def test_a_report_has_words_for_every_policy() -> None:
    assert set(_CLIP) == set(POLICIES)


def test_the_experiment_is_valid(shared: Path) -> None:
    assert shared.is_dir()
    config = load(ROOT / "simulations" / "experiments" / "rldp_private.toml")
    assert config.privacy.example is not None
    assert config.privacy.example.clip == "rldp"
