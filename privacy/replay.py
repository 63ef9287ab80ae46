"""Record and replay, to see whether a program keeps the promise of its mechanism.

A program is run on a data set D while everything that its mechanisms draw and
release is recorded. It is run again on a neighbour D', one unit more or less, with
the recorded draws and outputs in their place. All that is random is then the same,
and all that the neighbour may change is inside the sums that go into a release. So

* the calls, their declared sizes, and all that left must be equal to the byte;
* two sums may differ by no more than the declared sensitivity

(Cebere et al. 2026, Re:cord-play, arXiv 2602.17454). The noise itself and the sampler
are tested on the recording, because a replay cannot see them. ``replay_checks.py``
has the checks. They find faults; they prove nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fedtune.privacy.events import Event
from fedtune.privacy.lattice import grid_of
from fedtune.privacy.mechanism import Block, Mechanism
from fedtune.privacy.noise import NoiseSource

__all__ = ["Draw", "Left", "Program", "Release", "Stage", "Trace", "record", "replay"]

_M = TypeVar("_M")


@dataclass(frozen=True)
class Draw:
    """Units were drawn. Only ``event`` is public."""

    event: Event
    n: int
    drawn: NDArray[np.int64]


@dataclass(frozen=True)
class Release:
    """A sum was released.

    Attributes
    ----------
    event, blocks, denominator, shapes : public
        What was declared; must not depend on the data.
    margin : float
        Relative addition to the sensitivity that the noise makes good.
    sums : dict of name to float64 array
        Private: what the noise was added to, in the unit of the clip norm.
    output : dict of name to float32 array
        What was released.
    apart : int, public
        So many of the last blocks are of units that contribute to no other.
    """

    event: Event
    blocks: tuple[Block, ...]
    denominator: float
    shapes: tuple[tuple[str, tuple[int, ...], str], ...]
    margin: float
    sums: Mapping[str, NDArray[np.float64]]
    output: Mapping[str, NDArray[np.float32]]
    apart: int = 0


@dataclass(frozen=True)
class Left:
    """Something left the program: a message, a file, a log line, its result.

    Attributes
    ----------
    channel : str
        ``log`` for what was printed, logged or warned of; else what the program calls it.
    digest : str
        SHA-256 of the value.
    text : str
        Its beginning, to recognise it by.
    """

    channel: str
    digest: str
    text: str


@dataclass
class Trace:
    """What happened in one run, in order.

    Attributes
    ----------
    calls : list of Draw or Release
    left : list of Left
    spent : list of (int, int)
        Releases so far, and the total that the program's books showed.
    outcome : str
        ``done``, or the error that ended the run.
    """

    calls: list[Draw | Release] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    spent: list[tuple[int, int]] = field(default_factory=list)
    outcome: str = "done"

    @property
    def releases(self) -> list[Release]:
        """The releases, in order."""
        return [call for call in self.calls if isinstance(call, Release)]

    @property
    def draws(self) -> list[Draw]:
        """The draws, in order."""
        return [call for call in self.calls if isinstance(call, Draw)]


@dataclass
class Stage:
    """What a program runs on.

    It calls ``watch`` on every mechanism it uses, ``emit`` for what leaves it (messages,
    files, metrics), and ``spent`` when its books have been written. Log lines, warnings
    and what is printed are seen without its help, and so is the value it returns.
    """

    trace: Trace
    tape: list[Draw | Release] | None = None

    def watch(self, mechanism: _M) -> _M:
        """Return a stand-in for a mechanism, to be used instead of it."""
        return cast(_M, _Watched(cast(Mechanism, mechanism), self))

    def emit(self, channel: str, value: Any) -> None:
        """Note that ``value`` leaves: numbers, text, bytes, arrays, paths of files, or nests."""
        canonical = "".join(_canonical(value))
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        self.trace.left.append(Left(channel, digest, canonical[:200]))

    def spent(self, total: int) -> None:
        """Note how many releases the program's books show, right after they were written."""
        self.trace.spent.append((len(self.trace.releases), total))

    def next(self, kind: type[_M]) -> _M:
        """Return the recorded call that stands here on the tape."""
        tape = self.tape or []
        at = len(self.trace.calls)
        if at >= len(tape) or not isinstance(tape[at], kind):
            raise _DivergedError(f"call {at} is a {kind.__name__.lower()}, unlike in the recording")
        return cast(_M, tape[at])


Program = Callable[[Stage, Any], Any]
"""Runs a computation with ``Stage`` on some data. Its public randomness is its own, seeded."""


class _DivergedError(Exception):
    """The replay asked for what was not recorded."""


class _Lines(logging.Handler):
    """Notes log records without the time."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.name} {record.levelname} {record.getMessage()}"
        self._stage.emit("log", line)


class _Watched:
    """Records or replays ``draw`` and ``release``; everything else is the mechanism's own."""

    def __init__(self, mechanism: Mechanism, stage: Stage) -> None:
        self._mechanism = mechanism
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mechanism, name)

    def draw(self, n: int, source: NoiseSource) -> NDArray[np.int64]:
        """Draw; or take the recorded draw, with the unit that is new always in it."""
        if self._stage.tape is None:
            drawn = self._mechanism.draw(n, source)
        else:
            drawn = _redrawn(self._stage.next(Draw), n)
        self._stage.trace.calls.append(Draw(self._mechanism.event, n, drawn))
        return drawn

    def release(
        self,
        sums: Mapping[str, NDArray[Any]],
        blocks: Sequence[Block],
        source: NoiseSource,
        apart: Sequence[Block] = (),
    ) -> dict[str, NDArray[np.float32]]:
        """Release; or give what was released when it was recorded."""
        if self._stage.tape is None:
            output = self._mechanism.release(sums, blocks, source, apart)
        else:
            output = dict(self._stage.next(Release).output)
        made = self._release(sums, (*blocks, *apart), output)
        self._stage.trace.calls.append(replace(made, apart=len(apart)))
        return {name: value.copy() for name, value in output.items()}

    def _release(
        self,
        sums: Mapping[str, NDArray[Any]],
        blocks: tuple[Block, ...],
        output: Mapping[str, NDArray[np.float32]],
    ) -> Release:
        plain = {name: value.astype(np.float64) for name, value in sums.items()}
        whole = {name for name, value in sums.items() if value.dtype == np.int64}
        for block in blocks:
            names = [name for name in block.names if name in whole]
            size = sum(sums[name].size for name in names)
            for name in names:
                plain[name] *= grid_of(block.clip, size)
        return Release(
            event=self._mechanism.event,
            blocks=blocks,
            denominator=self._mechanism.denominator,
            shapes=tuple((n, v.shape, v.dtype.name) for n, v in sorted(sums.items())),
            margin=0.0 if len(whole) == len(sums) else self._mechanism.margin,
            sums=plain,
            output={name: value.copy() for name, value in output.items()},
        )


def record(run: Program, data: Any) -> Trace:
    """Run a program on its own noise and return what happened. ``audit`` has an example."""
    return _run(run, data, None)


def replay(run: Program, data: Any, tape: Trace) -> Trace:
    """Run a program on a neighbour with all draws and releases taken from a recording.

    A unit that is new must be the last one: it takes part in every draw.
    """
    return _run(run, data, list(tape.calls))


def _run(run: Program, data: Any, tape: list[Draw | Release] | None) -> Trace:
    stage = Stage(Trace(), tape)
    with _everything_said(stage):
        try:
            result = run(stage, data)
        except Exception as error:  # noqa: BLE001 whatever ends a run is an observation
            stage.trace.outcome = f"{type(error).__name__}: {error}"
            return stage.trace
    if result is not None:
        stage.emit("result", result)
    return stage.trace


@contextlib.contextmanager
def _everything_said(stage: Stage) -> Iterator[None]:
    """Note log records of fedtune at every level, others', warnings, and what is printed."""
    handler = _Lines(stage)
    printed = io.StringIO()
    ours, root = logging.getLogger("fedtune"), logging.getLogger()
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("always")
            yield
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
    for warning in warned:
        stage.emit("log", f"{warning.category.__name__} {warning.message}")
    if printed.getvalue():
        stage.emit("log", printed.getvalue())


def _redrawn(recorded: Draw, n: int) -> NDArray[np.int64]:
    """Return the recorded draw for ``n`` units: the last one is new, or gone, or neither."""
    if n not in (recorded.n - 1, recorded.n, recorded.n + 1):
        raise _DivergedError(f"a draw of {n} units, {recorded.n} in the recording")
    kept = recorded.drawn[recorded.drawn < n]
    return np.append(kept, recorded.n) if n > recorded.n else kept


def _canonical(value: Any) -> Iterator[str]:
    """Yield text that is the same exactly for the same value."""
    if hasattr(value, "detach"):  # a tensor of torch
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}{np.ascontiguousarray(value).tobytes().hex()}"
    elif isinstance(value, Path):
        yield f"file {value.name} {value.read_bytes().hex()}"
    elif isinstance(value, bytes):
        yield f"bytes {value.hex()}"
    elif isinstance(value, Mapping):
        yield "{"
        for key, inner in value.items():
            yield f"{key!r}:"
            yield from _canonical(inner)
            yield ","
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for inner in value:
            yield from _canonical(inner)
            yield ","
        yield "]"
    else:
        yield f"{type(value).__name__} {value!r}"
