"""A prior adapted to noisy phantoms comes closer to the clean ones, which it has never seen, or is left as it was."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from prior_factory import grid, head, random_prior, saved, white_prior, write_head

from medfusion.diffusion import residual
from medfusion.errors import MedfusionError
from medfusion.prior import Prior
from medfusion.tasks import adapt as adapting
from medfusion.tasks.adapt import adapt, adapt_prior
from medfusion.tasks.denoise import denoise_volume
from medfusion.tasks.noise import Noise
from medfusion.volume import Volume

SIGMA = 100.0
NOISE = Noise(SIGMA)
SHAPE = (48, 48, 48)
OPTIONS = {"sigma": SIGMA, "kind": "gaussian", "device": "cpu"}


def scan(seed: int = 0, *, noise: float = SIGMA, shape: tuple[int, ...] = SHAPE) -> Volume:
    return Volume(head(grid(shape), shape, noise=noise, seed=seed), grid(shape), f"scan {seed}")


def weights(prior: Prior) -> torch.Tensor:
    return torch.cat([p.flatten() for p in prior.network.parameters()]).clone()


def true_error(prior: Prior, noisy: Volume) -> float:
    """Over the noise's."""
    result = denoise_volume(noisy, prior, noise=NOISE).volume.array
    return float(np.mean((result - scan(noise=0).array) ** 2) / SIGMA**2)


def two_heads(folder: Path) -> Path:
    for seed, name in enumerate("ab"):
        write_head(folder / f"{name}.nii.gz", noise=SIGMA, seed=seed, size=48)
    return folder


@pytest.mark.parametrize("prior", [white_prior(), random_prior()], ids=["white", "random"])
def test_the_true_error_falls_on_scans_learnt_from_and_on_another(prior: Prior) -> None:
    found = adapt([scan(0), scan(1)], [NOISE, NOISE], prior, 0.05)
    assert found.kept
    assert found.steps > 0
    assert found.before > found.after
    assert found.prior.provenance.items() > prior.provenance.items()
    assert found.prior.provenance["adapted_from"] == prior.name
    assert found.prior.provenance["adapted_steps"] == found.steps
    assert not any(p.requires_grad for p in found.prior.network.parameters())
    for noisy in (scan(0), scan(2)):
        assert true_error(found.prior, noisy) < true_error(prior, noisy)


def test_without_time_the_prior_is_the_one_given() -> None:
    prior = random_prior()
    found = adapt([scan(0), scan(1)], [NOISE, NOISE], prior, 0.0)
    assert (found.steps, found.kept, found.prior) == (0, False, prior)
    assert found.before == found.after


def test_without_gain_the_prior_is_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "RATE", 0.0)
    prior = random_prior()
    found = adapt([scan(0), scan(1)], [NOISE, NOISE], prior, 0.01)
    assert found.steps > 0
    assert (found.kept, found.prior) == (False, prior)


def test_steps_that_do_harm_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "RATE", 0.3)
    prior = random_prior()
    before = weights(prior)
    found = adapt([scan(0), scan(1)], [NOISE, NOISE], prior, 0.01)
    assert found.after > found.before
    assert (found.kept, found.prior) == (False, prior)
    assert torch.equal(weights(prior), before)


def test_the_estimated_error_is_the_true_one() -> None:
    prior, clean, noisy = random_prior(), scan(noise=0).array / 475 - 1, scan().array / 475 - 1
    y, x0 = (torch.from_numpy(a).float()[None, None] for a in (noisy, clean))
    with torch.no_grad():
        found = residual(prior.denoiser(), y, SIGMA / 475, [torch.Generator().manual_seed(0)])
    truth = float((found.x0 - x0).square().mean()) / (SIGMA / 475) ** 2
    assert truth > 0.2
    assert float(found.risk.mean()) == pytest.approx(truth, rel=0.05)


def test_no_voxel_is_learnt_from_and_judged_by() -> None:
    """Every voxel has a value of its own, so that it is known again."""
    values = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    ramp = Volume(np.where(scan(noise=0).array > 0, 1e6, 0).astype(np.float32) + values, grid(SHAPE), "ramp")
    judged, learnt = (
        {float(v) for block in side for v in block.y[block.counted]}
        for side in adapting._blocks(ramp, Noise(2e5), white_prior())
    )
    assert len(judged) > 1000
    assert len(learnt) > 1000
    assert not judged & learnt


@pytest.mark.parametrize(("sigma", "number"), [(SIGMA, 12), (1.0, 0)])
def test_too_few_blocks_are_refused(sigma: float, number: int) -> None:
    with pytest.raises(MedfusionError, match=f"^{number} blocks of tissue with noise: too few to adapt") as error:
        adapt([scan()], [Noise(sigma)], white_prior(), 1.0)
    assert error.value.facts["least"] == adapting.FEWEST


def test_a_map_of_a_zero_filled_scan_lies_on_the_acquired_grid() -> None:
    shape = (64, 64, 64)
    noise = Noise(SIGMA, map=np.full(SHAPE, SIGMA, np.float32), acquired=SHAPE)
    found = adapt([scan(k, shape=shape) for k in (0, 1)], [noise] * 2, white_prior(), 0.0)
    assert found.before > 0


def test_a_file_that_loads(tmp_path: Path) -> None:
    name = saved(random_prior(), tmp_path)
    source, input, output = Path(name).read_bytes(), two_heads(tmp_path / "in"), tmp_path / "adapted.safetensors"
    (input / "broken.nii.gz").write_bytes(b"no scan")
    found = adapt_prior(input, output, minutes=0.02, prior=name, **OPTIONS)
    loaded = Prior.load(output)
    assert found.kept
    assert loaded.provenance == found.prior.provenance
    assert loaded.provenance["adapted_scans"] == 2
    torch.testing.assert_close(weights(loaded), weights(found.prior), rtol=1e-3, atol=1e-6)
    assert not torch.equal(weights(loaded), weights(Prior.load(name)))
    assert Path(name).read_bytes() == source
    assert len(found.left_out) == 1
    assert found.left_out[0].startswith("broken: ")
    made = output.read_bytes()
    with pytest.raises(MedfusionError, match=r"adapted\.safetensors: the output exists already"):
        adapt_prior(input, output, minutes=60.0, prior=name, **OPTIONS)
    assert output.read_bytes() == made
    adapt_prior(input, output, minutes=0.0, prior=name, overwrite=True, **OPTIONS)
    assert torch.equal(weights(Prior.load(output)), weights(Prior.load(name)))  # written, changed or not


def test_an_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    name, input = saved(white_prior(), tmp_path), two_heads(tmp_path / "in")
    with pytest.raises(MedfusionError, match="the output lies inside the input"):
        adapt_prior(input, input / "adapted.safetensors", minutes=60.0, prior=name, **OPTIONS)
    assert not list(input.glob("*.safetensors"))


def test_nothing_to_adapt_to(tmp_path: Path) -> None:
    name, input = saved(white_prior(), tmp_path), tmp_path / "in"
    input.mkdir()
    (input / "broken.nii.gz").write_bytes(b"no scan")
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 40, 40), np.int16), np.eye(4)), input / "slab.nii.gz")
    with pytest.raises(MedfusionError, match="no scan that a prior can be adapted to") as error:
        adapt_prior(input, tmp_path / "out" / "adapted.safetensors", minutes=60.0, prior=name, **OPTIONS)
    assert str(error.value.facts["first"]).startswith("broken: ")
    assert not (tmp_path / "out" / "adapted.safetensors").exists()
