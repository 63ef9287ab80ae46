"""Sampler, clip, noise, denominator and privacy event as one object.

What is accounted is what runs: the object that names the event also draws the
units, adds the noise and divides. A release is

    (sum of clipped contributions + noise) / public constant

on the whole numbers of ``lattice.py``. Nothing in it depends on how many units were
drawn: an empty batch is released like any other, and is pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Event, Relation, Unit, with_laplace
from fedtune.privacy.laplace import MOST_SCALE, laplace_steps
from fedtune.privacy.lattice import MOST, STEP, clip_update, grid_of, require_clip, to_grid
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.sampling import Sampler, TruncatedPoisson

__all__ = ["Block", "Mechanism"]

MOST_MARGIN = 1e-2
NORM_ROUNDING = 1e-5  # a float32 norm over the coordinates of one contribution, and its scaling
UNIT_ROUNDOFF = 2.0**-24  # of float32
PIECE = 1 << 20  # noise is drawn and added in pieces, so that it needs no second copy
NORMAL_REACH = 9.0  # no normal number of noise.py is larger


@dataclass(frozen=True)
class Block:
    """Tensors that share one clip norm.

    Attributes
    ----------
    names : tuple of str
        The tensors. One contribution's L2 norm over all of them is at most ``clip``.
    clip : float
        Clip norm: the sensitivity of their sum.
    sigma : float
        Standard deviation of the noise on each coordinate of the **sum**; of Laplace
        noise, its scale.
    """

    names: tuple[str, ...]
    clip: float
    sigma: float


@dataclass(frozen=True)
class Mechanism:
    """A sampled Gaussian or Laplace mechanism, from the draw to the noisy mean.

    Attributes
    ----------
    unit : Unit
        Whose contribution is clipped and hidden.
    relation : Relation
        Neighbouring relation. A truncated sampler needs ``replace-special``.
    sampler : Sampler
        Draws the units and names the event.
    noise_multiplier : float
        z: standard deviation of the noise (Laplace: its scale) over the sensitivity.
    denominator : float
        Public constant that the noisy sum is divided by, e.g. the expected batch.
        Never the number of units that were drawn.
    micro_batch : int
        Most contributions that are added in float32 before they go into a float64 sum.
        Only whole-number sums do without it.
    law : {"gaussian", "laplace"}
        Of the noise. Laplace noise is for one number, summed in whole steps: its norm is
        then L1 and L2 at once, and epsilon holds at delta 0.

    Raises
    ------
    FedtuneError
        When a number cannot be used, or relation and sampler do not fit.

    Examples
    --------
    >>> from fedtune.privacy.noise import SecureNoise
    >>> from fedtune.privacy.sampling import Poisson
    >>> mechanism = Mechanism(
    ...     Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(0.01), 1.1, denominator=32.0
    ... )
    >>> mechanism.event
    PoissonGaussian(sampling_probability=0.01, noise_multiplier=1.1)
    >>> round(mechanism.margin, 6)
    0.000559
    >>> blocks = mechanism.blocks_flat(("w",), clip=0.5)
    >>> blocks[0].sigma
    0.55
    >>> noisy = mechanism.release({"w": np.zeros(5)}, blocks, SecureNoise())
    >>> noisy["w"].shape, noisy["w"].dtype
    ((5,), dtype('float32'))
    """

    unit: Unit
    relation: Relation
    sampler: Sampler
    noise_multiplier: float
    denominator: float
    micro_batch: int = 32
    law: Literal["gaussian", "laplace"] = "gaussian"

    def __post_init__(self) -> None:
        if self.law not in ("gaussian", "laplace"):
            raise _refused(f"law={self.law!r}", "use 'gaussian' or 'laplace'")
        _require_positive("noise multiplier", self.noise_multiplier)
        _require_positive("denominator", self.denominator)
        if not isinstance(self.unit, Unit) or not isinstance(self.relation, Relation):
            raise _refused(
                f"unit={self.unit!r}, relation={self.relation!r}", "use Unit and Relation"
            )
        truncated = isinstance(self.sampler, TruncatedPoisson)
        if truncated and self.relation is not Relation.REPLACE_SPECIAL:
            raise _refused(
                f"a truncated Poisson sampler under {self.relation.value}",
                "its cap needs a public number of units: use replace-special",
            )
        if isinstance(self.micro_batch, bool) or self.micro_batch < 1:
            raise _refused(f"micro_batch={self.micro_batch!r}", "use 1 or more")
        if self.unit is Unit.EXAMPLE and self.margin > MOST_MARGIN:
            raise _refused(
                f"rounding of float32 sums could cost {self.margin:.2%} of the noise",
                f"micro_batch={self.micro_batch} with denominator={self.denominator:g}: "
                "use a smaller micro-batch",
            )

    @property
    def event(self) -> Event:
        """What one release is, for the accountant."""
        event = self.sampler.event(self.noise_multiplier)
        return with_laplace(event) if self.law == "laplace" else event

    @property
    def most_drawn(self) -> int:
        """Public bound on the size of a batch: the cap, or twice the denominator and 64.

        A Poisson batch whose mean is the denominator exceeds it with probability below
        1e-34. ``draw`` refuses a batch beyond it: then the denominator is far off.
        """
        if isinstance(self.sampler, TruncatedPoisson):
            return self.sampler.cap
        return math.ceil(2.0 * self.denominator) + 64

    @property
    def margin(self) -> float:
        """Relative addition to the sensitivity of a **float** sum, made good by more noise.

        Let each of at most B contributions have norm at most C when computed exactly.

        * A float32 norm and the scaling by it are off by at most 1e-5 C.
        * Adding b numbers in float32 is off by at most b u times the sum of their sizes,
          u = 2^-24 (Higham 2002, section 4.2). Over all micro-batches: b u B C. One unit
          more may regroup all that follow, so that it counts for both data sets: 2 b u B C.
          Micro-batches are added in float64, at less than that by 2^-29.
        * Rounding to the grid moves each of two sums by at most grid sqrt(d) / 2, together
          by ``STEP`` C.

        Whole-number sums (``clip_update``) are exact and need no margin.
        """
        adding = 2.0 * self.most_drawn * self.micro_batch * UNIT_ROUNDOFF
        return STEP + NORM_ROUNDING + adding

    def draw(self, n: int, source: NoiseSource) -> NDArray[np.int64]:
        """Return the units that take part in the next release, ascending.

        Raises
        ------
        FedtuneError
            When there are more than ``most_drawn``.
        """
        drawn = self.sampler.draw(n, source)
        if len(drawn) > self.most_drawn:
            raise _refused(
                f"a batch is larger than denominator={self.denominator:g} allows for",
                "set the denominator to the expected number of units in a batch",
            )
        return drawn

    def blocks_flat(self, names: Sequence[str], clip: float) -> tuple[Block, ...]:
        """Return one block: one clip norm over all tensors, noise z times clip."""
        return (Block(tuple(names), clip, self.noise_multiplier * clip),)

    def blocks_weighted(
        self, clips: Mapping[tuple[str, ...], float], weights: Mapping[tuple[str, ...], float]
    ) -> tuple[Block, ...]:
        """Return blocks with a clip norm and a share of the privacy each.

        sigma_b = z clip_b / sqrt(w_b) with shares w that add up to 1: jointly they cost
        what one block with noise multiplier z does.

        Raises
        ------
        FedtuneError
            When the blocks differ, or a share is not above 0, or they do not add up to 1.

        Examples
        --------
        >>> from fedtune.privacy.sampling import Everyone
        >>> mechanism = Mechanism(
        ...     Unit.CLIENT, Relation.REPLACE_SPECIAL, Everyone(), 2.0, denominator=10.0
        ... )
        >>> clips = {("a", "b"): 1.0, ("bits",): 0.5}
        >>> [block.sigma for block in mechanism.blocks_weighted(
        ...     clips, {("a", "b"): 0.75, ("bits",): 0.25})]
        [2.3094010767585034, 2.0]
        """
        total = math.fsum(weights.values())
        if set(clips) != set(weights) or not abs(total - 1.0) < 1e-6:
            raise _refused(
                f"shares {dict(weights)} for blocks {list(clips)}",
                "one share for each block, above 0, adding up to 1",
            )
        for share in weights.values():
            _require_positive("share of a block", share)
        return tuple(
            Block(names, clip, self.noise_multiplier * clip / math.sqrt(weights[names] / total))
            for names, clip in clips.items()
        )

    def clip_update(
        self, update: Mapping[str, NDArray[Any]], blocks: Sequence[Block]
    ) -> dict[str, NDArray[np.int64]]:
        """Return an update in grid steps, every block clipped; all zero if not finite.

        Several updates are added as int64, exactly and in any order, and then released
        with the same blocks.

        Raises
        ------
        FedtuneError
            When the tensors are not those of the blocks, or are not floats.
        """
        self._check(update, blocks)
        if not all(bool(np.isfinite(value).all()) for value in update.values()):
            return {name: np.zeros(value.shape, np.int64) for name, value in update.items()}
        steps: dict[str, NDArray[np.int64]] = {}
        for block in blocks:
            steps |= clip_update({name: update[name] for name in block.names}, block.clip)
        return {name: steps[name] for name in update}

    def release(
        self,
        sums: Mapping[str, NDArray[Any]],
        blocks: Sequence[Block],
        source: NoiseSource,
        apart: Sequence[Block] = (),
    ) -> dict[str, NDArray[np.float32]]:
        """Return (sums + noise) / denominator. Draws fresh noise at every call.

        Parameters
        ----------
        sums : mapping of name to array
            Sum over the drawn units of what was clipped: int64 grid steps from
            ``clip_update``, or float64 or float32. Zeros when nobody was drawn.
        blocks : sequence of Block
            Each tensor in exactly one. Together sum (clip / sigma)^2 <= 1 / z^2.
        source : NoiseSource
        apart : sequence of Block
            Blocks of units that contribute to nothing else. No unit is in both parts, so
            both together cost what one does (parallel composition).

        Returns
        -------
        dict of name to float32 array
            Noisy means, in the order and the shapes of ``sums``.

        Raises
        ------
        FedtuneError
            Before anything is drawn: when the blocks would release more than the event
            says or are not those of the tensors, when a sum is not finite or in another
            type, or when whole numbers could wrap.
        """
        self._check(sums, blocks, apart)
        if self.law == "laplace":
            return self._laplace(sums, [*blocks, *apart], source)
        ready: dict[str, tuple[NDArray[np.int64], float, float]] = {}
        for block in (*blocks, *apart):
            grid, sigma = self._scale({name: sums[name] for name in block.names}, block)
            for name in block.names:
                ready[name] = (to_grid(sums[name], grid, name), grid, sigma)
        return {name: self._noisy(*ready[name], source) for name in sums}

    def describe(
        self, blocks: Sequence[Block], sizes: Mapping[str, int], source: NoiseSource
    ) -> dict[str, Any]:
        """Return the public facts of a release, for the ledger and the report.

        Parameters
        ----------
        blocks : sequence of Block
        sizes : mapping of name to int
            Coordinates of each tensor.
        source : NoiseSource
        """
        return {
            "unit": self.unit.value,
            "relation": self.relation.value,
            "sampler": type(self.sampler).__name__,
            "sampling_probability": self.sampler.rate,
            "population": getattr(self.sampler, "population", None),
            "cap": getattr(self.sampler, "cap", None),
            "noise_multiplier": self.noise_multiplier,
            "law": self.law,
            "denominator": self.denominator,
            "micro_batch": self.micro_batch,
            "margin_of_float_sums": self.margin,
            "noise": source.name,
            "noise_secure": source.secure,
            "blocks": [
                {
                    "names": list(block.names),
                    "clip": block.clip,
                    "sigma": block.sigma,
                    "grid": grid_of(block.clip, sum(sizes[name] for name in block.names)),
                }
                for block in blocks
            ],
        }

    def _scale(self, sums: Mapping[str, NDArray[Any]], block: Block) -> tuple[float, float]:
        """Return the grid step and the noise in steps; whole sums need no margin."""
        whole = {value.dtype == np.int64 for value in sums.values()}
        if len(whole) > 1:
            raise _refused(
                f"'{block.names[0]}' and others of its block have sums of different types",
                "all of a block are int64 steps of clip_update, or all are floats",
            )
        margin = 0.0 if whole.pop() else self.margin
        if margin > MOST_MARGIN:
            raise _refused(
                f"rounding of float32 sums could cost {margin:.2%} of the noise",
                "use a smaller micro_batch, or whole numbers from clip_update",
            )
        grid = grid_of(block.clip, sum(value.size for value in sums.values()))
        sigma = block.sigma * (1.0 + margin) / grid
        if self.most_drawn * block.clip / grid + NORMAL_REACH * sigma >= MOST:
            raise _refused(
                f"clip={block.clip:g} and sigma={block.sigma:g} do not fit whole numbers",
                "use a smaller noise multiplier or denominator",
            )
        return grid, sigma

    def _noisy(
        self, steps: NDArray[np.int64], grid: float, sigma: float, source: NoiseSource
    ) -> NDArray[np.float32]:
        """Add whole noise, then scale: what follows the sum depends on nothing else."""
        flat = steps.reshape(-1)
        found = np.empty(flat.size, np.float32)
        for start in range(0, flat.size, PIECE):
            piece = flat[start : start + PIECE]
            noise = source.normal(piece.size)
            if noise.shape != piece.shape or not bool(np.isfinite(noise).all()):
                raise _refused(f"'{source.name}' gave no usable noise", "use SecureNoise")
            noise *= sigma
            whole = np.rint(noise, out=noise).astype(np.int64)
            whole += piece
            found[start : start + PIECE] = whole * (grid / self.denominator)
        return found.reshape(steps.shape)

    def _laplace(
        self, sums: Mapping[str, NDArray[Any]], blocks: Sequence[Block], source: NoiseSource
    ) -> dict[str, NDArray[np.float32]]:
        """Release one number; its scale in steps is whole, and rounded up."""
        ((name, value),) = sums.items() if len(sums) == 1 else [("", np.zeros(0))]
        if len(blocks) != 1 or value.size != 1 or value.dtype != np.int64:
            raise _refused(
                f"Laplace noise on {sum(one.size for one in sums.values())} numbers in "
                f"{len(blocks)} blocks",
                "one number, as int64 steps of clip_update; Gaussian noise for more",
            )
        (block,) = blocks
        grid = grid_of(block.clip, 1)
        scale = math.ceil(block.sigma / grid) if block.sigma < grid * MOST_SCALE else MOST_SCALE + 1
        if scale > MOST_SCALE or self.most_drawn * block.clip / grid >= MOST:
            raise _refused(
                f"clip={block.clip:g} and scale={block.sigma:g} do not fit whole numbers",
                "use a smaller noise multiplier or denominator",
            )
        # No number is too large for Python, so that nothing wraps however far the tail goes.
        total = int(to_grid(value, grid, name).item()) + laplace_steps(scale, source)
        return {name: np.full(value.shape, total * (grid / self.denominator), np.float32)}

    def _check(
        self,
        tensors: Mapping[str, NDArray[Any]],
        blocks: Sequence[Block],
        apart: Sequence[Block] = (),
    ) -> None:
        """Raise unless the blocks are those of the tensors and cost what the event says."""
        every = (*blocks, *apart)
        named = [name for block in every for name in block.names]
        if (
            not tensors
            or not all(block.names for block in every)
            or sorted(named) != sorted(tensors)
        ):
            raise _refused(
                f"tensors {sorted(tensors)} are not each in exactly one block: {sorted(named)}",
                "give every tensor one block, and no block without tensors",
            )
        for block in every:
            require_clip(block.clip)
            _require_positive("sigma", block.sigma)
        for name, value in tensors.items():
            floats = getattr(value, "dtype", None) in (np.float32, np.float64)
            whole = getattr(value, "dtype", None) == np.int64
            if not isinstance(value, np.ndarray) or value.size == 0 or not (floats or whole):
                raise _refused(
                    f"'{name}' is {getattr(value, 'dtype', type(value).__name__)} "
                    f"of shape {getattr(value, 'shape', ())}",
                    "use float64, float32 or int64 arrays with at least one number",
                )
        costs = [sum((block.clip / block.sigma) ** 2 for block in one) for one in (blocks, apart)]
        cost = max(costs)
        if not cost <= (1.0 + 1e-12) / self.noise_multiplier**2:
            raise _refused(
                f"sum (clip / sigma)^2 = {cost:.6g} of the blocks is more than "
                f"1 / z^2 = {1.0 / self.noise_multiplier**2:.6g}",
                "make the blocks with blocks_flat or blocks_weighted of this mechanism",
            )


def _require_positive(name: str, value: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise _refused(f"{name} {value!r}", "use a finite number above 0")


def _refused(message: str, hint: str) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode.PRIVACY)
