"""Whole runs of which only coefficients travel: bytes, bits, late and resumed clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.numpy import load_file, save

from fedtune.adapters import attach
from fedtune.client.seeded import Local, schedule_of, tune_seeded, upload
from fedtune.client.worker import Worker
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import read_tensors
from fedtune.models import load_base
from fedtune.pool.agree import key_of_seed
from fedtune.pool.chain import Chain
from fedtune.pool.codec import COEFFICIENTS, pack, unpack
from fedtune.pool.weights import PoolWeights
from fedtune.server.checkpoint import latest
from fedtune.server.run_folder import create
from fedtune.server.seeded import advance, begin, decode, shares, tensors_for
from fedtune.server.seeds_file import SEEDS, export
from fedtune.simulations.plan import plan
from fedtune.simulations.simulate import simulate
from fedtune.wire import Task, Update, size_of, to_record
from tests.simulations.apps import settings

POOL = {"tuning__method": "seedpool", "tuning__adapter": "full", "tuning__pool__size": 256,
        "tuning__pool__engine": "probes", "tuning__lr": 1e-4, "tuning__probe__count": 2,
        "evaluation__clients": 0}  # fmt: skip


def run(folder: Path, shared: Path, **changes: Any) -> Path:
    config = settings(folder, shared, **(POOL | changes))
    home = create(config)
    simulate(config, home, lambda event: None)
    return home.path


def seeds(path: Path) -> bytes:
    return (path / "adapter" / SEEDS).read_bytes()


def test_the_wire_carries_what_was_promised(tmp_path: Path, shared: Path) -> None:
    published = settings(
        tmp_path, shared, **POOL | {"tuning__method": "fedkseed", "tuning__pool__size": 4096,
                                    "tuning__probe__count": 1, "tuning__pool__engine": "auto",
                                    "tuning__batch_size": 1, "tuning__steps": 4096}
    )  # fmt: skip
    made = plan(published)
    assert made["bytes_down_per_client"] + made["bytes_up_per_client"] < 18_000
    ours = settings(tmp_path, shared, **POOL | {"tuning__steps": 128})
    dense = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    parts = upload(Local(dense, None), 8, np.random.default_rng(1), history=False)  # type: ignore[arg-type]
    asked = Message(to_record(Task(1, 0, 0, 1e-4, {})), 1, "train", group_id="1.0")
    asked.metadata.__dict__["_message_id"] = "1"
    answer = Message(to_record(Update(1, 0, 100, 10, 0, 1.0, parts)), reply_to=asked)
    record = answer.content.config_records["fields"].deflate()
    assert len(record) < 600
    # Flower's own envelope: a message and a dictionary, with two hashes each.
    assert size_of(answer) < len(record) + 300
    assert plan(ours)["bytes_up_per_client"] > len(record)


def test_fifty_rounds_late_and_resumed_end_alike(tmp_path: Path, shared: Path) -> None:
    """Clients check the server's hash in every round: a run that ends had equal weights."""
    changes: dict[str, Any] = {"federation__rounds": 50, "federation__cohort": 2,
                               "tuning__pool__refresh": 6, "tuning__steps": 1,
                               "data__max_length": 16}  # fmt: skip
    whole = run(tmp_path / "whole", shared, **changes)
    rows = [json.loads(line) for line in (whole / "clients.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in rows} == {"ok"}
    first = {}
    for row in rows:
        first.setdefault(row["client"], row["round"])
    assert max(first.values()) > 1

    class StoppedError(RuntimeError):
        pass

    def stop(event: Any) -> None:
        if getattr(event, "round", 0) == 31 and hasattr(event, "row"):
            raise StoppedError

    config = settings(tmp_path / "cut", shared, **POOL | changes)
    home = create(config)
    with pytest.raises(StoppedError):
        simulate(config, home, stop)
    simulate(config, home, lambda event: None)
    assert seeds(home.path) == seeds(whole)
    after = [json.loads(line) for line in (home.path / "clients.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in after} == {"ok"}


def test_processes_give_the_same_bits(tmp_path: Path, shared: Path) -> None:
    changes = {"tuning__pool__refresh": 1, "federation__rounds": 3}
    threads = run(tmp_path / "threads", shared, **changes)
    processes = run(
        tmp_path / "processes", shared, engine__executor="processes", engine__workers=2, **changes
    )
    assert seeds(threads) == seeds(processes)


@pytest.mark.parametrize("method", ["fedkseed", "fedkseed-pro"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_as_published(tmp_path: Path, shared: Path, method: str, adapter: str) -> None:
    path = run(
        tmp_path, shared, tuning__method=method, tuning__adapter=adapter, tuning__batch_size=1,
        tuning__probe__count=1, tuning__pool__engine="auto", tuning__pool__size=64,
    )  # fmt: skip
    found = load_file(path / "adapter" / SEEDS)
    assert found["a"].any()
    assert (path / "adapter" / "adapter_model.safetensors").is_file() == (adapter == "lora")


def test_the_key_is_agreed_where_nobody_may_choose_it(tmp_path: Path, shared: Path) -> None:
    path = run(tmp_path, shared, tuning__pool__entropy="os")
    key = load_file(path / "adapter" / SEEDS)["head"].tobytes()[:32]
    assert key != key_of_seed(7)
    for client in sorted((path / "clients").glob("0*")):
        assert load_file(client / "pool.safetensors")["key"].tobytes() == key


def test_a_checkpoint_is_a_few_kilobytes_and_export_gives_weights(
    tmp_path: Path, shared: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = run(tmp_path, shared, tuning__pool__size=1024, tuning__pool__bits=16)
    sizes = [p.stat().st_size for p in (path / "checkpoints").glob("*.safetensors")]
    assert max(sizes) < 8_000
    assert (path / "adapter" / SEEDS).stat().st_size < 3_000
    from fedtune.server.run_folder import RunFolder

    weights = export(RunFolder(path), "weights", tmp_path / "weights")
    assert weights.parameters == 260_032
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "weights")("Once").input_ids
    assert (tmp_path / "weights" / "privacy.json").is_file()
    export(RunFolder(path), "delta", tmp_path / "delta")
    delta = load_file(tmp_path / "delta" / "delta.safetensors")
    base = AutoModelForCausalLM.from_pretrained(
        shared / "models" / "stories260K", dtype=torch.float32
    )
    for name, before in base.named_parameters():
        moved = dict(model.named_parameters())[name].detach().numpy() - before.detach().numpy()
        assert np.array_equal(moved, delta[name])
    with pytest.raises(FedtuneError, match="there already"):
        export(RunFolder(path), "delta", tmp_path / "delta")


def test_a_damaged_result_is_refused(tmp_path: Path, shared: Path) -> None:
    from fedtune.server.run_folder import RunFolder

    path = run(tmp_path, shared)
    file = path / "adapter" / SEEDS
    arrays, note = read_tensors(file)
    arrays["a"][0] ^= 64
    file.write_bytes(save(arrays, note))
    with pytest.raises(FedtuneError) as caught:
        export(RunFolder(path), "weights", tmp_path / "weights")
    assert caught.value.code == ExitCode.ADAPTER_MISMATCH


@pytest.mark.parametrize("vote", ["median", "trimmed-mean", "sign"])
def test_votes_run(tmp_path: Path, shared: Path, vote: str) -> None:
    path = run(
        tmp_path, shared, federation__aggregation=vote, tuning__pool__groups=1,
        tuning__pool__directions=16, tuning__steps=16,
    )  # fmt: skip
    assert (path / "adapter" / SEEDS).is_file()


# ------------------------------------------------ one client, looked at closely


def worker(folder: Path, shared: Path, **changes: Any) -> Worker:
    return Worker(settings(folder, shared, **(POOL | changes)))


def one(made: Worker, weights: PoolWeights, **changes: Any) -> np.ndarray:
    config = made.config
    chain = Chain(key_of_seed(7), (), pack(np.zeros(256), 16))
    weights.put(chain)
    schedule = schedule_of(config.tuning, "owner-1", chain.key, 1, made.groups, None)
    encoded = made._encode(made.shard(1), held=False)
    return tune_seeded(
        weights, encoded, config.tuning, "causal-lm", schedule, unpack(chain.running),
        lr=1e-4, seed=5, pad_id=made.base.pad_id,
    ).coefficients  # fmt: skip


def test_what_a_client_uploads_is_where_it_went(tmp_path: Path, shared: Path) -> None:
    """LOZO's bug: the update must go along the directions that were probed."""
    for engine in ("probes", "projected"):
        made = worker(tmp_path / engine, shared, tuning__pool__engine=engine)
        weights = made._weights()
        moved = one(made, weights)
        walked = weights.arena.flat.clone()
        weights.pool.rebuild(weights.base, weights.arena.flat, torch.from_numpy(moved))
        far = (walked - weights.base).norm()
        assert far > 0
        assert (walked - weights.arena.flat).norm() < 1e-3 * far


def test_the_server_takes_the_mean_and_not_the_sum(tmp_path: Path, shared: Path) -> None:
    """FATE-LLM's bug: the sum made the learning rate grow with the number of clients."""
    from fedtune.server.aggregate import Cohort

    cohort = Cohort({COEFFICIENTS: np.zeros(4, np.float32)}, ())
    for weight in (1.0, 3.0):
        cohort.add(weight, {COEFFICIENTS: np.full(4, 2.0, np.float32)})
    assert cohort.mean()[COEFFICIENTS].tolist() == [2.0] * 4


def test_projection_is_the_gradient_along_each_direction(tmp_path: Path, shared: Path) -> None:
    made = worker(
        tmp_path, shared, tuning__pool__engine="projected", tuning__optimizer="sgd",
        tuning__steps=1, tuning__lr=1e-3,
    )  # fmt: skip
    weights = made._weights()
    moved = one(made, weights)
    weights.put(Chain(key_of_seed(7), (), pack(np.zeros(256), 16)))
    from fedtune.client.backprop import groups, units_of
    from fedtune.measure import forward_loss

    encoded = made._encode(made.shard(1), held=False)
    tuning = made.config.tuning
    (batch,) = next(iter(groups(encoded, tuning, "causal-lm", 1, 5, made.base.pad_id)))
    loss = forward_loss(weights.model, batch, "causal-lm")[0].sum() / units_of(batch, "causal-lm")
    loss.backward()  # type: ignore[no-untyped-call]
    whole = torch.zeros_like(weights.arena.flat)
    named = dict(weights.model.named_parameters())
    for span in weights.arena.layout.spans:
        grad = named[span.name].grad
        assert grad is not None
        whole[span.start : span.stop] = grad.reshape(-1)
    for k in (0, 17, 255):
        slope = float(weights.pool.direction(k, len(whole)) @ whole)
        assert moved[k] == pytest.approx(-1e-4 * slope / 256, rel=1e-3, abs=1e-7)


def test_both_engines_upload_the_same_kind_of_thing(tmp_path: Path, shared: Path) -> None:
    shapes = []
    for engine in ("probes", "projected"):
        made = worker(
            tmp_path / engine, shared, tuning__pool__engine=engine, tuning__steps=32,
            tuning__pool__size=32,
        )  # fmt: skip
        state = begin(made.config, made.fingerprint, key_of_seed(7))
        given = tensors_for(made.config, made._weights(), state, [0])[0]
        update = made.train(1, Task(1, 0, 0, 1e-4, given))
        shapes.append({name: (part.dtype, part.shape) for name, part in update.tensors.items()})
    assert shapes[0] == shapes[1]


def test_pro_draws_what_moved_more() -> None:
    sizes = np.array([1.0, 100.0, 0.0], np.float32)
    odds = shares({"sizes": sizes, "draws": np.array([1.0, 10.0, 0.0], np.float32)})
    assert odds[1] / odds[0] == pytest.approx(np.e, rel=1e-6)
    assert odds.sum() == pytest.approx(1.0)
    assert shares({"sizes": sizes * 0, "draws": sizes * 0}).tolist() == pytest.approx([1 / 3] * 3)


def test_uploads_are_not_believed(tmp_path: Path, shared: Path) -> None:
    config = settings(tmp_path, shared, **POOL)
    good = upload(
        Local(np.ones(256, np.float32), None), 16, np.random.default_rng(0), history=False
    )  # type: ignore[arg-type]
    update = Update(1, 0, 1, 1, 0, 1.0, good)
    assert decode(update, config).tensors[COEFFICIENTS].shape == (256,)
    for change in ({"a": good["a"][:5]}, {"sizes": good["a"]}, {"scale": np.ones(2, np.float32)}):
        with pytest.raises(FedtuneError):
            decode(Update(1, 0, 1, 1, 0, 1.0, good | change), config)


def test_rounding_does_not_add_up(tmp_path: Path, shared: Path) -> None:
    config = settings(tmp_path, shared, **POOL)
    state = begin(config, "f", key_of_seed(7))
    from dataclasses import replace

    step = np.full(256, 1e-6, np.float32)
    step[0] = 1.0
    total = np.zeros(256)
    for number in range(1, 101):
        moved = {COEFFICIENTS: state.adapter[COEFFICIENTS] + step}
        state = advance(config, state, replace(state, round=number, adapter=moved))
        total += step
    assert state.chain is not None
    sent = unpack(state.chain.running)
    assert np.abs(sent - total).max() < 100 / 32767


def test_checkpoint_and_resume_keep_the_chain(tmp_path: Path, shared: Path) -> None:
    path = run(tmp_path, shared, tuning__pool__refresh=1, federation__rounds=3)
    from fedtune.server.run_folder import RunFolder

    folder = RunFolder(path)
    made = worker(tmp_path / "w", shared)
    state = latest(folder, made.fingerprint)
    assert state is not None
    assert state.chain is not None
    assert (state.round, state.chain.epoch) == (3, 3)
    assert state.chain.key == key_of_seed(7)


def test_the_pool_moves_only_what_trains(tmp_path: Path, shared: Path) -> None:
    config = settings(tmp_path, shared, **POOL | {"tuning__adapter": "lora"})
    base = load_base(config.model, (), config.seed)
    model = attach(base, config.tuning, "causal-lm", config.seed)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    weights = PoolWeights(model, config.tuning)
    weights.put(Chain(key_of_seed(1), (), pack(np.ones(256), 16)))
    for name, value in model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name])
