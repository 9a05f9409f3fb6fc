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


@pytest.mark.parametrize("game", ["nonsaturating", "wasserstein"])
def test_an_interrupted_run_is_resumed(game: str, tmp_path: Path, cases: list[Case]) -> None:
    def stop(state: Any) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    config = gan_config(game=game, spectral_norm=game == "wasserstein")
    train(cases, config, tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(cases, config, tmp_path / "broken", device="cpu", progress=stop)
    torch.manual_seed(5)
    train(cases, config, tmp_path / "broken", device="cpu", resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_the_averaged_discriminator_is_normalised_too(tmp_path: Path, cases: list[Case]) -> None:
    """Its layers have a largest singular value of about 1, as those that are trained have."""
    prior = train(cases, gan_config(steps=60, spectral_norm=True), tmp_path, device="cpu")
    layers = prior.network.discriminator.modules()
    weights = [each.weight.flatten(1) for each in layers if isinstance(each, torch.nn.Conv3d | torch.nn.Linear)]
    assert len(weights) >= 3
    for weight in weights:
        assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=0.2)


def test_a_critic_has_no_logits(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, gan_config(game="wasserstein", penalty=10), tmp_path, device="cpu")
    assert set(rows(tmp_path)[-1]["validation"]) == {"critic_real", "critic_generated", "diversity"}


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

    sum(loss.mean() for loss in network(real, noise, game, 2.0)).backward()
    together = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    generated = network.generator(noise)
    network.zero_grad()
    generator_loss(discriminate(generated), game).mean().backward()
    apart = {name: p.grad.clone() for name, p in network.named_parameters() if name.startswith("generator")}
    network.zero_grad()
    fixed = generated.detach()
    loss = discriminator_loss(discriminate(real), discriminate(fixed), game)
    share = (1000 * noise.sum(dim=1) % 1)[:, None, None, None, None]
    at = (1 - share) * real + share * fixed if game == "wasserstein" else real
    (loss + 2.0 * penalty(discriminate, at, game)).mean().backward()
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
    assert "tells all samples" in lost({"dark_logit_real": 9.0, "dark_logit_generated": -9.0})
    assert lost({"critic_real": 90.0, "critic_generated": -90.0}) == ""
