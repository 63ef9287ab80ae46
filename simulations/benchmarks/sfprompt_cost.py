"""What one client's round costs it, measured in a process of its own: arithmetic and memory.

The body runs elsewhere, so that nothing of it is counted here.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["client_cost"]


def client_cost(config_file: Path, address: str) -> dict[str, float]:
    """Return ``flops`` of a client's first round, and ``memory_mb`` above bare libraries.

    Parameters
    ----------
    config_file : Path
        The experiment.
    address : str
        Where the body is; empty for a whole model.
    """
    found: dict[str, float] = {}
    for what in ("flops", "memory"):
        command = [sys.executable, "-m", __name__, what, str(config_file), address]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def _main(what: str, file: str, address: str) -> dict[str, Any]:
    import peft  # noqa: F401 - libraries are in memory before it is measured
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel, AutoModelForCausalLM  # noqa: F401

    from fedtune.adapters import read
    from fedtune.client.worker import Worker
    from fedtune.configfile import load
    from fedtune.models import settings_of
    from fedtune.wire import Task

    config = load(Path(file), [f"engine.body='{address}'"] if address else [])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worker = Worker(config)
    task = Task(1, 0, 0, config.tuning.lr, read(worker._first))
    if what == "flops":
        # The fused forms of attention are not counted.
        settings_of(worker.base.model)._attn_implementation = "eager"
        settings_of(worker._first)._attn_implementation = "eager"
        with FlopCounterMode(display=False) as counter:
            worker.train(0, task)
        return {"flops": float(counter.get_total_flops())}
    worker.train(0, task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_mb": round((peak - before) / 1024, 1)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(*sys.argv[1:])) + "\n")
