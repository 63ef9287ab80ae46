"""Who computes the body: a few threads, which may join calls of equal shape.

gRPC answers each call in a thread of its own; if torch worked in all of them, each
would start workers of its own and never end them.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import torch

from fedtune.server.body import Body
from fedtune.split.calls import Refused, Status
from fedtune.split.rows import Rows

__all__ = ["Compute", "Work", "joined"]

WAIT = 0.002
"""Seconds that a call waits for others to be joined with."""

Answer = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Work:
    """One call: forward without ``grad``, otherwise the gradients. Shapes as in ``Body``."""

    hidden: torch.Tensor
    rows: Rows
    deep: torch.Tensor | None = None
    grad: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[Any, ...] | None:
        """Return what calls must have in common to be joined; None: this one never is."""
        rows = self.rows
        if self.deep is not None:
            return None
        return (
            rows.length, rows.past, rows.positions, rows.spans is None, self.hidden.dtype,
            self.grad is None,
        )  # fmt: skip


@dataclass(eq=False)
class _Job:
    work: Work | None
    make: Callable[[], Any] | None
    done: Future[Any] = field(default_factory=Future)


class Compute:
    """A queue of calls and the threads that work it off.

    Parameters
    ----------
    body : Body
    workers : int
        Calls computed at the same time; each uses all of torch's threads.
    batch : int
        Calls that may be joined to one. Above 1 the last bits of a result may depend
        on who else calls: matrix products of other sizes are summed in another order.
    """

    def __init__(self, body: Body, workers: int = 1, batch: int = 1) -> None:
        self._body = body
        self._batch = batch
        self._jobs: list[_Job] = []
        self._some = threading.Condition()
        self._ended = False
        self.largest = 1
        """Most calls that were joined so far."""
        self._threads = [
            threading.Thread(target=self._work, name=f"body-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, work: Work, seconds: float | None = None) -> Answer:
        """Return the output and None, or the gradients at hidden states and prefixes."""
        found: Answer = self._ask(_Job(work, None), seconds)
        return found

    def call(self, make: Callable[[], Any], seconds: float | None = None) -> Any:
        """Return what a function returns, in a thread of the body."""
        return self._ask(_Job(None, make), seconds)

    def close(self) -> None:
        """End the threads; calls that wait are refused."""
        with self._some:
            self._ended = True
            for job in self._jobs:
                job.done.cancel()
            self._jobs.clear()
            self._some.notify_all()
        for thread in self._threads:
            thread.join(timeout=60)

    def _ask(self, job: _Job, seconds: float | None) -> Any:
        with self._some:
            if self._ended:
                raise Refused(Status.UNAVAILABLE, "the body's server is going down")
            self._jobs.append(job)
            self._some.notify_all()
        try:
            return job.done.result(seconds)
        except TimeoutError as error:
            job.done.cancel()
            raise Refused(Status.DEADLINE_EXCEEDED, "the body was not done in time") from error
        except CancelledError as error:
            raise Refused(Status.UNAVAILABLE, "the body's server is going down") from error
        except torch.OutOfMemoryError as error:
            raise Refused(Status.RESOURCE_EXHAUSTED, "the body is out of memory") from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise Refused(
                Status.INVALID_ARGUMENT, f"the body cannot run this: {str(error)[:200]}",
                "are the rows longer than the model can see?",
            ) from error  # fmt: skip

    def _work(self) -> None:
        while jobs := self._next():
            jobs = [job for job in jobs if job.done.set_running_or_notify_cancel()]
            try:
                answers = self._answers(jobs)
            except Exception as error:  # noqa: BLE001 - whoever called gets it
                for job in jobs:
                    job.done.set_exception(error)
            else:
                for job, answer in zip(jobs, answers, strict=True):
                    job.done.set_result(answer)
            jobs = answers = []  # nothing is held until the next call

    def _answers(self, jobs: Sequence[_Job]) -> list[Any]:
        works = [job.work for job in jobs if job.work is not None]
        self.largest = max(self.largest, len(works))
        if works:
            return list(joined(self._body, works))
        return [job.make() for job in jobs if job.make is not None]

    def _next(self) -> list[_Job]:
        """Wait for a call, and a moment for others like it; none at the end."""
        with self._some:
            self._some.wait_for(lambda: self._jobs or self._ended)
            if not self._jobs:
                return []
            first = self._jobs.pop(0)
            found = [first]
            shape = first.work.shape if first.work is not None else None
            until = time.monotonic() + WAIT
            while shape is not None and len(found) < self._batch:
                like = [job for job in self._jobs if job.work and job.work.shape == shape]
                for job in like[: self._batch - len(found)]:
                    self._jobs.remove(job)
                    found.append(job)
                left = until - time.monotonic()
                if left <= 0 or len(found) == self._batch:
                    break
                self._some.wait(left)
            return found


def joined(body: Body, works: Sequence[Work]) -> list[Answer]:
    """Run calls of one shape as one batch, and part the result again."""
    first = works[0]
    if len(works) == 1:
        return [_alone(body, first)]
    rows = Rows(
        sum(work.rows.batch for work in works), first.rows.length, first.rows.past,
        None if first.rows.spans is None
        else tuple(span for work in works for span in work.rows.spans or ()),
        first.rows.positions,
    )  # fmt: skip
    grads = [work.grad for work in works if work.grad is not None]
    whole = Work(
        torch.cat([work.hidden for work in works]), rows, None, torch.cat(grads) if grads else None
    )
    found = _alone(body, whole)[0]
    ends = list(itertools.accumulate(work.rows.batch for work in works))
    return [
        (found[end - work.rows.batch : end], None) for end, work in zip(ends, works, strict=True)
    ]


def _alone(body: Body, work: Work) -> Answer:
    if work.grad is not None:
        return body.gradients(work.hidden, work.rows, work.deep, work.grad)
    with torch.no_grad():
        return body.forward(work.hidden, work.rows, work.deep), None
