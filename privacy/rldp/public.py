"""What a policy is rewarded by where there is public text: the loss on it, measured."""

from __future__ import annotations

import math

from torch import nn

from fedtune.config import Config
from fedtune.config_privacy import RldpConfig
from fedtune.data import Encoded, encode, load_eval
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import same_text
from fedtune.measure import measure
from fedtune.models import Base
from fedtune.privacy.rldp.policy import Utility
from fedtune.privacy.rldp.sight import Public

__all__ = ["encode_public", "utility_of"]

_EXAMPLES = 64
_WORST = 1e3  # nats


def encode_public(
    config: Config, settings: RldpConfig | None, base: Base, labels: tuple[str, ...]
) -> Encoded | None:
    """Return the public text of ``rldp.public``, its first rows; None where there is none.

    Raises
    ------
    FedtuneError
        It holds nothing that could be measured, or it is the private data.
    """
    if settings is None or not settings.public:
        return None
    if same_text(settings.public, config.data.source):
        raise FedtuneError(
            "rldp.public is data.source: the private rows",
            hint="name a file of text that anybody may have", code=ExitCode.PRIVACY,
        )  # fmt: skip
    data = config.data.model_copy(update={"eval": settings.public})
    found = encode(load_eval(data, labels)[:_EXAMPLES], base.tokenizer, data, labels)
    if not found.ids:
        raise FedtuneError(
            f"rldp.public='{settings.public}' has no usable row",
            hint="it has the format of [data]", code=ExitCode.DATA,
        )  # fmt: skip
    return found


def utility_of(
    config: Config, base: Base, public: Encoded | None, model: nn.Module
) -> Utility | None:
    """Return what measures a model's weights, as they are when it is called; higher is better."""
    if public is None:
        return None

    labels = len(config.data.labels)

    def utility() -> Public[float]:
        training = model.training
        counts = measure(
            model, public, config.model.task, batch_size=config.evaluation.batch_size,
            pad_id=base.pad_id, labels=labels,
        )  # fmt: skip
        model.train(training)
        loss = counts.loss / max(1, counts.units)
        # A model that has left the finite numbers is the worst there is, and no error.
        return Public(-min(loss, _WORST) if math.isfinite(loss) else -_WORST)

    return utility
