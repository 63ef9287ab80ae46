from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Config, EngineConfig, FederationConfig, TuningConfig
from fedtune.configfile import difference, dumps, load, parse
from fedtune.errors import ExitCode, FedtuneError


def refused(table: dict[str, Any]) -> str:
    with pytest.raises(FedtuneError) as caught:
        parse(table)
    assert caught.value.code == ExitCode.CONFIG
    assert caught.value.hint
    return str(caught.value)


def written(folder: Path, text: str = "") -> Path:
    path = folder / "experiment.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"nmae": "x"}, "unknown key 'nmae' (did you mean 'name'?)"),
        ({"shema": 1}, "unknown key 'shema' (did you mean 'schema'?)"),
        ({"federation": {"ronds": 3}}, "unknown key 'federation.ronds' (did you mean 'rounds'?)"),
        (
            {"data": {"partition": {"client": 3}}},
            "unknown key 'data.partition.client' (did you mean 'clients'?)",
        ),
        (
            {"federation": {"server_optimizer": {"beta": 0.5}}},
            "unknown key 'federation.server_optimizer.beta' (did you mean 'beta",
        ),
        (
            {"model": {"batch_size": 4}},
            "unknown key 'model.batch_size' (did you mean 'tuning.batch_size'?)",
        ),
        ({"rounds": 4}, "unknown key 'rounds' (did you mean 'federation.rounds'?)"),
        ({"output": {"zzz": 4}}, "unknown key 'output.zzz' (known: folder, checkpoint_every,"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(table: dict[str, Any], message: str) -> None:
    assert message in refused(table)


def test_every_problem_of_a_file_is_named_at_once() -> None:
    said = refused({"nmae": "x", "federation": {"rounds": "many"}})
    assert "'nmae'" in said
    assert "federation.rounds = 'many'" in said


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ({"federation": {"rounds": "many"}}, ("federation.rounds", "'many'", "integer")),
        ({"tuning": {"lr": -1.0}}, ("tuning.lr", "-1.0", "greater than 0")),
        ({"tuning": {"lr": float("nan")}}, ("tuning.lr", "nan", "finite")),
        ({"tuning": {"lr": float("inf")}}, ("tuning.lr", "inf", "finite")),
        ({"tuning": {"optimizer": "adam"}}, ("tuning.optimizer", "'adam'", "adamw")),
        ({"data": 3}, ("data = 3",)),
        ({"seed": -1}, ("seed = -1",)),
        ({"name": "a/b"}, ("name = 'a/b'",)),
        ({"data": {"labels": "yes"}}, ("data.labels", "'yes'")),
    ],
)
def test_a_wrong_value_is_named_with_its_key(table: dict[str, Any], parts: tuple[str, ...]) -> None:
    said = refused(table)
    assert [part for part in parts if part not in said] == []


def test_a_newer_schema_is_refused() -> None:
    said = refused({"schema": 2, "key_of_the_future": 1})
    assert said == "schema = 2 is newer than this fedtune reads (1)"
    assert parse({"schema": 1}) == Config()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"data": {"kind": "classification"}}, "needs model.task='classification'"),
        ({"model": {"task": "classification"}}, "data.kind='text' needs model.task='causal-lm'"),
        ({"data": {"kind": "instruction"}}, "needs both prompt and completion"),
        ({"data": {"kind": "instruction", "prompt": "{a}"}}, "needs both prompt and completion"),
        ({"data": {"prompt": "{a}"}}, "belong to kind='instruction', not 'text'"),
        ({"data": {"partition": {"by": "iid"}}}, "by='iid' needs clients=N"),
        (
            {"federation": {"aggregation": "fedex"}, "tuning": {"adapter": "ia3"}},
            "exact for tuning.adapter='lora'",
        ),
        (
            {"federation": {"aggregation": "fedex"}, "tuning": {"adapter": "lora-frozen-a"}},
            "exact for tuning.adapter='lora'",
        ),
        (
            {"federation": {"aggregation": "fedex", "server_optimizer": {"lr": 0.5}}},
            "no server optimizer",
        ),
        (
            {"federation": {"aggregation": "fedex", "server_optimizer": {"name": "adam"}}},
            "no server optimizer",
        ),
    ],
)
def test_settings_that_do_not_go_together(table: dict[str, Any], message: str) -> None:
    assert message in refused(table)


def test_settings_that_go_together() -> None:
    table = {
        "model": {"task": "classification"},
        "data": {"kind": "classification", "labels": ["a", "b"]},
        "federation": {"aggregation": "fedex"},
    }
    assert parse(table).data.labels == ("a", "b")
    spoken = {"data": {"kind": "instruction", "prompt": "{q}", "completion": " {a}"}}
    assert parse(spoken).data.completion == " {a}"


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("federation.rounds=5", ("federation", "rounds"), 5),
        ("federation.cohort = 0.25", ("federation", "cohort"), 0.25),
        ("data.pack=false", ("data", "pack"), False),
        ("tuning.adapter=ia3", ("tuning", "adapter"), "ia3"),
        ('tuning.adapter="ia3"', ("tuning", "adapter"), "ia3"),
        ("data.separator=", ("data", "separator"), ""),
        ('tuning.targets=["q_proj", "v_proj"]', ("tuning", "targets"), ("q_proj", "v_proj")),
        ("tuning.options={use_dora = true}", ("tuning", "options"), {"use_dora": True}),
        ("tuning.options.use_dora=true", ("tuning", "options"), {"use_dora": True}),
        ("data.partition.min_rows=4", ("data", "partition", "min_rows"), 4),
        ("data.text=a=b", ("data", "text"), "a=b"),
        ("seed=11", ("seed",), 11),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(
    tmp_path: Path, override: str, place: tuple[str, ...], value: object
) -> None:
    found: Any = load(written(tmp_path, "[federation]\nrounds = 2\n"), [override])
    for name in place:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_counts(tmp_path: Path) -> None:
    assert load(written(tmp_path), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federation.rounds", "override 'federation.rounds' is not key=value"),
        ("=5", "override '=5' is not key=value"),
        ("seed.deep=1", "'seed' is a value, not a table"),
        ("federation.ronds=5", "unknown key 'federation.ronds' (did you mean 'rounds'?)"),
        ("federation.rounds=many", "federation.rounds = 'many'"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(FedtuneError) as caught:
        load(written(tmp_path, "seed = 1\n"), [override])
    assert message in str(caught.value)
    assert caught.value.code == ExitCode.CONFIG


def test_a_missing_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=r"no experiment file '.*none\.toml'") as caught:
        load(tmp_path / "none.toml")
    assert caught.value.code == ExitCode.CONFIG
    assert "fedtune init" in caught.value.hint


@pytest.mark.parametrize("data", [b"name = fedtune\n", b"name = '\xff'\n", b"[a\n"])
def test_what_is_not_toml_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(data)
    with pytest.raises(FedtuneError, match="is not valid TOML") as caught:
        load(tmp_path / "bad.toml")
    assert caught.value.code == ExitCode.CONFIG


def test_written_settings_read_back_the_same(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "name": "round-trip",
            "seed": 2**62,
            "data": {"separator": "\n\n", "pattern": r"(?P<a>\w+)\t'\"", "labels": ["é", "b"]},
            "tuning": {"lr": 1e-7, "targets": ["a", "b"], "options": {"x": {"y": [1, 2.5]}}},
            "federation": {"cohort": 3.0, "server_optimizer": {"name": "adam", "tau": 0.1}},
            "output": {"loggers": ["mlflow"]},
        }
    )
    assert load(written(tmp_path, dumps(config))).tuning == config.tuning
    import tomllib

    assert parse(tomllib.loads(dumps(config))) == config
    assert parse(tomllib.loads(dumps(Config()))) == Config()


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model").mkdir()
    text = '[model]\nbase = "../model"\n[data]\nsource = "rows.csv"\neval = "../held.csv"\n'
    config = load(written(tmp_path / "sub", text))
    assert config.data.source == str(tmp_path / "sub" / "rows.csv")
    assert config.data.eval == str(tmp_path / "held.csv")
    assert config.model.base == str(tmp_path / "model")


def test_names_are_not_paths(tmp_path: Path) -> None:
    text = '[model]\nbase = "org/name"\n[data]\nsource = "hub:e2e_nlg"\n'
    config = load(written(tmp_path, text))
    assert (config.model.base, config.data.source) == ("org/name", "hub:e2e_nlg")
    assert config.data.eval == ""
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load(written(tmp_path, text)).model.base == str(tmp_path / "org" / "name")
    plain = load(written(tmp_path))
    assert (plain.model.base, plain.data.source) == ("fedtune:tiny", "fedtune:stdlib")


def test_a_variable_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sub = tmp_path / "sub"
    sub.mkdir()
    plain = written(sub, '[data]\nsource = "${TINY_DATA}/rows.csv"\n')
    default = written(tmp_path, '[data]\nsource = "${TINY_DATA:-data}/rows.csv"\n')
    monkeypatch.delenv("TINY_DATA", raising=False)
    with pytest.raises(FedtuneError, match="needs the environment variable TINY_DATA") as caught:
        load(plain)
    assert caught.value.code == ExitCode.CONFIG
    assert "${TINY_DATA:-folder}" in caught.value.hint
    assert load(default).data.source == str(tmp_path / "data" / "rows.csv")
    monkeypatch.setenv("TINY_DATA", str(tmp_path / "elsewhere"))
    assert load(plain).data.source == str(tmp_path / "elsewhere" / "rows.csv")
    assert load(default).data.source == str(tmp_path / "elsewhere" / "rows.csv")
    # A relative value was typed in a shell, so it starts where the shell is.
    monkeypatch.setenv("TINY_DATA", "here")
    monkeypatch.chdir(sub)
    assert load(default).data.source == str(sub / "here" / "rows.csv")


def test_difference_names_every_setting_that_changed() -> None:
    old = Config(tuning=TuningConfig(options={"a": 1}))
    new = Config(
        seed=3,
        tuning=TuningConfig(lr=0.5, options={"a": 2}),
        federation=FederationConfig(rounds=3),
        engine=EngineConfig(workers=2),
    )
    assert difference(old, new) == (
        "engine.workers: 0 -> 2",
        "federation.rounds: 10 -> 3",
        "seed: 0 -> 3",
        "tuning.lr: 0.001 -> 0.5",
        "tuning.options.a: 1 -> 2",
    )
    assert difference(old, old) == ()
