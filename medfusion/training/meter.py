"""Losses, speed and the time spent waiting for data, between two rows of metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """State after a step: last loss that was read, images a second, share of the time spent waiting for data."""

    step: int
    loss: float
    images_per_second: float
    waiting: float


class Meter:
    """Unread losses stay tensors: reading one makes a GPU finish what it has queued.

    Parameters
    ----------
    batch : images of a step.
    seconds, waited, worked : what the run took before it was resumed; waiting for data; at its steps.
    losses, norms : of the steps between its last row and its checkpoint, and of their gradients.
    """

    def __init__(
        self,
        batch: int,
        seconds: float = 0.0,
        waited: float = 0.0,
        worked: float = 0.0,
        losses: Sequence[float] = (),
        norms: Sequence[float] = (),
    ) -> None:
        self.batch, self.before, self.start = batch, seconds, time.perf_counter()
        self.waited, self.worked = waited, worked  # in the whole run, validation and saving left out
        self.unread: list[Tensor] = []
        self.last = State(0, math.nan, math.nan, 0.0)
        self._open()
        self.losses += losses
        self.norms += norms

    def _open(self) -> None:
        self.began, self.steps, self.waits = time.perf_counter(), 0, 0.0
        self.losses, self.norms = list[float](), list[float]()

    @property
    def seconds(self) -> float:
        """Wall time of the run, what came before a resume included."""
        return self.before + time.perf_counter() - self.start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.perf_counter()
        yield
        self.waits += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: validation, pictures, checkpoints."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """The loss of one more step, and the length of its gradient."""
        self.unread.append(torch.stack([loss, norm]))
        self.steps += 1

    def read(self, values: Sequence[Sequence[float]]) -> None:
        """The values of the unread losses and lengths."""
        self.losses += [loss for loss, _ in values]
        self.norms += [norm for _, norm in values]
        self.unread.clear()

    def progress(self, step: int) -> State:
        """Since the last row."""
        if self.steps:
            seconds = max(time.perf_counter() - self.began, 1e-9)
            loss = self.losses[-1] if self.losses else self.last.loss
            self.last = State(step, loss, self.steps * self.batch / seconds, self.waits / seconds)
        return self.last._replace(step=step)

    def row(self, step: int) -> dict[str, Any]:
        """The row of metrics.jsonl that ends with ``step``; the next begins."""
        state = self.progress(step)
        loss = sum(self.losses) / len(self.losses)
        norm = max(self.norms)
        self.waited, self.worked = self.waited + self.waits, self.worked + time.perf_counter() - self.began
        self._open()
        return {
            "step": step,
            "loss": round(loss, 5),
            "gradient_norm": round(norm, 4),
            "images_per_second": round(state.images_per_second, 3),
            "waiting": round(state.waiting, 4),
            "seconds": round(self.seconds, 3),
        }
