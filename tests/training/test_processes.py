"""Several processes: the losses and weights of one process with the same batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_runs import checkpoint, rows, toy_cases, toy_config

from medfusion.errors import MedfusionError
from medfusion.training import train
from medfusion.training.meter import State

TESTS = Path(__file__).parents[1]


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    settings = {"steps": 20, "batch": 4, "accumulate": 2, "optimizer": "muon", "checkpoint_every": 20}
    script = [str(TESTS / "toy_runs.py"), str(tmp_path / "two"), json.dumps(settings)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen: list[float] = []

    def note(state: State) -> None:
        seen.append(state.loss)

    train(toy_cases(), toy_config(**settings | {"accumulate": 1}), tmp_path / "one", device="cpu", progress=note)
    (told,) = (tmp_path / "two").glob("losses_2_x.txt")
    processes = [json.loads(line) for line in told.read_text().splitlines()]
    assert processes[0] == processes[1]
    assert processes[0] == pytest.approx(seen, abs=1e-4)
    one, two = tmp_path / "one", tmp_path / "two"
    torch.testing.assert_close(checkpoint(two)["network"], checkpoint(one)["network"], rtol=0, atol=1e-4)
    torch.testing.assert_close(checkpoint(two)["ema"], checkpoint(one)["ema"], rtol=0, atol=1e-4)
    assert [row["step"] for row in rows(two)] == [row["step"] for row in rows(one)]  # written by one of the two alone


def test_a_device_cannot_be_named_for_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MedfusionError, match="--device and accelerate launch exclude each other"):
        train(toy_cases(2), toy_config(), tmp_path, device="cpu")


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedfusionError, match=r"training.batch 3 does not go into 1 process\(es\) x 2 part\(s\)"):
        train(toy_cases(2), toy_config(batch=3, accumulate=2), tmp_path, device="cpu")
