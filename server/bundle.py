"""The bundle that Flower wants for a run: one reference to installed code, and no code."""

from __future__ import annotations

import hashlib

import tomli_w
from flwr.cli.build import build_fab_from_files

__all__ = ["SERVER_APP", "build_bundle", "bundle_hash"]

SERVER_APP = "fedtune.server.flower_app:app"
_CLIENT_APP = "fedtune.client:nothing"
"""Flower demands a reference. It names nothing: a node of fedtune runs its own installed code,
and a stock node that loads this bundle fails."""


def build_bundle(serverapp: str = SERVER_APP) -> bytes:
    """Return a Flower App Bundle that holds a ``pyproject.toml`` and nothing else.

    Parameters
    ----------
    serverapp : str
        ``module:attribute`` of a ``ServerApp`` that is installed where the server runs.

    Returns
    -------
    bytes
        About 600 of them; the same for the same reference.

    Raises
    ------
    ValueError
        Flower does not take the reference.

    Examples
    --------
    >>> build_bundle() == build_bundle()
    True
    """
    project = {
        "project": {"name": "fedtune", "version": "1.0.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedtune",
                    "components": {"serverapp": serverapp, "clientapp": _CLIENT_APP},
                    "config": {"folder": ""},
                }
            }
        },
    }
    return build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode()})[0]


def bundle_hash(bundle: bytes) -> str:
    """Return the name that Flower gives a bundle: SHA-256, hexadecimal."""
    return hashlib.sha256(bundle).hexdigest()
