"""Do synthetic cases make a segmentation model better? Real, synthetic and both kinds of training cases, compared.

    MEDFUSION_DATA=... python pipelines/augment.py --out runs/augment --sizes 10 20 40 160 --seeds 0 1 2

On `hippocampus`: of the 160 cases of `train`, SIZE keep their label maps, drawn by the seed; the others are scans
without labels. What is done for each size and seed:
  prior      trained on that set: it begins with one of all scans without labels (`unlabelled`, once for all), and is
             then shown the labels of the SIZE cases
  cases      `--cases` new label maps from those SIZE maps, an image for each, audited as `medfusion augment` does
  compare    the segmenter of `medfusion evaluate augment` trained on the real, the synthetic and both kinds, and judged
             on `dev`, which neither prior nor segmenter saw
Everything made is kept under OUT and not made again; remove a folder to make it anew. Sizes and seeds may be done by
several runs, one after the other. The table is printed from all that OUT holds.

OUT also receives `pairs.png`, real and synthetic pairs without a word which is which, and `pairs.txt`, that says it.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import cache
from pathlib import Path

import numpy as np

from medfusion.cli.augment import show_audit
from medfusion.cli.evaluate import show_comparison
from medfusion.config import Config, SegmenterConfig, load_config
from medfusion.data.crops import Case
from medfusion.io.companions import read_labels
from medfusion.io.training_set import read_scan, read_training_set
from medfusion.report.figures import pairs_figure
from medfusion.tasks.augment import Request, augment
from medfusion.tasks.evaluate_augment import Comparison, Trained, compare, synthetic_cases
from medfusion.tasks.segmenter import prepared
from medfusion.training import load_training_set, train

CONFIG = Path(__file__).parent.parent / "configs" / "hippocampus.yaml"
UNLABELLED_STEPS, LABELLED_STEPS = 6000, 300
LABELLED_RATE = 1.0e-3  # of the second training: half that of the first
SEGMENTER = SegmenterConfig(crop=32, steps=6000)
CLASSES = 3
KNOWN = load_config(CONFIG).preprocessing
SEED = 0  # of the order of the pictures


def data_folder() -> Path:
    """The scans and label maps of the study."""
    return Path(os.environ["MEDFUSION_DATA"]) / "hippocampus"


def training_folder(out: Path, size: int, seed: int) -> Path:
    """A training set of links: all scans, and the label maps of ``size`` of them."""
    folder, whole = out / f"real_{size}_{seed}", data_folder() / "train"
    if folder.exists():
        return folder
    names = sorted(path.name for path in (whole / "images").glob("*.nii.gz"))
    few = np.random.default_rng(seed).permutation(len(names))[:size]
    for kind, chosen in (("images", names), ("labels", [names[index] for index in few])):
        (folder / kind).mkdir(parents=True)
        for name in chosen:
            (folder / kind / name).symlink_to((whole / kind / name).resolve())
    return folder


def unlabelled_prior(out: Path) -> Path:
    """A prior of all scans of `train` that is shown no labels: what every set may learn from."""
    settings = ["network.labels=0", "data.labels=''", "label_names=[]", f"training.steps={UNLABELLED_STEPS}"]
    return trained(load_config(CONFIG, settings), training_folder(out, 1, 0), out / "unlabelled")


def labelled_prior(out: Path, size: int, seed: int) -> Path:
    """The prior of one training set."""
    settings = [
        f"training.start={unlabelled_prior(out)}",
        f"training.steps={LABELLED_STEPS}",
        f"training.learning_rate={LABELLED_RATE}",
        f"training.seed={seed}",
        "training.warmup=30",
        "data.unlabelled=true",
        "data.validation=8" if size < 150 else "data.validation=1",
    ]
    return trained(load_config(CONFIG, settings), training_folder(out, size, seed), out / f"prior_{size}_{seed}")


def trained(config: Config, folder: Path, run: Path) -> Path:
    """The prior of a config and a training set, trained unless it is there."""
    prior = run / "prior.safetensors"
    if not prior.exists():
        cases, _ = load_training_set(read_training_set(folder), config, cache=run.parent / "cache")
        resume = (run / "checkpoint.pt").exists()
        train(cases, config, run, data=f"hippocampus, {folder.name}", resume=resume, progress=report)
    return prior


def report(state) -> None:
    """A line now and then."""
    if state.step % 50 == 0:
        print(f"step {state.step}, loss {state.loss:.3f}", flush=True)


def synthetic_folder(out: Path, size: int, seed: int, number: int) -> Path:
    """New cases from one training set, audited, those that were dropped set aside."""
    folder = out / f"synthetic_{size}_{seed}"
    if not (folder / "audit.json").exists():
        real, prior = training_folder(out, size, seed), labelled_prior(out, size, seed)
        request = Request(number, seed=seed)
        run, audit = augment(real, folder, request, prior=str(prior), audit_steps=600, resume=True)
        took = [case.seconds for case in run.cases if case.status == "done"]
        print(f"{folder.name}: {np.mean(took):.1f} s a case" if took else f"{folder.name}: made before")
        if audit is not None:
            show_audit(audit)
    return folder


def compared(out: Path, size: int, seed: int, number: int) -> list[Trained]:
    """The three trainings of one size and seed."""
    path = out / "trainings" / f"{size}_{seed}.json"
    if not path.exists():
        folder = synthetic_folder(out, size, seed, number)
        real = read_training_set(training_folder(out, size, seed))
        pools = [[prepared(case, KNOWN) for case in cases] for cases in (real.labelled, synthetic_cases(folder, real))]
        found = []
        for one in compare(pools[0], pools[1], judged_on(), CLASSES, SEGMENTER, seed=seed):
            print(f"{size} cases, seed {seed}, {one.arm}: Dice {one.dice.mean():.4f}, {one.seconds:.0f} s", flush=True)
            found.append(one._asdict() | {"dice": one.dice.tolist()})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return [Trained(**one | {"dice": np.array(one["dice"])}) for one in json.loads(path.read_text())]


@cache
def judged_on() -> list[Case]:
    """The cases of `dev`."""
    return [prepared(case, KNOWN) for case in read_training_set(data_folder() / "dev").labelled]


def picture_of_pairs(out: Path, folder: Path, number: int = 12) -> None:
    """Half real, half synthetic, in random order; a text file says which."""
    dev = read_training_set(data_folder() / "dev").labelled[: number // 2]
    real = read_training_set(training_folder(out, *map(int, folder.name.split("_")[1:])))
    made = list(synthetic_cases(folder, real))[: number // 2]
    chosen = [(case, "real") for case in dev] + [(case, "synthetic") for case in made]
    order = np.random.default_rng(SEED).permutation(len(chosen))
    pairs, key = [], []
    for place, index in enumerate(order, start=1):
        case, kind = chosen[index]
        scan = read_scan(case)
        pairs.append((str(place), scan, read_labels(case.labels, scan).array))
        key.append(f"{place} {kind} {case.name}")
    (out / "pairs.png").write_bytes(pairs_figure(pairs))
    (out / "pairs.txt").write_text("\n".join(key) + "\n")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/augment"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 40, 160])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", type=int, default=60, help="synthetic ones of each size and seed")
    asked = parser.parse_args()
    for seed in asked.seeds:
        for size in asked.sizes:
            compared(asked.out, size, seed, asked.cases)
            picture_of_pairs(asked.out, asked.out / f"synthetic_{size}_{seed}")
    done = [map(int, path.stem.split("_")) for path in sorted((asked.out / "trainings").glob("*.json"))]
    trainings = [one for size, seed in done for one in compared(asked.out, size, seed, asked.cases)]
    names = tuple(case.name for case in judged_on())
    show_comparison(Comparison(names, names, tuple(trainings)))


if __name__ == "__main__":
    main()
