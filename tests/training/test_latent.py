"""Latent diffusion: an autoencoder first, then the diffusion on its latents; one command, one file, one resume."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from prior_factory import grid, head, random_prior, saved, tiny_config
from torch.distributions import Normal, kl_divergence
from toy_runs import assert_same_run, rows, toy_cases

from medfusion.config import Config
from medfusion.data.crops import Case, Crop
from medfusion.errors import MedfusionError
from medfusion.io import write_nifti
from medfusion.io.training_set import TrainingCase
from medfusion.networks import Autoencoder, on_latents
from medfusion.prior import DiffusionPrior, Prior
from medfusion.tasks.denoise import denoise_volume
from medfusion.tasks.draw_case import draw_case, read_parent
from medfusion.tasks.place import Here, seen_by
from medfusion.tasks.rebuild import examine
from medfusion.training import memory, train
from medfusion.training.batches import Samples, Shown
from medfusion.training.meter import State
from medfusion.training.objective import autoencoder_loss
from medfusion.training.stages import Diffusion, Stage, autoencoding
from medfusion.volume import Volume

TIME = torch.tensor([0.3], dtype=torch.float64)


def latent_config(**autoencoder: float) -> Config:
    shape = {"channels": (8, 16), "latents": 2, "steps": 4, "batch": 1, "learning_rate": 3e-3} | autoencoder
    return Config.model_validate(tiny_config().model_dump() | {"autoencoder": shape})


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return toy_cases()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cases: list[Case]) -> tuple[Prior, Path]:
    out = tmp_path_factory.mktemp("latent")
    return train(cases, latent_config(), out, data="five phantoms", device="cpu"), out


def test_one_run_leaves_one_prior_with_its_autoencoder(trained: tuple[Prior, Path]) -> None:
    prior, out = trained
    assert [row["step"] for row in rows(out / "autoencoder") if "loss" in row] == [2, 4]
    assert imread(out / "autoencoder" / "pictures" / "step_0000004.png").shape[:2] == (16, 7 * 16)
    assert imread(out / "pictures" / "step_0000004.png").shape[:2] == (16, 64)
    again, x = Prior.load(out / "prior.safetensors"), torch.randn(1, 1, 17, 15, 22)
    assert again.autoencoder is not None
    latents = prior.latents(x)
    assert latents.shape == (1, 2, 9, 8, 11)
    torch.testing.assert_close(again.latents(x), latents, atol=0.02, rtol=0.02)  # half precision on the disk
    assert again.images(latents, x.shape[2:]).shape == x.shape
    assert prior.denoiser(torch.zeros(1, 4, 9, 8, 11))(latents, TIME).shape == latents.shape
    card = (out / "card.md").read_text()
    assert f"rebuilt at {prior.provenance['reconstruction_psnr']:.2f} dB" in card
    assert "Denoising" not in card


def test_latents_have_unit_variance_over_the_training_crops(trained: tuple[Prior, Path], cases: list[Case]) -> None:
    prior, _ = trained
    crops = torch.stack([Samples(cases[:4], prior.config)[number].crop.image for number in range(64)])
    assert float(prior.latents(crops).std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("step", [2, 5], ids=["in the autoencoder", "in the diffusion"])
def test_an_interrupted_run_is_resumed_in_either_stage(
    tmp_path: Path, trained: tuple[Prior, Path], cases: list[Case], step: int
) -> None:
    def interrupt(state: State) -> None:
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(cases, latent_config(), tmp_path, device="cpu", progress=interrupt)
    assert (tmp_path / "checkpoint.pt").exists() == (step > 4)
    seen: list[int] = []
    train(cases, latent_config(), tmp_path, device="cpu", resume=True, progress=lambda state: seen.append(state.step))
    assert seen == list(range(step + 1, 9))
    _, unbroken = trained
    assert_same_run(tmp_path, unbroken)
    assert_same_run(tmp_path / "autoencoder", unbroken / "autoencoder")


def test_a_new_run_is_not_resumed_from_the_diffusion_of_an_earlier_one(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, latent_config(), tmp_path, device="cpu")

    def interrupt(state: State) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(cases, latent_config(), tmp_path, device="cpu", progress=interrupt)
    assert not (tmp_path / "checkpoint.pt").exists()
    with pytest.raises(MedfusionError, match="another config"):
        train(cases, latent_config(blocks=2), tmp_path, device="cpu", resume=True)


def test_the_autoencoder_learns_to_rebuild(tmp_path: Path, cases: list[Case]) -> None:
    prior = train(cases, latent_config(steps=600, learning_rate=1e-3), tmp_path, device="cpu")
    assert prior.provenance["reconstruction_psnr"] > 16  # the mean of the crop alone reaches 14.2


def test_its_loss_is_the_bound_whose_beta_rises() -> None:
    config, generator = latent_config(beta=3, beta_warmup=0.5), torch.Generator().manual_seed(0)
    network = Autoencoder((8, 16), 1, 2)
    image, noise = (torch.randn(2, c, n, n, n, generator=generator) for c, n in ((1, 16), (2, 8)))
    crop = Crop(image, torch.zeros(2, 4, 8, 8, 8), None, torch.full((2,), -1))
    mean, deviation = network.kl.encode(image)
    torch.nn.init.constant_(network.spread, -0.02)
    spread = network.log_spread.exp()
    likelihood = Normal(network.kl.decode(mean + deviation * noise), spread).log_prob(image).flatten(1).sum(1)
    nats = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).flatten(1).sum(1)
    for share, beta in ((0.0, 0), (0.25, 1.5), (0.5, 3), (1.0, 3)):
        loss = autoencoder_loss(network, config, Shown(crop, noise, torch.ones(2)), share)
        expected = -(likelihood - beta * nats) / 16**3
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)  # bfloat16 where it is native


def test_without_divergence_there_is_no_noise() -> None:
    config, generator = latent_config(beta=0), torch.Generator().manual_seed(0)
    network = Autoencoder((8, 16), 1, 2)
    image, noise = (torch.randn(2, c, n, n, n, generator=generator) for c, n in ((1, 16), (2, 8)))
    crop = Crop(image, torch.zeros(2, 4, 8, 8, 8), None, torch.full((2,), -1))
    quiet, loud = (
        autoencoder_loss(network, config, Shown(crop, scale * noise, torch.ones(2)), 1.0) for scale in (0, 9)
    )
    torch.testing.assert_close(quiet, loud)


def test_what_is_known_lies_on_the_latents() -> None:
    line = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 1, 6, 6, 6)
    labels = torch.arange(11).view(1, 11, 1, 1).expand(1, 11, 12, 12)
    context, middles = on_latents(line, labels, 4)
    assert context is not None
    assert middles is not None
    assert context[0, 0, :, 0, 0].tolist() == [1.5, 4.5]
    assert middles[0, :, 0, 0].tolist() == [2, 6, 10]
    assert middles.shape == (1, 3, 3, 3)
    assert on_latents(None, None, 4) == (None, None)


def test_labels_and_positions_may_be_told() -> None:
    config = latent_config().model_dump()
    config["network"] |= {"labels": 3}
    config["data"] |= {"labels": "*_seg.nii.gz"}
    plain = random_prior(config=Config.model_validate(config))
    prior = DiffusionPrior(plain.config, plain.network, {}, autoencoding(plain.config).build().requires_grad_(False))
    x = prior.latents(torch.randn(1, 1, 20, 16, 18))
    labels = torch.randint(0, 3, (1, 20, 16, 18))
    told = prior.denoiser(torch.randn(1, 4, 10, 8, 9), labels)(x, TIME)
    assert told.shape == x.shape == (1, 2, 10, 8, 9)
    assert not torch.allclose(told, prior.denoiser()(x, TIME))


def test_tasks_work_on_latents_or_say_that_they_do_not(trained: tuple[Prior, Path], tmp_path: Path) -> None:
    prior, _ = trained
    affine, shape = grid((41, 40, 38)), (41, 40, 38)
    scan = Volume(head(affine, shape, noise=5), affine, "scan")
    write_nifti(scan, tmp_path / "scan.nii.gz")
    parent = read_parent(TrainingCase("scan", tmp_path / "scan.nii.gz", None, "scan"), prior)
    assert draw_case(parent, prior, None, name="new", steps=2).shape == shape
    seen = seen_by(prior, scan)
    here = Here(seen.volume.array, np.ones(shape, np.float32), np.ones(shape, bool))
    for method in ("plain", "default", "autoencoder"):
        found = examine(seen, here, prior, method, stripped=False, seed=0)
        assert found.rebuilt.shape == seen.volume.shape
        assert np.isfinite(found.raw).all()
    with pytest.raises(MedfusionError, match="a latent prior does not denoise"):
        denoise_volume(scan, prior)
    assert Prior.load(saved(prior, tmp_path)).name == "tiny"


def _need(stage: Stage) -> int:
    return memory.step_bytes(stage, 1, torch.device("cpu"))


def test_each_stage_is_told_its_own_settings_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cases: list[Case]
) -> None:
    """Before the first step of the first stage: nobody waits for an autoencoder only to be refused."""
    large = latent_config(batch=64)
    need = _need(autoencoding(large))
    monkeypatch.setattr(memory, "available", lambda device: need - 1)
    with pytest.raises(MedfusionError, match="a training step needs about") as error:
        train(cases, large, tmp_path, device="cpu")
    assert "autoencoder.batch" in error.value.facts
    assert {"training.batch", "training.accumulate", "training.recompute"}.isdisjoint(error.value.facts)
    large = latent_config()
    large = large.model_copy(update={"training": large.training.model_copy(update={"batch": 512})})
    need = _need(Diffusion(large, autoencoding(large).build()))
    with pytest.raises(MedfusionError, match="a training step needs about") as error:
        train(cases, large, tmp_path, device="cpu")
    assert {"training.batch", "training.accumulate"} <= set(error.value.facts)
    assert not (tmp_path / "autoencoder").exists()


def test_the_encoder_counts() -> None:
    config = latent_config()
    with_encoder = memory.bytes_beside(Diffusion(config, autoencoding(config).build()), 16**3)
    assert with_encoder > 2 * 8 * 16**3 * 4  # input and output of a layer of eight channels at full resolution
    assert memory.bytes_beside(Diffusion(config), 16**3) == 0


def test_a_refused_run_leaves_the_earlier_prior(tmp_path: Path, cases: list[Case]) -> None:
    (tmp_path / "prior.safetensors").write_bytes(b"precious")
    with pytest.raises(MedfusionError, match="leave none to train on"):
        train(cases[:1], latent_config(), tmp_path, device="cpu")
    assert (tmp_path / "prior.safetensors").read_bytes() == b"precious"


def test_settings_of_the_second_stage_may_change_after_the_first(tmp_path: Path, cases: list[Case]) -> None:
    def interrupt(state: State) -> None:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(cases, latent_config(), tmp_path, device="cpu", progress=interrupt)
    tree = latent_config().model_dump()
    tree["network"]["channels"] = (8, 8)
    tree["training"]["batch"] = 4
    seen: list[int] = []
    changed = Config.model_validate(tree)
    train(cases, changed, tmp_path, device="cpu", resume=True, progress=lambda state: seen.append(state.step))
    assert seen == [5, 6, 7, 8]


def test_parts_and_labels_in_both_stages(tmp_path: Path) -> None:
    labelled = [replace(case, labels=(case.image > 0).byte()) for case in toy_cases()]
    tree = latent_config(batch=3).model_dump()
    tree["network"] |= {"labels": 2}
    tree["data"] |= {"labels": "*_seg.nii.gz"}
    tree["training"] |= {"batch": 4, "accumulate": 2}
    prior = train(labelled, Config.model_validate(tree), tmp_path, device="cpu")
    x = prior.latents(torch.randn(1, 1, 16, 16, 16))
    assert prior.denoiser(labels=torch.ones(1, 16, 16, 16).long())(x, TIME).shape == x.shape
