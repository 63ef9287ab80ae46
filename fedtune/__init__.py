"""Federated, privacy-preserving fine-tuning of language models on Flower.

This package is the ground floor: the values and methods that every side
shares, and the ``fedtune`` command. The other rooms are ``fedtune.server``,
``fedtune.client``, ``fedtune.privacy`` and ``fedtune.simulations``.
"""

import os
from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

# Flower and the hub call home unless told not to, and read this when imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

try:
    __version__ = version("fedtune")
except PackageNotFoundError:
    __version__ = "0+unknown"
