"""Memory: the estimate bounds what a step takes, and the advice fits."""

import re
import subprocess
import sys

import pytest
import torch
import yaml
from prior_factory import tiny_config
from toy_runs import toy_cases

from medfusion.config import Config, load_config
from medfusion.errors import MedfusionError
from medfusion.training import memory, train
from medfusion.training.memory import advice, available, out_of_memory, require_memory, step_bytes
from medfusion.training.stages import Diffusion, with_settings

CPU = torch.device("cpu")
MEASURE = """
import sys, torch, psutil
from prior_factory import tiny_config
from medfusion.data.crops import Crop
from medfusion.training.batches import Shown
from medfusion.training.memory import step_bytes
from medfusion.training.loop import _networks, build_optimizers
from medfusion.training.stages import Diffusion
recompute = sys.argv[1] == "recompute"

def step(edge):
    config = tiny_config(network={"channels": (16, 32), "blocks": (2, 2), "located": False}, data={"crop": edge},
                         training={"batch": 1, "recompute": recompute})
    network, ema = _networks(Diffusion(config), [], torch.device("cpu"))
    optimizers = build_optimizers(network, config.training)
    image = torch.randn(1, 1, edge, edge, edge)
    crop = Crop(image, torch.zeros(1, 4, 2, 2, 2), None, torch.tensor([-1]))
    Diffusion(config).loss(network, Shown(crop, image, torch.tensor([0.5])), 0.0).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    return config

torch.set_num_threads(1)
step(16)
before = psutil.Process().memory_info().rss
open("/proc/self/clear_refs", "w").write("5")
config = step(96)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(step_bytes(Diffusion(config), 1, torch.device("cpu")), peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("mode", ["plain", "recompute"])
def test_the_estimate_bounds_the_peak(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", MEASURE, mode], capture_output=True, text=True, check=True)
    estimate, peak = map(int, done.stdout.split())
    assert peak < estimate < 2 * peak


def large() -> Diffusion:
    return Diffusion(Config.model_validate({"name": "large", "data": {"crop": 96}, "training": {"batch": 4}}))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_each_advice_alone_makes_the_step_fit_and_the_next_larger_value_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path, share: float
) -> None:
    need = step_bytes(large(), 1, CPU)
    limit = int(share * need)
    monkeypatch.setattr(memory, "available", lambda device: limit)
    with pytest.raises(MedfusionError, match="a training step needs about") as error:
        require_memory(large(), 1, CPU)
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump({"name": "large", "data": {"crop": 96}, "training": {"batch": 4}}))
    ways = {name: re.sub(r" \(.*", "", text) for name, text in error.value.facts.items()}
    assert {"data.crop", "network.channels"} <= ways.keys()
    assert ("training.accumulate" in ways) == ("training.batch" in ways)
    for name, value in ways.items():
        assert step_bytes(Diffusion(load_config(path, [f"{name}={value}"])), 1, CPU) <= limit
    larger = load_config(path, [f"data.crop={int(ways['data.crop']) + 16}"])
    assert step_bytes(Diffusion(larger), 1, CPU) > limit


def test_a_step_that_failed_although_it_fitted_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    need = step_bytes(large(), 1, CPU)
    monkeypatch.setattr(memory, "available", lambda device: 2 * need)
    crop = int(advice(large(), 1, CPU, need).facts["data.crop"])
    assert step_bytes(with_settings(large(), "data", crop=crop), 1, CPU) <= need / 2


def test_a_run_that_needs_too_much_is_refused_before_the_first_step(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(MedfusionError, match="a training step needs about"):
        train(toy_cases(2), tiny_config(), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_running_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)
    assert out_of_memory(error.value)
    assert out_of_memory(torch.OutOfMemoryError())
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("sizes of tensors must match"))


def test_processes_share_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = available(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available(CPU) == pytest.approx(alone / 4, rel=0.2)


def test_recomputing_gives_the_same_gradients_with_less_kept() -> None:
    gradients, costs = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        network_of = {"channels": (16, 32), "blocks": (3, 3)}
        stage = Diffusion(tiny_config(network=network_of, training={"recompute": recompute}))
        network = stage.build()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        network(torch.ones(1, 1, 16, 16, 16), torch.zeros(1)).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
        costs.append(memory.bytes_per_voxel(stage, CPU))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert costs[1] < 0.75 * costs[0]


def test_what_is_kept_whatever_the_crop_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half width autograd keeps a copy of the weights, a thousand times the activations of a voxel, and once."""
    stage = Diffusion(tiny_config(network={"channels": (64, 96), "blocks": (1, 1)}))
    full = memory.bytes_per_voxel(stage, CPU)

    def half_width(device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16)

    monkeypatch.setattr("medfusion.training.objective.half_width", half_width)
    assert 0.4 * full < memory.bytes_per_voxel(stage, CPU) < 1.05 * full
