"""Generative adversarial networks as a family: two players in one loop, watched."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from prior_factory import tiny_config
from toy_runs import assert_same_run, rows, toy_cases

from medfusion.config import Config
from medfusion.data.crops import Case
from medfusion.errors import MedfusionError
from medfusion.networks import Adversarial
from medfusion.objectives.adversarial import discriminator_loss, generator_loss, penalty
from medfusion.prior import GanPrior, Prior
from medfusion.training import train
from medfusion.training.batches import Samples
from medfusion.training.watch import burst, lost


def gan_config(steps: int = 4, **gan: Any) -> Config:
    shape = {"channels": (8, 16), "latents": 6} | gan
    settings = {"steps": steps, "batch": 2, "optimizer": "adversarial", "learning_rate": 1e-3, "checkpoint_every": 100}
    tree = tiny_config(training=settings, data={"validation": 2}).model_dump() | {"family": "gan", "gan": shape}
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return toy_cases()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cases: list[Case]) -> Path:
    out = tmp_path_factory.mktemp("gan")
    train(cases, gan_config(), out, data="five phantoms", device="cpu")
    return out


def test_a_run_leaves_a_prior_with_its_card(run: Path) -> None:
    prior = Prior.load(run / "prior.safetensors")
    assert isinstance(prior, GanPrior)
    assert set(rows(run)[-1]["validation"]) == {"logit_real", "logit_generated", "diversity"}
    assert all(row["gradient_norm"] > 0 for row in rows(run) if "loss" in row)
    assert "| Family | a GAN |" in (run / "card.md").read_text()
    one, two = prior.sample([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    torch.testing.assert_close(prior.sample([torch.Generator().manual_seed(2)])[0], two, atol=1e-5, rtol=1e-5)
    assert one.shape == (1, 16, 16, 16)
    assert not torch.allclose(one, two)
    with pytest.raises(MedfusionError, match="is a GAN, which has no encoder"):
        prior.reconstruct(one[None])
    with pytest.raises(ValueError, match=r"volumes of 16\^3 voxels"):
        prior.decode(torch.zeros(1, 6), [32, 32, 32])


def test_an_interrupted_run_is_resumed(run: Path, tmp_path: Path, cases: list[Case]) -> None:
    def stop(state: Any) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(cases, gan_config(), tmp_path, device="cpu", progress=stop)
    train(cases, gan_config(), tmp_path, device="cpu", resume=True)
    assert_same_run(tmp_path, run)


@pytest.mark.parametrize(
    ("game", "spectral"), [("nonsaturating", False), ("wasserstein", False), ("nonsaturating", True)]
)
def test_each_player_has_the_gradient_of_its_own_loss(game: Any, spectral: bool) -> None:
    """As two separate backward passes give it."""
    torch.manual_seed(0)
    network = Adversarial((8, 16), 6, 16, spectral).eval()  # spectral norms are updated in training alone
    real, noise = torch.randn(3, 1, 16, 16, 16), torch.randn(3, 6)

    def discriminate(x: torch.Tensor) -> torch.Tensor:
        return network.discriminator(x)[:, 0]

    torch.manual_seed(1)
    sum(loss.mean() for loss in network(real, noise, game, 2.0)).backward()
    together = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    torch.manual_seed(1)
    generated = network.generator(noise)
    network.zero_grad()
    generator_loss(discriminate(generated), game).mean().backward()
    apart = {name: p.grad.clone() for name, p in network.named_parameters() if name.startswith("generator")}
    network.zero_grad()
    fixed = generated.detach()
    loss = discriminator_loss(discriminate(real), discriminate(fixed), game)
    (loss + 2.0 * penalty(discriminate, real, fixed, game)).mean().backward()
    apart |= {name: p.grad.clone() for name, p in network.named_parameters() if name.startswith("discriminator")}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], atol=1e-5, rtol=1e-4, msg=name)


def test_it_learns_how_scans_vary(tmp_path: Path, cases: list[Case]) -> None:
    config = gan_config(steps=400)
    prior = train(cases, config, tmp_path, device="cpu")
    drawn = prior.sample([torch.Generator().manual_seed(seed) for seed in range(8)])
    fresh = GanPrior.untrained(config, {}).sample([torch.Generator().manual_seed(seed) for seed in range(8)])
    crops = torch.stack([Samples(cases, config)[number].crop.image for number in range(64)])
    assert abs(float(drawn.std() - crops.std())) < 0.5 * abs(float(fresh.std() - crops.std()))
    assert 0.5 < rows(tmp_path)[-1]["validation"]["diversity"] < 1.5


def test_what_is_lost_is_told() -> None:
    assert burst([1.0] * 10 + [40.0]) == ""
    assert burst([1.0] * 5 + [60.0]) == ""
    assert "60 times" in burst([1.0] * 10 + [60.0])
    assert lost({"reconstruction_psnr": 20.0, "latents_in_use": 3}) == ""
    assert "posterior collapse" in lost({"latents_in_use": 0})
    assert "mode collapse" in lost({"diversity": 0.1, "logit_real": 1.0, "logit_generated": 0.0})
    assert "tells all samples" in lost({"diversity": 0.9, "logit_real": 9.0, "logit_generated": -9.0})
