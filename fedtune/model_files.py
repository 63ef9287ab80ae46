"""Which model a folder holds, by the bytes of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedtune.errors import ExitCode, FedtuneError
from fedtune.models import model_folder

__all__ = ["weights_digest"]

_PIECE = 1 << 22


def weights_digest(base: str) -> str:
    """Return the SHA-256 of a model's weights, as ``sha256sum model.safetensors`` prints it.

    Parameters
    ----------
    base : str
        A folder, or the name of an embedded model.

    Returns
    -------
    str
        64 hex digits. Of several files: the SHA-256 of what ``sha256sum *.safetensors`` prints.

    Raises
    ------
    FedtuneError
        There are no weights in the safetensors format.

    Examples
    --------
    >>> weights_digest("fedtune:tiny")[:12]
    'c64ec01b82ca'
    """
    folder = Path(model_folder(base))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise FedtuneError(
            f"no *.safetensors in '{base}'", hint="the weights must be in this format",
            code=ExitCode.MODEL,
        )  # fmt: skip
    each = [(_sha256(file), file.name) for file in files]
    if len(each) == 1:
        return each[0][0]
    listed = "".join(f"{digest}  {name}\n" for digest, name in each)
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
