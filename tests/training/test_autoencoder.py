"""Autoencoders as a family of their own: trained by the same loop, read by the same ``Prior.load``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from prior_factory import grid, head, random_prior, saved, tiny_config
from toy_runs import rows, toy_cases

from medfusion.config import Config
from medfusion.data.crops import Case, validation_crops
from medfusion.errors import MedfusionError
from medfusion.prior import AutoencoderPrior, DiffusionPrior, Prior, build_autoencoder
from medfusion.tasks.denoise import denoise_volume
from medfusion.training import train
from medfusion.training.evaluate import reconstruction_picture
from medfusion.training.watch import lost
from medfusion.volume import Volume

STEP = 2 / 255  # matplotlib cuts a grey value off twice: to the colour map, and to bytes


def vae_config(**autoencoder: Any) -> Config:
    shape = {"channels": (8, 16, 16), "latents": 3} | autoencoder
    tree = tiny_config(training={"steps": 4}).model_dump() | {"family": "autoencoder", "autoencoder": shape}
    return Config.model_validate(tree)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return toy_cases()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cases: list[Case]) -> Path:
    out = tmp_path_factory.mktemp("vae")
    train(cases, vae_config(), out, data="five phantoms", device="cpu")
    return out


def test_a_run_leaves_a_prior_with_its_card(run: Path) -> None:
    prior = Prior.load(run / "prior.safetensors")
    assert isinstance(prior, AutoencoderPrior)
    assert prior.kind == "a VAE"
    found = rows(run)[-1]["validation"]
    assert set(found) == {"elbo_nats", "bits_per_voxel", "divergence_nats", "reconstruction_psnr"}  # of one crop
    assert prior.provenance["validation_loss"] == found
    card = (run / "card.md").read_text()
    assert "| Family | a VAE |" in card
    assert f"| elbo_nats | {found['elbo_nats']} |" in card
    assert "Process" not in card
    assert not (run / "autoencoder").exists()


def test_what_it_can_do(run: Path) -> None:
    prior, x = Prior.load(run / "prior.safetensors"), torch.randn(2, 1, 17, 15, 22)
    code = prior.encode(x)
    assert code.shape == (2, 3, 5, 4, 6)
    assert prior.decode(code, x.shape[2:]).shape == x.shape
    torch.testing.assert_close(prior.reconstruct(x), prior.decode(code, x.shape[2:]))
    one, two = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    drawn = prior.sample([one, two])
    assert drawn.shape == (2, 1, 16, 16, 16)
    torch.testing.assert_close(drawn[:1], prior.sample([torch.Generator().manual_seed(1)]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn[0], drawn[1])


def test_what_it_cannot_do_is_said(run: Path, tmp_path: Path) -> None:
    prior = Prior.load(run / "prior.safetensors")
    with pytest.raises(MedfusionError, match="is a VAE, which has no denoiser"):
        prior.denoiser()
    affine, shape = grid((40, 40, 40)), (40, 40, 40)
    with pytest.raises(MedfusionError, match="is a VAE, which has no"):
        denoise_volume(Volume(head(affine, shape, noise=5), affine, "head"), prior)
    with pytest.raises(MedfusionError, match="is a VAE, and a prior of another family is needed"):
        DiffusionPrior.load(run / "prior.safetensors")
    plain = AutoencoderPrior.untrained(vae_config(beta=0), {})
    with pytest.raises(MedfusionError, match="is a plain autoencoder, which has no way to sample"):
        plain.sample([torch.Generator()])
    with pytest.raises(MedfusionError, match="is a diffusion prior, and a prior of another family"):
        AutoencoderPrior.load(saved(random_prior(), tmp_path))
    assert AutoencoderPrior.untrained(vae_config(beta=4), {}).kind == "a beta-VAE with beta 4"


def test_an_interrupted_run_is_resumed(run: Path, tmp_path: Path, cases: list[Case]) -> None:
    def stop(state: Any) -> None:
        if state.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cases, vae_config(), tmp_path, device="cpu", progress=stop)
    train(cases, vae_config(), tmp_path, device="cpu", resume=True)
    whole, resumed = (Prior.load(out / "prior.safetensors").network.state_dict() for out in (run, tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(MedfusionError, match=r"autoencoder\.beta"):
        train(cases, vae_config(beta=2), tmp_path, device="cpu", resume=True)


def test_latents_that_tell_nothing_are_told_of(tmp_path: Path, cases: list[Case]) -> None:
    """The divergence weighs so much that the encoder gives up: posterior collapse."""
    tree = vae_config(beta=1e4, beta_warmup=0).model_dump()
    tree["training"] |= {"steps": 60, "checkpoint_every": 60, "validate_every": 60, "learning_rate": 1e-2}
    tree["data"]["validation"], said = 2, []
    train(cases, Config.model_validate(tree), tmp_path, device="cpu", say=said.append)
    assert rows(tmp_path)[-1]["validation"]["latents_in_use"] == 0
    assert said[1:] == [f"Caution  step 60: {lost({'latents_in_use': 0})}"]


def test_configs_that_make_no_sense() -> None:
    tree = tiny_config().model_dump() | {"family": "autoencoder"}
    with pytest.raises(ValueError, match="needs the section autoencoder"):
        Config.model_validate(tree)
    with pytest.raises(ValueError, match="no multiple of 32"):
        vae_config(channels=[8] * 6)
    tree = vae_config().model_dump()
    with pytest.raises(ValueError, match="starts from random weights"):
        Config.model_validate(tree | {"training": tree["training"] | {"start": "brain-t1"}})
    with pytest.raises(ValueError, match="the family gan has no section autoencoder"):
        Config.model_validate(tree | {"family": "gan", "gan": {"channels": (8, 16)}})


def test_a_plain_one_tells_of_no_bound(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, vae_config(beta=0), tmp_path, device="cpu")
    assert set(rows(tmp_path)[-1]["validation"]) == {"reconstruction_psnr"}


def test_the_picture_shows_what_single_latents_do(tmp_path: Path, cases: list[Case]) -> None:
    """Of a crop a row: itself, rebuilt, and five values of a latent, the middle one of which is the crops' mean."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder(vae_config())
    crops = validation_crops(cases[:2], vae_config().data, seed=0)
    reconstruction_picture(autoencoder, crops, tmp_path / "picture.png")
    shown = imread(tmp_path / "picture.png")[..., 0].reshape(2, 16, 7, 16).transpose(0, 2, 1, 3)  # (row, column, y, x)
    np.testing.assert_allclose(shown[:, 0], [_as_shown(crop.image) for crop in crops], atol=STEP)
    code = torch.cat([autoencoder.encode(crop.image) for crop in crops])
    latent = code.mean(dim=(2, 3, 4)).std(dim=0).argmax()
    moved = code[:1].clone()
    moved[:, latent] = code[:, latent].mean()
    np.testing.assert_allclose(shown[0, 1], _as_shown(autoencoder.decode(code[:1])), atol=STEP)
    np.testing.assert_allclose(shown[0, 4], _as_shown(autoencoder.decode(moved)), atol=STEP)
    assert not np.allclose(shown[0, 2], shown[0, 6], atol=2 * STEP)


def _as_shown(image: torch.Tensor) -> Any:
    """The middle slice (y, x) of an image as a PNG has it, black 0 and white 1."""
    return (image.detach()[0, 0, :, :, 8].T.flip(0).clamp(-1, 1).numpy() + 1) / 2
