"""Scanner harmonisation: can IXI be told from OASIS after translation, and is the brain still the same?

    MEDFUSION_DATA=... python pipelines/harmonise.py --out runs/harmonise

`ixi_t1_2mm`, skull-stripped by its labels, and `oasis_t1_2mm`, which is; models learn from `train`, all figures are of
`dev`, both ways. Beside one another:
  none       the scans as they are
  histogram  the values in the brain mapped to those of the other scanner's training scans (scikit-image)
  cyclegan   `medfusion translate` by configs/harmonise.yaml
  diffusion  `medfusion translate` from one prior of configs/brain_t1_stripped.yaml to the other
What is measured of a method:
  caught     share of translated scans that a classifier still gives to their own scanner, with Wilson's interval; it is
             a network that learnt from the training scans as they are, from crops of 32^3 voxels inside the brain
  told apart area under the ROC curve of another classifier, made anew for each method: translated scans against real
             ones of the target, logistic regression on the features of the audit, each pair of scans judged by one
             that saw neither (Airola et al. 2011); 0.5 is chance. It may see what the first is fooled by; age and
             illness, which differ between the two sets, too. The interval is a bootstrap over scans: OASIS has five.
  overlap    Dice of three tissues before and after, by Otsu's thresholds in the brain: mean over scans, and the lowest
  change     mean absolute, of the range
All that is made is kept under OUT and not made again. OUT/SCANNER_as_OTHER.png shows five brains in every way, above
five of the other scanner.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from generative_report import grid
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from skimage.exposure import match_histograms
from skimage.filters import threshold_multiotsu
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from medfusion.config import Config, load_config
from medfusion.data.crops import stripped
from medfusion.data.grid import canonical, resampled
from medfusion.data.intensity import measure_scale
from medfusion.io import discover, read, write_nifti
from medfusion.io.companions import companion, read_labels
from medfusion.metrics import dice
from medfusion.metrics.intervals import wilson
from medfusion.tasks.features import features
from medfusion.tasks.translate import translate
from medfusion.training import load_cases, load_domains, train
from medfusion.volume import Volume

CONFIGS = Path(__file__).parent.parent / "configs"
SCANNERS = ("ixi", "oasis")
EDGE, CROPS = 32, 16  # of crops, and how many of a scan are judged
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 400, 8
BRAIN = -0.95  # values above it, in the prior's units, lie in a stripped brain
SHOWN = 5  # brains of a row
METHODS = ("none", "histogram", "cyclegan", "diffusion")


def folder(scanner: str, kind: str) -> Path:
    """The scans of the data set."""
    return Path(os.environ["MEDFUSION_DATA"]) / f"{scanner}_t1_2mm" / kind


def scans(out: Path, scanner: str, kind: str) -> Path:
    """A folder of skull-stripped scans of `train` or `dev`."""
    made = out / "scans" / f"{scanner}_{kind}"
    for series in discover(folder(scanner, kind), pattern="*_T1.nii.gz"):
        target = made / f"{series.name}.nii.gz"
        if target.exists():
            continue
        made.mkdir(parents=True, exist_ok=True)
        scan = read(series)
        if scanner == "ixi":
            labels = read_labels(companion(series, "*_T1.nii.gz", "*_labels.nii.gz", "labels"), scan)
            scan = stripped(scan, labels.array > 0)
        write_nifti(scan, target)
    return made


def trained(config: Config, load: Callable[..., tuple[list, object]], run: Path) -> Path:
    """The prior of a run, trained unless it is there."""
    prior = run / "prior.safetensors"
    if not prior.exists():
        cases, _ = load(config=config, cache=run.parent / "cache")
        train(cases, config, run, resume=(run / "checkpoint.pt").exists(), say=print, progress=report)
    return prior


def report(state) -> None:
    """A line now and then."""
    if state.step % 50 == 0:
        print(f"step {state.step}, loss {state.loss:.3f}, {state.images_per_second:.1f} crops/s", flush=True)


def cyclegan(out: Path) -> Path:
    """The prior of configs/harmonise.yaml."""
    load = partial(load_domains, [folder(scanner, "train") for scanner in SCANNERS])
    return trained(load_config(CONFIGS / "harmonise.yaml"), load, out / "cyclegan")


def diffusion(out: Path, scanner: str) -> Path:
    """The diffusion prior of a scanner; that of OASIS, of which there are few scans, begins with that of IXI."""
    own = [f"name={scanner}"]
    if scanner == "oasis":
        own += ["data.masks=", f"training.start={diffusion(out, 'ixi')}", "training.steps=700"]
    load = partial(load_cases, folder(scanner, "train"))
    return trained(load_config(CONFIGS / "brain_t1_stripped.yaml", own), load, out / f"diffusion_{scanner}")


def translated(out: Path, method: str, source: str, target: str) -> list[Volume]:
    """The dev scans of one scanner as a method shows them on the other."""
    originals, made = scans(out, source, "dev"), out / "translated" / f"{method}_{source}"
    if method == "none":
        made = originals
    elif method == "histogram":
        for scan in volumes(originals):
            if not (path := made / f"{scan.name}_translated.nii.gz").exists():
                made.mkdir(parents=True, exist_ok=True)
                write_nifti(matched(scan, reference(out, target)), path)
    else:
        prior, to = (cyclegan(out), target) if method == "cyclegan" else (diffusion(out, s) for s in (source, target))
        translate(originals, made, prior=str(prior), to=str(to), resume=made.exists())
    return volumes(made)


def volumes(made: Path) -> list[Volume]:
    """The scans in a folder."""
    return [read(series) for series in discover(made, pattern="*.nii.gz")]


@cache
def reference(out: Path, scanner: str) -> NDArray[np.float32]:
    """Values in the brains of the training scans, in the prior's units."""
    values = [seen(scan) for scan in volumes(scans(out, scanner, "train"))]
    return np.concatenate([v[v > BRAIN][::10] for v in values])


def matched(scan: Volume, values: NDArray[np.float32]) -> Volume:
    """The values in the brain mapped to others in the prior's units, in the order of their size."""
    scale = measure_scale(scan.array, 99.0, scan.name)
    array = scale.apply(scan.array)
    brain = array > BRAIN
    array[brain] = match_histograms(array[brain], values)
    return scan.with_array(scale.invert(array))


def seen(scan: Volume) -> NDArray[np.float32]:
    """Upright at 2 mm, in the prior's units."""
    upright = resampled(canonical(scan), 2.0)
    return measure_scale(upright.array, 99.0, scan.name).apply(upright.array)


def brain(scan: Volume) -> NDArray[np.float32]:
    """As ``seen``, without the air around it."""
    image = seen(scan)
    inside = np.argwhere(image > BRAIN)
    return image[tuple(map(slice, inside.min(axis=0), inside.max(axis=0) + 1))]


def crops(scan: Volume, number: int = CROPS) -> NDArray[np.float32]:
    """(n, 32, 32, 32) inside the brain, whose outline would tell by whom it was stripped: the fullest of ten each."""
    image, rng, chosen = seen(scan), np.random.default_rng(0), []
    for _ in range(number):
        corners = rng.integers(0, np.array(image.shape) - EDGE + 1, (10, 3))
        tried = [image[tuple(slice(c, c + EDGE) for c in corner)] for corner in corners]
        chosen.append(max(tried, key=lambda crop: (crop > BRAIN).mean()))
    return np.stack(chosen)


@cache
def classifier(out: Path) -> nn.Module:
    """A network that tells the scanners apart by crops of the training scans: above 0 is OASIS."""
    from monai.networks.nets import Discriminator

    torch.manual_seed(0)
    network = Discriminator((1, EDGE, EDGE, EDGE), (16, 32, 64), (2, 2, 2), num_res_units=0, last_act=None)
    optimizer, rng = torch.optim.AdamW(network.parameters(), lr=1e-3), np.random.default_rng(0)
    pools = [np.concatenate([crops(scan, 32) for scan in volumes(scans(out, s, "train"))]) for s in SCANNERS]
    for _ in range(CLASSIFIER_STEPS):
        drawn = [pool[rng.integers(len(pool), size=CLASSIFIER_BATCH // 2)] for pool in pools]
        shown = torch.from_numpy(np.concatenate(drawn))[:, None]
        truth = torch.arange(2).repeat_interleave(CLASSIFIER_BATCH // 2).float()
        loss = nn.functional.binary_cross_entropy_with_logits(network(shown)[:, 0], truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def caught(out: Path, made: Sequence[Volume], source: str) -> tuple[float, float, float]:
    """Share of scans that the classifier gives to their own scanner, by the mean over their crops; with interval."""
    network = classifier(out)
    with torch.no_grad():
        logits = [float(network(torch.from_numpy(crops(scan))[:, None]).mean()) for scan in made]
    count = sum((logit > 0) == (source == "oasis") for logit in logits)
    return count / len(logits), *map(float, wilson(count, len(logits)))


def told_apart(made: Sequence[Volume], real: Sequence[Volume]) -> tuple[float, float, float]:
    """Area under the curve, over pairs of scans that the classifier did not see, and its 95 % interval."""
    found = np.stack([features(crops(scan)) for scan in (*made, *real)])  # (scans, crops, features)
    truth = np.repeat([0, 1], [len(made), len(real)])
    right = np.array([[_right(found, truth, i, len(made) + j) for j in range(len(real))] for i in range(len(made))])
    rng = np.random.default_rng(0)
    drawn = [right[np.ix_(*(rng.integers(n, size=n) for n in right.shape))].mean() for _ in range(1000)]
    return float(right.mean()), *np.percentile(drawn, (2.5, 97.5))


def _right(found: NDArray[np.float64], truth: NDArray[np.int_], translated: int, real: int) -> bool:
    """Whether a classifier of all other scans finds the real one of a pair more real."""
    others = np.delete(np.arange(len(truth)), (translated, real))
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(found[others].reshape(-1, found.shape[2]), truth[others].repeat(found.shape[1]))
    return bool(np.diff([model.decision_function(found[scan]).mean() for scan in (translated, real)])[0] > 0)


def overlap(before: Volume, after: Volume) -> float:
    """Mean Dice of three tissues, by Otsu's two thresholds of each scan's own values in the brain."""
    brain = seen(before) > BRAIN
    maps = []
    for scan in (before, after):
        values = seen(scan)
        maps.append(np.digitize(values, threshold_multiotsu(values[brain], 3)))
    return float(np.mean([dice(*((m == tissue) & brain for m in maps)) for tissue in range(3)]))


def with_interval(value: float, low: float, high: float) -> str:
    """To two digits."""
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Train what is not there, translate, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/harmonise"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked = parser.parse_args()
    table = Table("from", "to", "method", "caught", "told apart", "overlap", "lowest", "change")
    for source, target in (SCANNERS, SCANNERS[::-1]):
        before, real = (volumes(scans(asked.out, scanner, "dev")) for scanner in (source, target))
        rows = {source: before}
        for method in asked.methods:
            made = translated(asked.out, method, source, target)
            pairs = list(zip(before, made, strict=True))
            overlaps = [overlap(a, b) for a, b in pairs]
            change = np.mean([np.abs(b.array - a.array).mean() / np.ptp(a.array) for a, b in pairs])
            shares = [f"{value:.3f}" for value in (np.mean(overlaps), min(overlaps), change)]
            judged = [with_interval(*each) for each in (caught(asked.out, made, source), told_apart(made, real))]
            table.add_row(source, target, method, *judged, *shares)
            print(source, target, method, *judged, *shares, flush=True)
            rows |= {f"{source} as {target}, {method}": made} if method != "none" else {}
        shown = {name: [brain(scan) for scan in some[:SHOWN]] for name, some in (rows | {target: real}).items()}
        (asked.out / f"{source}_as_{target}.png").write_bytes(grid(shown))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
