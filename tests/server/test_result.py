from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.checkpoint import State
from fedtune.server.result import save_result, verify_adapter
from tests.server.test_rounds import Bench, bench

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {},
    "fedex": {"federation": {"aggregation": "fedex"}},
    "fedex-cut": {"federation": {"aggregation": "fedex", "residual_rank": 3}},
    "fedex-rslora": {
        "federation": {"aggregation": "fedex"},
        "tuning": {"options": {"use_rslora": True}},
    },
    "prompt": {"tuning": {"adapter": "prompt"}},
    "ia3": {"tuning": {"adapter": "ia3"}},
}


def finished(shared: Path, root: Path, case: str) -> tuple[Bench, State]:
    made = bench(shared, root, **CASES[case])
    return made, made.run()


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_loads_what_a_run_leaves(shared: Path, tmp_path: Path, case: str) -> None:
    made, state = finished(shared, tmp_path, case)
    assert save_result(made.tuned, state, made.folder, clients=3) < 2e-3
    adapter = made.folder.adapter
    assert not (made.folder.path / ".adapter").exists()
    plain = AutoModelForCausalLM.from_pretrained(made.config.model.base)
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.inference_mode():
        untuned = plain(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(plain, str(adapter)).eval()
        theirs = loaded(input_ids=ids).logits[:, -10:]
        ours = made.tuned.put(state)(input_ids=ids).logits[:, -10:]
    torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(ours, untuned, atol=1e-3)
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == made.config.model.base
    if case.startswith("fedex"):
        assert len(saved["rank_pattern"]) == len(made.tuned.pairs)
        assert set(saved["rank_pattern"].values()) <= set(range(3, 65))
        assert saved["alpha_pattern"] == saved["rank_pattern"]
    card = (adapter / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {made.config.model.base}\n")
    assert "without differential privacy" in card
    assert "epsilon" not in card
    assert "over 3 clients in 2 rounds" in card
    body = card.replace("**None is claimed.**", "")
    assert not {"None", "nan", "{{", "{%"} & set(body.replace("|", " ").split())
    assert "None" not in body
    assert json.loads((adapter / "privacy.json").read_text())["differential_privacy"] is False


@pytest.mark.parametrize("case", ["lora", "prompt"])
def test_a_changed_adapter_file_is_caught(shared: Path, tmp_path: Path, case: str) -> None:
    made, state = finished(shared, tmp_path, case)
    save_result(made.tuned, state, made.folder, clients=3)
    assert verify_adapter(made.tuned, state, made.folder.adapter) < 2e-3
    file = made.folder.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(n for n in tensors if "lora_A" not in n)
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FedtuneError, match="does not behave like the run") as caught:
        verify_adapter(made.tuned, state, made.folder.adapter)
    assert caught.value.code == ExitCode.ADAPTER_MISMATCH


def test_the_snippet_of_the_card_runs(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, state = finished(shared, tmp_path, "fedex")
    save_result(made.tuned, state, made.folder, clients=3)
    card = (made.folder.adapter / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(made.folder.path)
    scope: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), scope)
    assert isinstance(scope["model"], PeftModel)
