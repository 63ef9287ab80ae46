"""Federated, privacy-preserving fine-tuning of language models on Flower.

This package is the ground floor: the values and methods that every side
shares, and the ``fedtune`` command. The other rooms are ``fedtune.server``,
``fedtune.client``, ``fedtune.privacy`` and ``fedtune.simulations``.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("fedtune")
except PackageNotFoundError:
    __version__ = "0+unknown"
