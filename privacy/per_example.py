"""Exact gradients of each example, and their clipped sums.

How the gradients come about is chosen for each layer: linear layers, embeddings
and the vectors of IA3 build them in their own backward pass (the ordinary weight
gradient is then never computed), Opacus' hooks do the other layers, and where
neither can, every example gets a backward pass of its own. ``prove`` compares the
first two with the last one, so that none of them can be silently wrong.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fedtune.adapters import Task, trainable
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.clipping import Clip
from fedtune.privacy.per_example_assign import assign, refuse_coupling
from fedtune.privacy.per_example_book import Book, ClippedSum, clipped
from fedtune.privacy.per_example_grads import dense
from fedtune.privacy.per_example_hooks import Hooks
from fedtune.privacy.per_example_layers import forward_of, prompt_of
from fedtune.privacy.per_example_loss import Batch, example_losses, public_batch, rows, single
from fedtune.privacy.per_example_proof import Proof, difference, moved, still

__all__ = ["ClippedSum", "LossOf", "PerExample", "Proof", "example_losses", "refuse_coupling"]

LossOf = Callable[[Batch], torch.Tensor]
"""Takes a batch of B examples and returns their losses, (B,)."""


class PerExample:
    """Per-example gradients of the trainable parameters of a model.

    Parameters
    ----------
    model : nn.Module
        Its trainable parameters must not change their ``requires_grad`` afterwards.
        Put it on its device first.
    loop : bool
        One backward pass for each example, whatever the layers are.

    Attributes
    ----------
    names : tuple of str
        Trainable parameters, sorted.
    reason : str
        Why gradients come from a loop, or '' when they do not.

    Raises
    ------
    FedtuneError
        In this model one example depends on the others: see ``refuse_coupling``.
    """

    def __init__(self, model: nn.Module, *, loop: bool = False) -> None:
        refuse_coupling(model)
        self._model = model
        self._named = trainable(model)
        self.names = tuple(self._named)
        self._ids = {id(parameter): name for name, parameter in self._named.items()}
        self._own, self._others, self._late, self.reason = assign(model, self._named)
        if loop:
            self.reason = "asked for"
        self._book: Book | None = None
        self._hooks: Hooks | None = None
        self._attached = False

    @property
    def mode(self) -> str:
        """``fast`` or ``loop``."""
        return "loop" if self.reason else "fast"

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Put the layers' own gradients in place, and take them away again.

        Optional: ``clipped_sum`` does it by itself. Around many calls it saves time.
        Outside of a call, an attached model behaves as ever.
        """
        if self._attached or self.reason:
            yield
            return
        ours: list[tuple[nn.Module, str, Any]] = [
            (module, "forward", forward_of(module, lambda: self._book)) for module in self._own
        ]
        if prompt := prompt_of(self._model, lambda: self._book):
            ours.append((self._model, "get_prompt", prompt))
        before = [(module, name, module.__dict__.get(name)) for module, name, _ in ours]
        try:
            for module, name, function in ours:
                module.__dict__[name] = function
            self._hooks = Hooks(self._others) if self._others else None
            self._attached = True
            yield
        finally:
            self._attached = False
            if self._hooks is not None:
                self._hooks.remove()
                self._hooks = None
            for module, name, function in before:
                if function is not None:
                    module.__dict__[name] = function
                else:
                    module.__dict__.pop(name, None)

    def clipped_sum(self, loss_of: LossOf, batch: Batch, rule: Clip) -> ClippedSum:
        """Return the sum over examples of their clipped gradients.

        Batches add up: cutting one into micro-batches and adding the sums changes
        nothing. An example whose loss, or any of whose gradients, is not finite
        contributes exactly zero and changes nobody else's contribution. An empty
        batch gives zeros, and the model is not called.

        Parameters
        ----------
        loss_of : callable
            For example ``lambda batch: example_losses(model, batch, task)``.
        batch : mapping of str to Tensor
            First dimension of each: examples.
        rule : Clip

        Raises
        ------
        FedtuneError
            A layer was used in a way that hides the gradients of the examples.
        """
        count = rows(batch)
        blocks = rule.blocks(self.names)
        if count == 0:
            nothing = torch.zeros(0, len(blocks), dtype=torch.float64)
            return ClippedSum(self._filled({}), nothing, torch.zeros(0), 0, 0)
        if self.reason:
            return self._looped_sum(loss_of, batch, rule)
        for eager in (True, False):
            book = Book(count, self._ids, blocks, rule, self._late, eager)
            losses = self._pass(loss_of, batch, book)
            bad = book.finish(~torch.isfinite(losses))
            if bad is not None:
                return ClippedSum(
                    self._filled(book.sums), book.norms, losses, int(bad.sum()), count
                )
        raise FedtuneError("gradients could not be clipped", code=ExitCode.INTERNAL)

    def gradients(self, loss_of: LossOf, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the unclipped gradient of each example, by name, (B, *shape), float32."""
        if self.reason:
            return self._looped(loss_of, batch)
        book = Book(rows(batch), self._ids, (self.names,), None, self._late)
        self._pass(loss_of, batch, book)
        return {
            name: dense(book.held[name])
            if name in book.held
            else torch.zeros(rows(batch), *parameter.shape, device=parameter.device)
            for name, parameter in self._named.items()
        }

    def prove(self, task: Task, loss_of: LossOf | None = None, *, most: float = 1e-4) -> Proof:
        """Compare with single-example backward passes on random tokens; fall back on them.

        Takes a few passes over three short examples. Dropout is off meanwhile, and
        parameters are moved a little, since gradients of zeros can hide errors; then
        everything is as before.

        Parameters
        ----------
        task : {"causal-lm", "classification"}
        loss_of : callable, optional
            What the job uses; ``example_losses`` if not given.
        most : float
            Largest relative difference that is rounding. Models in 16 bit get 0.05.
        """
        used = loss_of or (lambda batch: example_losses(self._model, batch, task))
        if self.reason:
            return Proof("loop", 0.0, self.reason)
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in self._model.parameters()):
            most = max(most, 0.05)
        batch = public_batch(self._model, task)
        with still(self._model), moved(self._named):
            expected = self._looped(used, batch)
            try:
                error = difference(self.gradients(used, batch), expected)
                why = "" if error <= most else f"gradients differ by {error:.1e}"
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as failure:
                error, why = float("inf"), f"{type(failure).__name__}: {failure}"
            except FedtuneError as failure:
                error, why = float("inf"), str(failure)
        if why:
            self.reason = why
            warnings.warn(f"one backward pass for each example: {why}", stacklevel=2)
            return Proof("loop", 0.0, why)
        return Proof("fast", error, "")

    def _pass(self, loss_of: LossOf, batch: Batch, book: Book) -> torch.Tensor:
        """Run forward and backward with a book open; return the losses."""
        before = [(parameter, parameter.grad) for parameter in self._named.values()]
        late = [self._named[name] for name in self._late]
        try:
            with self.attached():
                for parameter, _ in before:
                    parameter.grad = None
                self._book = book
                if self._hooks is not None:
                    self._hooks.start()
                losses = _losses(loss_of, batch)
                if losses.requires_grad:
                    losses.backward(torch.ones_like(losses))  # type: ignore[no-untyped-call]
                if self._hooks is not None:
                    self._hooks.collect(late, book.add)
                self._require_unused_grads()
        finally:
            self._book = None
            if self._hooks is not None:
                self._hooks.stop()
            for parameter, grad in before:
                parameter.grad = grad
        return losses.detach()

    def _require_unused_grads(self) -> None:
        for name, parameter in self._named.items():
            if parameter.grad is not None and name not in self._late:
                raise FedtuneError(
                    f"'{name}' is used outside of its layer too",
                    hint="use PerExample(model, loop=True), or call prove() first",
                    code=ExitCode.MODEL,
                )

    def _each(self, loss_of: LossOf, batch: Batch) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Yield loss and gradients of one example after the other."""
        before = [(parameter, parameter.grad) for parameter in self._named.values()]
        try:
            for index in range(rows(batch)):
                for parameter, _ in before:
                    parameter.grad = None
                losses = _losses(loss_of, single(batch, index))
                if losses.requires_grad:
                    losses.backward(torch.ones_like(losses))  # type: ignore[no-untyped-call]
                yield (
                    losses.detach(),
                    {
                        name: torch.zeros_like(p) if p.grad is None else p.grad
                        for name, p in self._named.items()
                    },
                )
        finally:
            for parameter, grad in before:
                parameter.grad = grad

    def _looped(self, loss_of: LossOf, batch: Batch) -> dict[str, torch.Tensor]:
        each = [grads for _, grads in self._each(loss_of, batch)]
        return {name: torch.stack([grads[name].float() for grads in each]) for name in self.names}

    def _looped_sum(self, loss_of: LossOf, batch: Batch, rule: Clip) -> ClippedSum:
        blocks = rule.blocks(self.names)
        sums = self._filled({})
        norms, losses, dropped = [], [], 0
        for loss, grads in self._each(loss_of, batch):
            row, norm, fine = clipped(grads, blocks, rule)
            losses.append(loss)
            norms.append(norm)
            if fine and bool(torch.isfinite(loss).all()):
                for name, grad in row.items():
                    sums[name] += grad
            else:
                dropped += 1
        return ClippedSum(sums, torch.stack(norms), torch.cat(losses), dropped, len(norms))

    def _filled(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return sums in name order, zeros where the model did not use a parameter."""
        return {
            name: sums[name]
            if name in sums
            else torch.zeros(parameter.shape, device=parameter.device)
            for name, parameter in self._named.items()
        }


def _losses(loss_of: LossOf, batch: Batch) -> torch.Tensor:
    with torch.enable_grad():
        losses = loss_of(batch)
    if losses.shape != (rows(batch),):
        raise FedtuneError(
            f"losses of shape {tuple(losses.shape)} for {rows(batch)} examples",
            hint="return one loss for each example",
            code=ExitCode.MODEL,
        )
    return losses
