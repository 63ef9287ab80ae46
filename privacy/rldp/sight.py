"""What a policy may see: what was released, and what was never private.

A choice that depends on the data is a release of its own, and no accountant knows of
it. So whatever chooses takes these two types only. ``Released`` is made where the
mechanism has added its noise, and out of others (post-processing); ``Public`` takes
plain numbers and words. Neither takes a tensor or an array from anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar, get_args

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Event

__all__ = ["Public", "Released", "require_sight", "unseal"]

T = TypeVar("T")
S = TypeVar("S")

_SEAL = object()


class Released(Generic[T]):
    """What has gone through the mechanism, or was made of nothing else.

    Attributes
    ----------
    value : object

    Raises
    ------
    FedtuneError
        When it is made anywhere but in ``joint.py`` or by `map`.

    Examples
    --------
    >>> Released(3.0)
    Traceback (most recent call last):
    fedtune.errors.FedtuneError: a value is 'Released' only when a mechanism has released it
    """

    __slots__ = ("value",)

    def __init__(self, value: T, seal: object = None) -> None:
        if seal is not _SEAL:
            raise _refused("a value is 'Released' only when a mechanism has released it")
        self.value: T
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> None:
        raise _refused(f"a released value stays as it is: {name}")

    def map(self, function: Callable[[T], S]) -> Released[S]:
        """Return what a function makes of it: post-processing costs nothing.

        The function must look at its argument only.
        """
        return Released(function(self.value), _SEAL)


class Public(Generic[T]):
    """What anybody may know: settings, counts of steps, figures on public text.

    Attributes
    ----------
    value : bool, int, float, str, or a tuple of them

    Raises
    ------
    FedtuneError
        For anything else: a tensor or an array may have come from private rows.

    Examples
    --------
    >>> Public(0.25).value
    0.25
    >>> import torch
    >>> Public(torch.zeros(1))
    Traceback (most recent call last):
    fedtune.errors.FedtuneError: a Tensor is not public
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        for one in value if isinstance(value, tuple) else (value,):
            # Exactly these: numbers of numpy and of torch come out of arrays.
            if type(one) not in (bool, int, float, str):
                raise _refused(f"a {type(one).__name__} is not public")
            if isinstance(one, float) and not math.isfinite(one):
                raise _refused(f"a public number is finite, not {one}")
        self.value: T
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> None:
        raise _refused(f"a public value stays as it is: {name}")


def unseal(value: T, *, by: object) -> Released[T]:
    """Return a value as released; only for a mechanism's own output (``joint.py``).

    Raises
    ------
    FedtuneError
        The caller is no mechanism.
    """
    # A stand-in that records (replay.py) has the event of its mechanism.
    if not isinstance(getattr(by, "event", None), get_args(Event)):
        raise _refused(f"'{type(by).__name__}' releases nothing")
    return Released(value, _SEAL)


def require_sight(value: Any) -> Any:
    """Return the value inside, or raise for anything that is neither of the two types.

    Examples
    --------
    >>> require_sight(Public(3)), require_sight(None)
    (3, None)
    >>> require_sight(0.5)
    Traceback (most recent call last):
    fedtune.errors.FedtuneError: a policy was shown a float
    """
    if value is None:
        return None
    if type(value) not in (Released, Public):
        raise _refused(f"a policy was shown a {type(value).__name__}")
    return value.value


def _refused(message: str) -> FedtuneError:
    return FedtuneError(
        message, hint="a policy may see Released and Public values only", code=ExitCode.PRIVACY
    )
