"""CycleGANs as a family: two domains, four networks, one loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prior_factory import tiny_config
from toy_runs import rows, toy_cases

from medfusion.config import Config
from medfusion.data.crops import Case, Pairs, paired, split, validation_crops
from medfusion.errors import MedfusionError
from medfusion.networks import CycleGan
from medfusion.prior import CycleGanPrior, Prior
from medfusion.training import train


def cyclegan_config(steps: int = 4, **cyclegan: Any) -> Config:
    shape = {"domains": [{"name": "dark"}, {"name": "bright"}], "channels": (8, 16), "layers": 1} | cyclegan
    settings = {"steps": steps, "batch": 2, "optimizer": "adversarial", "learning_rate": 2e-3, "checkpoint_every": 100}
    tree = tiny_config(training=settings).model_dump() | {"family": "cyclegan", "cyclegan": shape}
    return Config.model_validate(tree)


def two_domains() -> list[Case]:
    """Heads, and other heads whose intensities are 0.8 brighter."""
    dark, bright = toy_cases(6)[:3], toy_cases(6)[3:]
    dark = [replace(case, class_index=0) for case in dark]
    return dark + [replace(case, class_index=1, image=(case.image.float() + 0.8).half()) for case in bright]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[CycleGanPrior, Path]:
    out = tmp_path_factory.mktemp("cyclegan")
    prior = train(two_domains(), cyclegan_config(150, cycle=1, identity=0.2), out, data="six phantoms", device="cpu")
    assert isinstance(prior, CycleGanPrior)
    return prior, out


def test_it_learns_what_tells_the_domains_apart(trained: tuple[CycleGanPrior, Path]) -> None:
    prior, out = trained
    dark = torch.stack([case.image.float() for case in two_domains()[:3]])[:, None, 4:36, 4:36, 4:36]
    brighter = prior.translate(dark, "bright")
    assert float((brighter - dark).mean()) > 0.4
    assert float((prior.translate(dark + 0.8, "dark") - dark).mean()) < 0.4
    assert float((prior.translate(brighter, "dark") - dark).abs().mean()) < 0.2
    assert prior.translate(dark[..., :13, :14, :15], "bright").shape[2:] == (13, 14, 15)
    found = rows(out)[-1]["validation"]
    assert found["dark_change"] > 0.4
    assert found["dark_cycle_error"] < 0.2


def test_a_run_leaves_a_prior_with_its_card(trained: tuple[CycleGanPrior, Path]) -> None:
    prior, out = trained
    again = Prior.load(out / "prior.safetensors")
    x = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(again.translate(x, "dark"), prior.translate(x, "dark"), atol=0.02, rtol=0.02)
    assert "| Family | a CycleGAN |" in (out / "card.md").read_text()
    with pytest.raises(MedfusionError, match="does not know grey"):
        again.translate(x, "grey")
    with pytest.raises(MedfusionError, match="is a CycleGAN, which has no way to sample"):
        again.sample([torch.Generator()])


def test_it_begins_as_the_identity() -> None:
    prior, x = CycleGanPrior.untrained(cyclegan_config(), {}), torch.randn(2, 1, 16, 16, 16)
    torch.testing.assert_close(prior.translate(x, "bright"), x)


def test_each_network_has_the_gradient_of_its_own_loss() -> None:
    """As separate backward passes give it, in the form of the paper's equations 1 to 3 and section 5.2."""
    torch.manual_seed(0)
    network = CycleGan((8, 16), 1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pairs = torch.randn(3, 2, 16, 16, 16)
    network(pairs, 10.0, 5.0, 2.0).mean().backward()
    together = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    (to_b, to_a), (judge_a, judge_b) = network.translators, network.discriminators
    a, b = pairs[:, :1], pairs[:, 1:]

    entropy = torch.nn.BCEWithLogitsLoss()  # over patches and images alike

    def fooled(judge: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return entropy(judge(x)[-1], torch.ones_like(judge(x)[-1]))

    def slope(judge: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        logits = judge(x)[-1]
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return gradient.square().sum() / (logits.numel() / len(x)) / len(x)

    def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).abs().flatten(1).mean(dim=1)

    translated = fooled(judge_b, to_b(a)) + fooled(judge_a, to_a(b))
    cycle, identity = apart(to_a(to_b(a)), a) + apart(to_b(to_a(b)), b), apart(to_b(b), b) + apart(to_a(a), a)
    network.zero_grad()
    (translated + (10 * cycle + 5 * identity).mean()).backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if name.startswith("translators")}
    network.zero_grad()
    for judge, real, shown in ((judge_a, a, to_a(b).detach()), (judge_b, b, to_b(a).detach())):
        told = fooled(judge, real) + entropy(judge(shown)[-1], torch.zeros_like(judge(shown)[-1]))
        (told + 2 * slope(judge, real) / 2).backward()
    expected |= {name: p.grad.clone() for name, p in network.named_parameters() if name.startswith("discriminators")}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_voxel_is_translated_alike_in_a_crop_and_in_the_whole_scan() -> None:
    """Farther from the border than the network sees: what else the volume holds does not matter."""
    torch.manual_seed(0)
    prior = CycleGanPrior.untrained(cyclegan_config(), {})
    for parameter in prior.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    crop = torch.randn(1, 1, 48, 48, 48)
    whole = torch.nn.functional.pad(crop, [16] * 6, value=-1.0)
    inside = (..., *[slice(16, 32)] * 3)
    translated, within = prior.translate(crop, "bright"), prior.translate(whole, "bright")[..., 16:64, 16:64, 16:64]
    assert float((translated - crop)[inside].abs().mean()) > 1e-3
    torch.testing.assert_close(translated[inside], within[inside], atol=1e-4, rtol=1e-4)


def test_a_pair_has_a_crop_of_each_domain() -> None:
    config = cyclegan_config()
    cases = [replace(case, image=torch.full_like(case.image, case.class_index)) for case in two_domains()]
    pairs = Pairs(cases, config.data, 0)
    crop, _ = pairs.draw(3, located=True)
    assert crop.image.shape == (2, 16, 16, 16)
    assert [float(channel.mean()) for channel in crop.image] == pytest.approx([0, 1], abs=0.5)
    again, _ = pairs.draw(3, located=True)
    torch.testing.assert_close(crop.image, again.image)
    assert [case.class_index for case in pairs.cases(3)] == [0, 1]
    training, held_out = split(cases, 1, 0, domains=True)
    assert [case.class_index for case in held_out] == [0, 1]
    assert len(training) == 4
    [pair] = paired(validation_crops(held_out, config.data, 0))
    assert [float(channel.mean()) for channel in pair.image[0]] == pytest.approx([0, 1], abs=0.3)


def test_a_domain_without_a_scan_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedfusionError, match="leave none to train on"):
        train(two_domains()[:4], cyclegan_config(), tmp_path, device="cpu")
    with pytest.raises(ValueError, match="two domains have two names"):
        cyclegan_config(domains=[{"name": "a"}, {"name": "a"}])
    with pytest.raises(ValueError, match="halves crops of 16 voxels too often"):
        cyclegan_config(layers=3)
