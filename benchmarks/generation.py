"""What a synthetic case costs and is worth: sampler, steps, guidance and strength against seconds and quality.

    MEDFUSION_DATA=... python benchmarks/generation.py --prior hippocampus [--cases 16] [--threads 2]

New label maps are made from those of `hippocampus/dev`, which the prior did not see, and images are drawn for them:
the parent's, moved along with its map, is noised to the strength and drawn anew. They are judged by
  Dice      of a segmenter trained on all of `train`, shown the image, against the label map
  MMD       x 1000, and Frechet distance: from `dev`, in the features of the audit
  texture   standard deviation of the image less its mean over 3^3 voxels, of that of the real images: 1 is right
  nearest   median distance to the nearest image of `dev`, in correlation; of real ones to their nearest other below
  alike     MS-SSIM of pairs
The rows `moved` and `real` have the parents' images, moved along and as they are. Seconds are the median of cases
after a first one that is not counted. The defaults in `medfusion/tasks/draw_case.py` are chosen by this table.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from medfusion.config import SegmenterConfig
from medfusion.data.crops import Case, context_channels
from medfusion.data.intensity import SEEN
from medfusion.data.label_maps import new_label_map, warp_image
from medfusion.data.seeds import case_generator
from medfusion.diffusion import ddim, ddpm, dpm_solver, noise_like, time_steps
from medfusion.io.training_set import read_training_set
from medfusion.metrics.generative import frechet_distance, mmd, pairwise_ms_ssim, texture
from medfusion.prior import Prior
from medfusion.tasks.audit_synthetic import nearness, standardised, thumbnails
from medfusion.tasks.draw_case import LAST
from medfusion.tasks.features import features
from medfusion.tasks.segmenter import mean_dice, prepared, segment, train_segmenter

SETTINGS = (  # sampler, steps, guidance, strength
    *(("dpm_solver", steps, 1.5, 0.8) for steps in (3, 5, 10, 20)),
    *(("ddim", steps, 1.5, 0.8) for steps in (10,)),
    *(("ddpm", steps, 1.5, 0.8) for steps in (10, 20)),
    *(("dpm_solver", 10, guidance, 0.8) for guidance in (1.0, 2.0, 3.0)),
    *(("dpm_solver", 10, 1.5, strength) for strength in (0.4, 0.6, 0.9, 1.0)),
)
COLUMNS = (
    *("sampler", "steps", "guidance", "strength", "s/case"),
    *("Dice", "MMD", "Frechet", "texture", "nearest", "alike"),
)
SHAPE = (32, 48, 32)  # to which images are cut or padded where whole volumes are compared
PAIRS = 200

Image = NDArray[np.float32]


def planned(cases: Sequence[Case], number: int) -> list[tuple[Case, Case]]:
    """Parents, and the new cases with the parents' images moved along."""
    maps, pairs = [case.labels.numpy() for case in cases], []
    for index in range(number):
        labels, parents, where = new_label_map(maps, np.random.default_rng(index))
        parent = cases[parents[0]]
        moved = torch.from_numpy(warp_image(parent.image.float().numpy(), where))
        pairs.append((parent, Case(f"new {index}", moved, parent.centre, 1.0, parent.kind, torch.from_numpy(labels))))
    return pairs


def draw(prior: Prior, case: Case, sampler: str, steps: int, guidance: float, strength: float) -> Image:
    """As ``medfusion.tasks.draw_case``, in the prior's units, by one of three samplers."""
    generator, x0 = case_generator(0, case.name), case.image[None, None]
    context = context_channels(case.image.shape, (0, 0, 0), case.centre, case.spacing, case.kind)[None]
    denoise = prior.denoiser(context, case.labels.long()[None], None, guidance)
    start = min(strength, LAST)
    x = prior.process.add_noise(x0 if strength < 1 else torch.zeros_like(x0), noise_like(x0, [generator]), start)
    if sampler == "ddpm":
        x = ddpm(denoise, x, time_steps(prior.process, steps, start=start), generators=[generator])
    else:
        solve = {"dpm_solver": dpm_solver, "ddim": ddim}[sampler]
        x = solve(denoise, x, time_steps(prior.process, steps, "log_snr", start=start))
    return x[0, 0].clamp(*SEEN).float().numpy()


class Judge:
    """The real images of ``dev`` and a segmenter of ``train``."""

    def __init__(self, dev: Sequence[Case], segmenter: nn.Module) -> None:
        images = [case.image.float().numpy() for case in dev]
        self.segmenter, self.features, self.texture = segmenter, features(images), np.mean([texture(i) for i in images])
        self.small = standardised(thumbnails(dev, SHAPE))
        self.names = [case.name for case in dev]

    def columns(self, images: Sequence[Image], cases: Sequence[Case]) -> list[str]:
        """The columns of a row after the seconds."""
        pairs = list(zip(images, cases, strict=True))
        dice = [mean_dice(segment(self.segmenter, torch.from_numpy(i)), c.labels, 3) for i, c in pairs]
        seen = [Case(c.name, torch.from_numpy(i), c.centre, 1.0, c.kind) for i, c in pairs]
        small, found = thumbnails(seen, SHAPE), features(images)
        near = nearness(self.small, standardised(small), self.names)
        return [
            f"{np.mean(dice):.3f}",
            f"{1000 * mmd(self.features, found):.0f}",
            f"{frechet_distance(self.features, found):.1f}",
            f"{np.mean([texture(i) for i in images]) / self.texture:.2f}",
            f"{np.median(near.distance):.2f}",
            f"{pairwise_ms_ssim(small, PAIRS).mean():.3f}",
        ]


def main() -> None:
    """Draw, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="hippocampus")
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--judge-steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    data, prior = Path(os.environ["MEDFUSION_DATA"]) / "hippocampus", Prior.load(asked.prior)
    known = prior.config.preprocessing
    train, dev = ([prepared(c, known) for c in read_training_set(data / kind).labelled] for kind in ("train", "dev"))
    judge = Judge(dev, train_segmenter([train], 3, SegmenterConfig(crop=32, steps=asked.judge_steps), seed=0))
    parents, new = zip(*planned(dev, asked.cases), strict=True)
    table = Table(*COLUMNS)

    def add(*row: str) -> None:
        print(*row, flush=True)
        table.add_row(*row)

    for sampler, steps, guidance, strength in SETTINGS:
        draw(prior, new[0], sampler, steps, guidance, strength)
        images, seconds = [], []
        for case in new:
            began = time.perf_counter()
            images.append(draw(prior, case, sampler, steps, guidance, strength))
            seconds.append(time.perf_counter() - began)
        row = [sampler, str(steps), str(guidance), str(strength), f"{statistics.median(seconds):.2f}"]
        add(*row, *judge.columns(images, new))
    for name, cases in (("moved", new), ("real", parents)):
        add(name, "", "", "", "", *judge.columns([case.image.float().numpy() for case in cases], cases))
    apart = nearness(judge.small, judge.small, judge.names).real
    Console(width=130).print(table, f"real cases to their nearest other: {np.median(apart):.2f}")


if __name__ == "__main__":
    main()
