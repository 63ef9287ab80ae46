"""The experiment: one TOML file as frozen, validated values.

Every table of the file is one class here; ``fedtune init`` writes a file with
all of them. Unknown keys are errors (see ``configfile`` for reading, overrides
and "did you mean").
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedtune.config_privacy import (
    ClientPrivacyConfig,
    ExamplePrivacyConfig,
    PrivacyConfig,
    RldpConfig,
)
from fedtune.config_server import SecureConfig, ServerConfig
from fedtune.config_tuning import PoolConfig, ProbeConfig, SplitConfig, TuningConfig
from fedtune.files import same_text
from fedtune.prompt import TEMPLATE, split_template

__all__ = [
    "SCHEMA",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FederationConfig",
    "ModelConfig",
    "OutputConfig",
    "PartitionConfig",
    "PoolConfig",
    "PrivacyConfig",
    "ProbeConfig",
    "SecureConfig",
    "ServerConfig",
    "ServerOptimizerConfig",
    "SplitConfig",
    "TuningConfig",
]

SCHEMA = 1
"""Version of the file format this release reads and writes."""

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

_FLAT = ("flat", "automatic", "quantile")

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ModelConfig(BaseModel):
    """Which model is tuned."""

    model_config = _STRICT

    base: str = "fedtune:tiny"
    """``fedtune:tiny``, ``fedtune:minilm``, a local folder, or a hub id."""
    task: Literal["causal-lm", "classification"] = "causal-lm"
    pooling: Literal["auto", "mean", "prompt"] = "auto"
    """Classification only. ``auto``: the architecture's own head, which is new on most bases.
    ``mean``: mean pooling and a linear head. ``prompt``: nothing new, a causal language model is
    asked for a word after ``data.template``; methods without gradients rely on it, so with those
    and a causal base ``auto`` becomes ``prompt`` when the file is read."""
    words: tuple[str, ...] = ()
    """``prompt``: the answer for each of ``data.labels``, in their order, such as
    ``["terrible", "great"]``. Empty: the labels themselves."""
    revision: str = ""
    """Hub models only: the commit, tag or branch to load."""
    device: str = "cpu"
    """``cpu``, ``cuda``, ``cuda:1``, ..."""


class PartitionConfig(BaseModel):
    """How rows become clients."""

    model_config = _STRICT

    by: Literal["column", "iid", "dirichlet", "size", "owner"] = "column"
    column: str = "client"
    """``column``: the column whose value names the client. ``owner``, which ``fedtune join``
    sets: all rows are one client's, of this name."""
    clients: int = Field(default=0, ge=0)
    """How many. With ``column``: at most so many, largest first; 0 is all of them."""
    alpha: float = Field(default=0.5, gt=0.0, le=1e6)
    """``dirichlet``: concentration over labels, smaller is more skewed."""
    skew: Literal["linear", "square", "exponential"] = "square"
    """``size``: how client sizes grow."""
    min_rows: Positive = 2
    """Clients with fewer rows are left out, and reported."""
    pooled: bool = False
    """Put all clients' rows into one client: the central reference, on the same split."""

    @model_validator(mode="after")
    def _needs_clients(self) -> PartitionConfig:
        if self.by not in ("column", "owner") and self.clients == 0:
            raise ValueError(f"by='{self.by}' needs clients=N with N of at least 1")
        return self


class DataConfig(BaseModel):
    """Where the text is and how a row becomes an example."""

    model_config = _STRICT

    source: str = "fedtune:stdlib"
    """``fedtune:stdlib``, a file, a folder of a saved data set, or ``hub:NAME[:CONFIG]``."""
    format: Literal["auto", "jsonl", "csv", "parquet", "text", "datasets"] = "auto"
    split: str = "train"
    """Data sets only: which split."""
    kind: Literal["text", "instruction", "classification"] = "text"
    text: str = "text"
    """``text`` and ``classification``: the column that holds the text."""
    prompt: str = ""
    """``instruction``: template such as ``"Question: {question}\\nAnswer:"``."""
    completion: str = ""
    """``instruction``: template such as ``" {answer}"``; the loss is on this part only."""
    label: str = "label"
    """``classification``: the column that holds the label."""
    labels: tuple[str, ...] = ()
    """``classification``: the label set, in class order. Empty: found in the data, sorted."""
    template: str = ""
    """``classification``: what stands around the text, such as ``"{text}\\nIt was"``. Empty: the
    text as it is; with ``model.pooling='prompt'`` it is ``"{text}\\nAnswer:"``. It is never cut."""
    separator: str = "\n"
    """Plain text only: what stands between two rows; empty: the whole file is one row."""
    pattern: str = ""
    """Plain text only: a regular expression whose named groups become columns."""
    encoding: str = "utf-8"
    eval: str = ""
    """A held-out file for the whole federation, read like ``source``. Empty: none."""
    holdout: Fraction = 0.1
    """Share of each client's rows kept for evaluation."""
    max_length: int = Field(default=128, ge=8)
    """Tokens per example; longer rows are cut (``text`` with ``pack``: wrapped)."""
    pack: bool = True
    """``text`` only: join a client's rows into full blocks of ``max_length`` tokens."""
    max_rows: int = Field(default=0, ge=0)
    """At most so many rows per client; 0 is all of them."""
    partition: PartitionConfig = PartitionConfig()

    @model_validator(mode="after")
    def _templates(self) -> DataConfig:
        if self.kind == "instruction" and not (self.prompt and self.completion):
            raise ValueError("kind='instruction' needs both prompt and completion templates")
        if self.kind != "instruction" and (self.prompt or self.completion):
            raise ValueError(
                f"prompt and completion belong to kind='instruction', not '{self.kind}'"
            )
        if self.template:
            if self.kind != "classification":
                raise ValueError(f"template belongs to kind='classification', not '{self.kind}'")
            split_template(self.template)
        return self


class ServerOptimizerConfig(BaseModel):
    """What the server does with the mean update (Reddi et al. 2021, Algorithm 2)."""

    model_config = _STRICT

    name: Literal["none", "momentum", "adam"] = "none"
    lr: float = Field(default=1.0, gt=0.0)
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)
    tau: float = Field(default=1e-3, gt=0.0)


class FederationConfig(BaseModel):
    """Rounds, cohorts, and what counts as a round."""

    model_config = _STRICT

    rounds: Positive = 10
    cohort: float = Field(default=1.0, gt=0.0)
    """Up to 1: share of the clients each round. Above 1: how many."""
    quorum: Fraction = 0.5
    """Share of the cohort that must answer well for the round to count."""
    deadline: float = Field(default=3600.0, gt=0.0)
    """Seconds the server waits for a round."""
    retries: int = Field(default=2, ge=0)
    """How often a round below quorum is tried again with a new cohort."""
    weighting: Literal["examples", "uniform"] = "examples"
    aggregation: Literal["mean", "fedex", "sign", "median", "trimmed-mean"] = "mean"
    """``mean``: factors averaged, error logged. ``fedex``: exact, with a residual. The
    others vote on each coefficient of a seed pool, and a few bad clients cannot steer them."""
    residual_rank: int = Field(default=0, ge=0)
    """``fedex``: largest rank of the residual kept; 0 is no limit (always exact)."""
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()
    secure: SecureConfig | None = None
    """Secure aggregation. No table: the server sees every update."""
    server: ServerConfig = ServerConfig()


class EvaluationConfig(BaseModel):
    """When and on whom the tuned model is measured."""

    model_config = _STRICT

    every: Positive = 1
    """Rounds between evaluations; the first and the last round always count."""
    clients: int = Field(default=-1, ge=-1)
    """Clients that evaluate on their held-out rows; -1 is all, 0 is none."""
    max_examples: int = Field(default=0, ge=0)
    """At most so many held-out examples each; 0 is all."""
    batch_size: Positive = 32


class EngineConfig(BaseModel):
    """How a simulated federation runs. Changes speed, never results."""

    model_config = _STRICT

    kind: Literal["local", "ray"] = "local"
    executor: Literal["processes", "threads"] = "processes"
    workers: int = Field(default=0, ge=0)
    """0: one per core."""
    threads: Positive = 1
    """Threads of torch in each worker; bits may differ between values."""
    body: str = Field(default="local", pattern=r"^(local|process|.+:\d+)$")
    """Split tuning: who runs the body. ``local``: every worker its own; ``process``: one body
    server of this machine, over gRPC; or the ``HOST:PORT`` of one that runs: ``fedtune body``."""
    body_root: str = ""
    """Certificate (PEM) that the body server's must come from; empty: no TLS, loopback only."""
    body_key: str = ""
    """Private key of this node (OpenSSH, ECDSA P-384) that the body server has enrolled."""


class OutputConfig(BaseModel):
    """What a run leaves behind."""

    model_config = _STRICT

    folder: str = "runs"
    checkpoint_every: Positive = 1
    keep_checkpoints: Positive = 2
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()


class Config(BaseModel):
    """One experiment. The same file runs in simulation and for real."""

    model_config = _STRICT

    schema_version: int = Field(default=SCHEMA, alias="schema", ge=1)
    name: str = Field(default="fedtune", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tuning: TuningConfig = TuningConfig()
    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        wants = "classification" if self.data.kind == "classification" else "causal-lm"
        if self.model.task != wants:
            raise ValueError(
                f"data.kind='{self.data.kind}' needs model.task='{wants}', not '{self.model.task}'"
            )
        if self.model.pooling == "prompt":
            _require_words(self)
            if not self.data.template:
                data = self.data.model_copy(update={"template": TEMPLATE})
                object.__setattr__(self, "data", data)  # frozen for all others
        elif self.model.words:
            raise ValueError("model.words needs model.pooling='prompt'")
        if self.federation.aggregation == "fedex":
            plain = self.federation.server_optimizer
            if self.tuning.adapter != "lora" or plain.name != "none" or plain.lr != 1.0:
                raise ValueError(
                    "federation.aggregation='fedex' is exact for tuning.adapter='lora' with no "
                    "server optimizer; other adapters average exactly or not at all"
                )
        votes = self.federation.aggregation not in ("mean", "fedex")
        shared = self.tuning.method == "seedpool" and self.tuning.pool.groups == 1
        if votes and not shared:
            raise ValueError(
                f"federation.aggregation='{self.federation.aggregation}' votes on coefficients: it "
                "needs one schedule for all, tuning.method='seedpool' with tuning.pool.groups=1; "
                "where clients probe different directions nobody has a majority"
            )
        if self.privacy.on:
            _require_private(self)
        _require_secure(self)
        return self


def _require_words(config: Config) -> None:
    """Refuse words that cannot be told to which labels they belong."""
    model, labels = config.model, config.data.labels
    if model.task != "classification":
        raise ValueError(f"model.pooling='prompt' needs data.kind='classification', not "
                         f"'{config.data.kind}'")  # fmt: skip
    if model.words and len(model.words) != len(labels):
        raise ValueError(
            f"model.words={list(model.words)} must be one word for each of "
            f"data.labels={list(labels)}, in their order"
        )
    if not all(word.strip() for word in model.words):
        raise ValueError(f"model.words={list(model.words)}: a word has at least one letter")


def _coefficients(config: Config, promise: ExamplePrivacyConfig) -> list[tuple[bool, str]]:
    """Return what holds for coefficients of single examples: they are released in plain steps."""
    tuning = config.tuning
    probe, pool = tuning.probe, tuning.pool
    laplace = promise.noise == "laplace"
    one = tuning.method == "mezo" or (tuning.seeded and pool.engine == "probes")
    rules = [
        (not laplace or one,
         "privacy.example.noise='gaussian' but with mezo, or a seed method with "
         "tuning.pool.engine='probes'"),
        (not laplace or probe.count == 1,
         "tuning.probe.count=1 with privacy.example.noise='laplace': it is for one number"),
    ]  # fmt: skip
    if tuning.by_gradient:
        return rules
    rules += [
        (probe.step == "plain",
         "tuning.probe.step='plain': the losses of examples have no budget of their own"),
        (probe.objective != "f1", "another tuning.probe.objective: one example has no F1"),
        (promise.clip in ("flat", "quantile"),
         f"privacy.example.clip='flat' or 'quantile' with tuning.method='{tuning.method}': "
         f"'{promise.clip}' is for gradients of examples"),
        (not tuning.weight_decay and not tuning.momentum,
         "tuning.weight_decay=0 and tuning.momentum=0: steps are plain"),
    ]  # fmt: skip
    if tuning.method == "seedpool" and pool.engine != "probes":
        rules += [
            (pool.engine != "auto",
             "tuning.pool.engine by name: which one runs is part of what is promised"),
            (tuning.optimizer == "sgd",
             "tuning.optimizer='sgd' unless tuning.pool.engine='probes': steps are plain"),
            (probe.objective == "loss",
             "tuning.probe.objective='loss' unless tuning.pool.engine='probes'"),
        ]  # fmt: skip
    return rules


def _policy(config: Config, promise: ExamplePrivacyConfig) -> list[tuple[bool, str]]:
    """Return what holds for a clipping policy that learns."""
    tuning, federation = config.tuning, config.federation
    rldp = promise.rldp or RldpConfig()
    batch = tuning.batch_size * tuning.accumulate
    releases = tuning.steps or math.ceil(tuning.epochs * promise.population / batch)
    rules = [
        (rldp.noise != "order" or releases >= 3,
         f"3 steps or more in a round with privacy.example.rldp.noise='order': with {releases} "
         "there is nothing to order"),
        (rldp.reward != "public" or not tuning.cut,
         "privacy.example.rldp.reward='loss' or 'held-out' with a cut model: a client has not "
         "the body that public text would be measured with"),
        (not rldp.public or not same_text(rldp.public, config.data.source),
         "an rldp.public that is not data.source: it is taken to be public"),
    ]  # fmt: skip
    if promise.clip != "rldp" or rldp.mode != "federated":
        return rules
    return [
        *rules,
        (federation.secure is None,
         "privacy.example.rldp.mode='online' or 'meta' with [federation.secure]: to learn a "
         "policy for all, the server must see what each client's releases became"),
        (config.privacy.client is None,
         "privacy.example.rldp.mode='online' or 'meta' with [privacy.client]: what the policy "
         "learns from is covered by the promise about examples alone"),
    ]  # fmt: skip


def _across(tuning: TuningConfig) -> list[tuple[bool, str]]:
    """Return what holds for single examples of a cut model, of what is released in the end."""
    split = tuning.split
    if not tuning.cut:
        return []
    return [
        (split.local_epochs == 0,
         "tuning.split.local_epochs=0: its steps look at examples, and no budget covers them"),
        (split.keep == 1,
         "tuning.split.keep=1: the best of all by score are others when one example more is "
         "there; a public tuning.split.threshold looks at each alone"),
    ]  # fmt: skip


def _require_private(config: Config) -> None:
    """Refuse what would release more than the mechanism accounts for."""
    federation, data = config.federation, config.data
    wanted: list[tuple[bool, str]] = [
        (federation.weighting == "uniform",
         "federation.weighting='uniform': weights by the number of examples are private and "
         "undo the noise"),
        (config.evaluation.clients == 0,
         "evaluation.clients=0: scores on private rows are releases; measure on a public file "
         "(data.eval)"),
        (not data.eval or not same_text(data.eval, data.source),
         "a data.eval that is not data.source: it is taken to be public"),
        (data.kind != "classification" or bool(data.labels),
         "data.labels: a label set found in the data is a release"),
    ]  # fmt: skip
    if config.privacy.example is not None:
        batch = config.tuning.batch_size * config.tuning.accumulate
        population = config.privacy.example.population
        wanted += [
            (data.kind != "text" or not data.pack,
             "data.pack=false: in packed blocks one row moves all that follow"),
            (data.holdout == 0,
             "data.holdout=0: which rows are held out depends on their number"),
            (config.tuning.dropout == 0,
             "tuning.dropout=0: its masks are dealt out by place in the batch, so one example "
             "more changes everybody's"),
            (data.max_rows == 0,
             "data.max_rows=0: a row that goes would bring in another"),
            (batch <= population,
             f"privacy.example.population of at least the batch, {batch}"),
        ]  # fmt: skip
        wanted += _coefficients(config, config.privacy.example)
        wanted += _across(config.tuning)
        wanted += _policy(config, config.privacy.example)
        if config.privacy.example.sampler == "everyone":
            wanted.append(
                (batch == population,
                 "tuning.batch_size * tuning.accumulate = privacy.example.population with "
                 "sampler='everyone'")
            )  # fmt: skip
    if config.privacy.client is not None:
        keyed = config.tuning.seeded and config.tuning.pool.entropy == "os"
        special = config.privacy.client.relation == "replace-special"
        wanted += [
            (not keyed or special,
             "tuning.pool.entropy='seed', or privacy.client.relation='replace-special': agreeing "
             "on a key tells every client how many there are"),
            (federation.aggregation == "mean",
             "federation.aggregation='mean': the residual of 'fedex' has no noise"),
            (not config.tuning.seeded or config.privacy.client.clip in _FLAT,
             f"privacy.client.clip of {', '.join(map(repr, _FLAT))} with a seed pool: its "
             f"coefficients are one block, and '{config.privacy.client.clip}' is for several"),
            (federation.cohort <= config.privacy.client.population,
             "federation.cohort of at most privacy.client.population"),
            (config.privacy.client.sampler != "everyone" or federation.cohort == 1.0,
             "federation.cohort=1.0 with privacy.client.sampler='everyone'"),
        ]  # fmt: skip
    if broken := [rule for holds, rule in wanted if not holds]:
        raise ValueError("privacy needs " + "; and ".join(broken))


def _cohorts(federation: FederationConfig, client: ClientPrivacyConfig) -> range:
    """Return the sizes of cohort from which a sum may come out, up to the nominal population."""
    secure = federation.secure
    least = secure.least(client.population) if secure else 1
    return range(max(least, secure.min_cohort if secure else 1), client.population + 1)


def _require_secure(config: Config) -> None:
    """Refuse what a sum of whole numbers, of which nobody sees the parts, cannot do."""
    federation, client = config.federation, config.privacy.client
    if federation.secure is None:
        if client is not None and client.noise_at == "clients":
            raise ValueError(
                "privacy.client.noise_at='clients' needs [federation.secure]: a single client's "
                "share of the noise hides nothing from a server that sees single updates"
            )
        return
    tuning = config.tuning
    wanted: list[tuple[bool, str]] = [
        (federation.aggregation == "mean",
         "federation.aggregation='mean': the others need single updates"),
        (federation.weighting == "uniform",
         "federation.weighting='uniform': nobody may know a client's weight"),
        (tuning.method != "fedkseed-pro",
         "another method than 'fedkseed-pro': its history is told by each client"),
        (not tuning.seeded or tuning.pool.groups == 1,
         "tuning.pool.groups=1: whether coefficients stay in their group cannot be seen"),
        (client is None or client.noise_at == "clients",
         "privacy.client.noise_at='clients': with noise at the server its sum would be bare"),
        (client is None or federation.secure.honest(client.population) >= 1,
         "federation.secure.colluding below the survivors of privacy.client.population"),
        (client is None or all(map(federation.secure.tolerates, _cohorts(federation, client))),
         "federation.secure.threshold above that, or colluding below it: a server that cheats with "
         "so many clients could open a single update (1.0 for three clients)"),
        ((client is not None) != (federation.secure.clip_norm > 0),
         "federation.secure.clip_norm above 0 without [privacy.client], and 0 with it: it has one"),
    ]  # fmt: skip
    if broken := [rule for holds, rule in wanted if not holds]:
        raise ValueError("secure aggregation needs " + "; and ".join(broken))
