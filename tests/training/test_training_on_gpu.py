"""Training on a GPU: bfloat16, the scans on it, the same checkpoint format. Skipped where there is none."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import toy_cases, toy_config

from medfusion.prior import fast_bfloat16
from medfusion.training import train
from medfusion.training.meter import State

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon", "recompute": True}, {"compile": True}])
def test_a_run_on_a_gpu_learns_and_goes_on_elsewhere(tmp_path: Path, settings: dict[str, object]) -> None:
    said: list[str] = []
    config = toy_config(steps=60, batch=4, checkpoint_every=30, **settings)
    losses: list[float] = []

    def note(state: State) -> None:
        losses.append(state.loss)
        if state.step == 50:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(toy_cases(), config, tmp_path, device="cuda", say=said.append, progress=note)
    assert "scans on the GPU" in said[0]
    assert ("bfloat16" in said[0]) == fast_bfloat16(torch.device("cuda"))
    assert losses[-1] < losses[9]
    prior = train(toy_cases(), config, tmp_path, device="cpu", resume=True)
    assert all(np.isfinite(list(prior.provenance["validation_loss"].values())))


def test_workers_feed_a_gpu_that_does_not_hold_the_scans(tmp_path: Path) -> None:
    said: list[str] = []
    train(toy_cases(), toy_config(batch=4), tmp_path, device="cuda", workers=2, say=said.append)
    assert "2 worker(s)" in said[0]
