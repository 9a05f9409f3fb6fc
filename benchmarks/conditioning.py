"""How a network is best shown a label map: in channels beside the image, or by SPADE in every block.

    MEDFUSION_DATA=... python benchmarks/conditioning.py --start PRIOR [--labelled 20] [--steps 300]

PRIOR is a prior of all scans of `hippocampus/train` without labels (`pipelines/augment.py` leaves one in
OUT/unlabelled). Two networks begin with it, answer as it does, and are then trained alike on the same crops, in which
`--labelled` of the scans show their label maps:
  channels   the map joins the image before the first convolution: what `medfusion` does
  spade      the features in the middle of every residual block are scaled and shifted at each voxel by two convolutions
             of the map (Park et al. 2019, without its normalisation, as these networks have none), which start at zero
Printed for each: parameters, seconds of a step, validation loss on labelled crops of `dev` at each time, and Dice of
images drawn for label maps of `dev` at each guidance, judged by a segmenter trained on all of `train`, beside its
Dice on the real images.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from medfusion.config import Config, SegmenterConfig, load_config
from medfusion.data.crops import Case, Crop, Crops, prepare, stack
from medfusion.io.training_set import TrainingCase, read_training_set
from medfusion.networks import ResidualUNet, adopt
from medfusion.networks.residual_unet import Residual, fold
from medfusion.prior import DiffusionPrior, Prior, build_network
from medfusion.tasks.draw_case import draw_case, read_parent
from medfusion.tasks.segmenter import mean_dice, prepared, segment, train_segmenter
from medfusion.training.batches import Order, Samples, loader
from medfusion.training.evaluate import validation_loss
from medfusion.training.optimizer import build_optimizers
from medfusion.training.stages import Diffusion

CONFIG = Path(__file__).parents[1] / "configs" / "hippocampus.yaml"
RATE, WARM_UP = 1e-3, 30
HIDDEN = 32  # channels between SPADE's two convolutions
CLASSES = 3
GUIDANCE = (1.0, 1.5, 2.0)


class Spade(Residual):
    """A residual block that sees the label map: x + conv(relu((1 + scale) conv(x) + shift)), of every voxel its own."""

    def __init__(self, block: Residual, channels: int, inputs: int) -> None:
        super().__init__(channels)
        self.load_state_dict(block.state_dict())
        self.see = nn.Conv3d(inputs, HIDDEN, 3, padding=1)
        self.tell = nn.Conv3d(HIDDEN, 2 * channels, 3, padding=1)
        nn.init.zeros_(self.tell.weight)
        nn.init.zeros_(self.tell.bias)

    def forward(self, x: Tensor, level: tuple[Tensor, Tensor]) -> Tensor:
        """As ``Residual``; beside the noise level the label map, folded and one-hot, (b, inputs, D, H, W)."""
        known = self.modulate(level[0])[:, :, None, None, None].to(x.dtype)
        shown = F.adaptive_avg_pool3d(level[1], x.shape[2:]).to(x.dtype)
        scale, shift = (known + self.tell(F.relu(self.see(shown)))).chunk(2, dim=1)
        return x + self.leave(F.relu(self.enter(x) * (1 + scale) + shift))


class SpadeUNet(ResidualUNet):
    """The network of a config with the label map in all of its blocks and not at its entrance."""

    def __init__(self, network: ResidualUNet, config: Config) -> None:
        super().__init__(config.network.channels, config.network.blocks, located=config.network.located)
        self.load_state_dict(network.state_dict())
        self.values = config.network.labels
        for stages in (self.down, self.up):
            for stage, channels in zip(stages, config.network.channels, strict=False):
                for number, block in enumerate(stage):
                    stage[number] = Spade(block, channels, 8 * self.values)

    def forward(self, x: Tensor, log_noise_ratio: Tensor, context=None, labels=None, classes=None) -> Tensor:
        """As ``ResidualUNet``; where the label map is unknown (-1) or withheld all of its channels are 0."""
        labels = torch.full_like(x[:, 0], -1, dtype=torch.long) if labels is None else labels
        one_hot = labels[:, None] == torch.arange(self.values, device=labels.device).view(1, -1, 1, 1, 1)
        self.shown = fold(one_hot.float()).contiguous(memory_format=torch.channels_last_3d)
        return super().forward(x, log_noise_ratio, context)

    def _pass(self, block: nn.Module, z: Tensor, level: Tensor) -> Tensor:
        return block(z, (level, self.shown))


def networks(config: Config, start: str) -> dict[str, ResidualUNet]:
    """Both, with the weights of the prior ``start``."""
    known, shown = DiffusionPrior.load(start).network, build_network(config)
    adopt(shown, known)
    return {"channels": shown, "spade": SpadeUNet(known, config)}


def learn(network: ResidualUNet, config: Config, cases: Sequence[Case]) -> float:
    """Train it; returns the seconds of a step."""
    stage, training = Diffusion(config), config.training
    optimizers = build_optimizers(network.train().to(memory_format=torch.channels_last_3d), training)
    batches, began = loader(Samples(cases, config), Order(config, 0, 0, 1), 0), time.perf_counter()
    for step, sample in enumerate(batches):
        rate = min(1, (step + 1) / WARM_UP) * (1 + np.cos(np.pi * step / training.steps)) / 2
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * rate
        network.zero_grad()
        loss = stage.loss(network, sample.shown(torch.device("cpu"), config.noise_shape), 0.0).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0:
            print(f"step {step}, loss {loss:.3f}", flush=True)
    network.eval().requires_grad_(False)
    return (time.perf_counter() - began) / training.steps


def held_out_crops(cases: Sequence[Case], config: Config, number: int = 40) -> list[Crop]:
    """Crops that show their label maps."""
    crops = Crops(cases, config.data.model_copy(update={"withheld_share": 0.0}), seed=1)
    return [stack([crops.draw(index, located=config.network.located)[0]]) for index in range(number)]


def drawn_dice(prior: Prior, cases: Sequence[TrainingCase], judge: nn.Module, guidance: float) -> float:
    """Mean Dice of the judge's answer to images drawn for the label maps of some cases."""
    dice = []
    for case in cases:
        parent, known = read_parent(case, prior), prepared(case, prior.config.preprocessing)
        new = draw_case(parent, prior, known.labels.numpy(), name=case.name, strength=1.0, guidance=guidance)
        seen = prepare(new, prior.config.preprocessing).image
        dice.append(mean_dice(segment(judge, seen), known.labels, CLASSES))
    return float(np.mean(dice))


def main() -> None:
    """Train, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True)
    parser.add_argument("--labelled", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--judged", type=int, default=20, help="cases of dev that images are drawn for")
    parser.add_argument("--judge-steps", type=int, default=2000)
    asked = parser.parse_args()
    data = Path(os.environ["MEDFUSION_DATA"]) / "hippocampus"
    settings = [f"training.steps={asked.steps}", f"training.learning_rate={RATE}", "data.unlabelled=true"]
    config = load_config(CONFIG, settings)
    known = config.preprocessing
    whole, dev = read_training_set(data / "train").labelled, read_training_set(data / "dev").labelled
    real = [prepared(case, known) for case in whole]
    few = set(np.random.default_rng(0).permutation(len(real))[: asked.labelled])
    cases = [case if k in few else replace(case, labels=None) for k, case in enumerate(real)]
    held_out = held_out_crops([prepared(case, known) for case in dev], config)
    judge = train_segmenter([real], CLASSES, SegmenterConfig(crop=32, steps=asked.judge_steps), seed=0)
    truth = [prepared(case, known) for case in dev[: asked.judged]]
    ceiling = np.mean([mean_dice(segment(judge, case.image), case.labels, CLASSES) for case in truth])
    table = Table(title=f"Dice of the judge on the real images: {ceiling:.3f}")
    for column in ("", "parameters", "s/step", "validation loss at t", *(f"Dice, guidance {w}" for w in GUIDANCE)):
        table.add_column(column)
    for name, network in networks(config, asked.start).items():
        seconds = learn(network, config, cases)
        losses = validation_loss(
            lambda shown, network=network: Diffusion(config).loss(network, shown, 1.0),
            config,
            held_out,
            torch.device("cpu"),
        )
        prior = DiffusionPrior(config, network, {})
        dice = [f"{drawn_dice(prior, dev[: asked.judged], judge, w):.3f}" for w in GUIDANCE]
        size = sum(parameter.numel() for parameter in network.parameters())
        shown = ", ".join(f"{t}: {loss:.4f}" for t, loss in losses.items())
        table.add_row(name, f"{size / 1e6:.2f} M", f"{seconds:.2f}", shown, *dice)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
