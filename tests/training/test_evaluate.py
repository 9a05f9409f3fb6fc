"""What a run shows of itself: losses at fixed times, decibels, a picture, and a card that says what was measured."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from prior_factory import conditional_prior, random_prior, tiny_config, white_prior
from toy_runs import toy_cases

from medfusion.data.crops import Crop, validation_crops
from medfusion.prior import DiffusionPrior
from medfusion.training import train
from medfusion.training.card import model_card
from medfusion.training.evaluate import VALIDATION_TIMES, denoising_psnr, picture
from medfusion.training.stages import Diffusion


@pytest.fixture(scope="module")
def crops() -> list[Crop]:
    return validation_crops(toy_cases(2), tiny_config().data, 0)


def test_the_loss_of_a_network_that_answers_zero_is_that_of_v(crops: list[Crop]) -> None:
    """V = alpha eps - sigma x_0, so its mean square is alpha^2 + sigma^2 <x_0^2> up to the noise of 16^3 voxels."""
    prior = white_prior()
    stage = Diffusion(prior.config)
    losses = stage.validate(prior.network, crops)
    power = float(torch.stack([crop.image.square().mean() for crop in crops]).mean())
    for time in VALIDATION_TIMES:
        alpha, sigma = (float(f(torch.tensor(time))) for f in (prior.process.alpha, prior.process.sigma))
        assert losses[f"{time:g}"] == pytest.approx(alpha**2 + sigma**2 * power, rel=0.05)
    assert stage.validate(prior.network, crops) == losses


def test_decibels_are_those_of_the_noise_and_of_the_posterior_mean(crops: list[Crop]) -> None:
    """The prior of white noise shrinks by alpha^2: its error in closed form is sigma^2 x_0 off plus alpha sigma eps."""
    for level, measured in denoising_psnr(white_prior(), crops).items():
        noise = 2 * float(level)
        alpha = 1 / np.sqrt(1 + noise**2)
        assert measured["noisy"] == pytest.approx(10 * np.log10(4 / noise**2), abs=0.15)
        inside = torch.cat([crop.image[crop.image > -0.8] for crop in crops])
        error = float(((1 - alpha**2) * inside).square().mean()) + (alpha**2 * noise) ** 2
        assert measured["denoised"] == pytest.approx(10 * np.log10(4 / error), abs=0.3)


def test_levels_that_a_process_does_not_reach_are_left_out(tmp_path: Path, crops: list[Crop]) -> None:
    prior = random_prior(config=tiny_config(process={"family": "ve", "sigma_max": 0.15}))
    assert list(denoising_psnr(prior, crops)) == ["0.05"]
    picture(prior, crops, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[:2] == (32, 64)


def test_crops_without_tissue_have_no_decibels() -> None:
    air = Crop(torch.full((1, 1, 16, 16, 16), -1.0), torch.zeros(1, 4, 8, 8, 8), None, torch.tensor([-1]))
    assert all(np.isnan(list(pair.values())).all() for pair in denoising_psnr(white_prior(), [air]).values())


def test_a_picture_has_a_row_for_each_crop_and_the_clean_slice_first(tmp_path: Path, crops: list[Crop]) -> None:
    picture(random_prior(), crops, tmp_path / "new" / "a.png")
    image = imread(tmp_path / "new" / "a.png")[..., 0]
    assert image.shape == (2 * 16, 4 * 16)
    clean = (crops[0].image[0, 0, :, :, 8].T.flip(0).clamp(-1, 1) + 1) / 2
    np.testing.assert_allclose(image[:16, :16], clean, atol=1.5 / 255)


def test_a_picture_of_a_prior_with_labels_and_classes(tmp_path: Path) -> None:
    labels = torch.randint(0, 3, (1, 16, 16, 16))
    crop = Crop(torch.zeros(1, 1, 16, 16, 16), torch.zeros(1, 4, 8, 8, 8), labels, torch.tensor([1]))
    picture(conditional_prior(), [crop], tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[:2] == (16, 64)


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    config = tiny_config(training={"batch": 2, "optimizer": "muon"}).model_copy(
        update={"licence": "CC0", "notes": "Phantoms only."}
    )
    prior = train(toy_cases(), config, tmp_path, data="five phantoms", device="cpu")
    card, about = (tmp_path / "card.md").read_text(encoding="utf-8"), prior.provenance
    table = dict(re.findall(r"^\| (\w[^|]*) \| ([^|]*) \|$", card, re.MULTILINE))
    assert table["Data"] == "five phantoms: 4 scans trained on, 1 held out for validation"
    assert table["Licence of the weights"] == "CC0"
    assert table["Training"].startswith(
        f"4 steps of 2 crops of 16^3 voxels, muon, {about['hours']:.1f} hours on 1 x CPU"
    )
    assert "channels [8, 16]" in table["Network"]
    assert "told position and kind of image" in table["Network"]
    assert table["Made"] == f"{about['trained']} with medfusion {about['medfusion']}, torch {about['torch']}"
    numbers = {
        "loss": [str(value) for value in about["validation_loss"].values()],
        "noise": ["5%", "10%", "20%"],
        "noisy": [f"{pair['noisy']:.2f}" for pair in about["denoising_psnr"].values()],
        "denoised": [f"{pair['denoised']:.2f}" for pair in about["denoising_psnr"].values()],
    }
    for name, values in numbers.items():
        assert f"| {name} | {' | '.join(values)} |" in card
    assert card.rstrip().endswith("Phantoms only.")
    held_out = validation_crops([c for c in toy_cases() if c.name not in _trained(config)], config.data, 0)
    assert about["denoising_psnr"] == denoising_psnr(prior, held_out)
    assert model_card(DiffusionPrior(config, prior.network, about)) == card


def _trained(config) -> set[str]:
    from medfusion.data.crops import split

    return {case.name for case in split(toy_cases(), config.data.validation, config.training.seed)[0]}
