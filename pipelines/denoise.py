"""How well the shipped priors remove Gaussian noise, beside peers, on real scans that they were not trained on.

    MEDFUSION_DATA=... python pipelines/denoise.py [--set ixi] [--subjects 23] [--out runs/denoise]

Scans: `ixi` is `ixi_t1_2mm/dev`, `contrasts` the FLAIR, T1 and T2 of `ms_lesions/patient26` (1 mm, skull-stripped; the
priors have seen T1 alone). They are divided by the 99.5th percentile of their positive voxels. Noise of 5, 10 and 20 %
is added to the whole volume. PSNR (data range 1) is taken inside the brain. The peers are given the true sigma; ours
run with the true one and, the first prior, with its own estimate too. scikit-image NLM: patch 5, distance 4, h = 0.6
sigma, the best setting of a sweep on the MNI template. dipy nlmeans: its default (blockwise) and the slower classic
method (patch 1, block 5). BM4D takes part where it is installed (`pip install bm4d`; its licence allows measurements
such as this one, no use in a product). `--peers` chooses among them. Prints the table; OUT receives `psnr.csv` with a
row a scan, method and level, and `slices.png`.
"""

import argparse
import csv
import os
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from medfusion.io import discover, read
from medfusion.metrics import psnr
from medfusion.prior import Prior, shipped
from medfusion.report.figures import comparison_figure
from medfusion.tasks.denoise import denoise_volume
from medfusion.volume import Volume

LEVELS = (0.05, 0.10, 0.20)
SEED = 20240
SETS = {"ixi": ("ixi_t1_2mm/dev", "*_T1.nii.gz"), "contrasts": ("ms_lesions/patient26", "[FT]*.nii.gz")}
Method = Callable[[Volume, float], np.ndarray]  # of a noisy volume and the true sigma


def peers() -> dict[str, Method]:
    """Name to method."""
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))

    def skimage_nlm(noisy: Volume, sigma: float) -> np.ndarray:
        from skimage.restoration import denoise_nl_means

        return denoise_nl_means(noisy.array, patch_size=5, patch_distance=4, h=0.6 * sigma, sigma=sigma, fast_mode=True)

    def dipy_blockwise(noisy: Volume, sigma: float) -> np.ndarray:
        from dipy.denoise.nlmeans import nlmeans

        return nlmeans(noisy.array, sigma=sigma, rician=False, num_threads=threads)

    def dipy_classic(noisy: Volume, sigma: float) -> np.ndarray:
        from dipy.denoise.nlmeans import nlmeans

        settings = {"patch_radius": 1, "block_radius": 5, "method": "classic"}
        return nlmeans(noisy.array, sigma=sigma, rician=False, num_threads=threads, **settings)

    def bm4d(noisy: Volume, sigma: float) -> np.ndarray:
        from bm4d import bm4d

        return np.asarray(bm4d(noisy.array, sigma), np.float32)

    found = {"scikit-image NLM": skimage_nlm, "dipy nlmeans": dipy_blockwise, "dipy nlmeans, classic": dipy_classic}
    return found | ({"BM4D": bm4d} if find_spec("bm4d") else {})


def ours(names: list[str]) -> dict[str, Method]:
    """Each prior, a shipped name or a file, with the true sigma, and the first with its own estimate."""
    priors = {name: Prior.load(name) for name in names}
    found = {
        f"medfusion {name}": lambda noisy, sigma, p=p: denoise_volume(noisy, p, sigma=sigma).volume.array
        for name, p in priors.items()
    }
    first = priors[names[0]]
    blind = f"medfusion {names[0]}, estimated sigma"
    return found | {blind: lambda noisy, sigma: denoise_volume(noisy, first).volume.array}


def load_pair(path: Path) -> tuple[Volume, np.ndarray]:
    """A scan in units of its 99.5th percentile, and its brain mask: its labels, or where it is not exactly 0."""
    scan = read(discover(path)[0])
    labels = path.with_name(path.name.replace("_T1", "_labels"))
    mask = read(discover(labels)[0]).array > 0 if labels != path and labels.exists() else scan.array != 0
    array = scan.array.astype(np.float32)
    return scan.with_array(array / np.percentile(array[array > 0], 99.5)), mask


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="ixi")
    parser.add_argument("--subjects", type=int, default=23)
    parser.add_argument("--priors", nargs="+", default=list(shipped()))
    parser.add_argument("--peers", nargs="*", choices=list(peers()), default=list(peers()))
    parser.add_argument("--out", type=Path, default=Path("runs/denoise"))
    arguments = parser.parse_args()
    if "MEDFUSION_DATA" not in os.environ:
        parser.error("set MEDFUSION_DATA to the folder of scans")
    folder, pattern = SETS[arguments.set]
    paths = sorted((Path(os.environ["MEDFUSION_DATA"]) / folder).glob(pattern))[: arguments.subjects]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rivals: dict[str, Method] = {"noisy input": lambda noisy, sigma: noisy.array}
    rivals |= {name: peers()[name] for name in arguments.peers} | ours(arguments.priors)
    rows, seconds = [], defaultdict(list)
    for path in paths:
        clean, mask = load_pair(path)
        pictures = {}
        for level in LEVELS:
            noise = np.random.default_rng(SEED).standard_normal(clean.shape)
            noisy = clean.with_array((clean.array + level * noise).astype(np.float32))
            for name, method in rivals.items():
                began = time.perf_counter()
                result = method(noisy, level)
                seconds[name].append(time.perf_counter() - began)
                rows.append([clean.name, name, level, psnr(clean.array, result, mask, 1.0)])
                pictures[level, name] = clean.with_array(np.asarray(result, np.float32))
        print(f"{clean.name}  " + "  ".join(f"{row[1]} {row[3]:.2f}" for row in rows[-len(rivals) :]), flush=True)
    with (arguments.out / "psnr.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["subject", "method", "noise", "psnr_db"], *rows])
    shown = {name: pictures[0.10, name] for name in rivals}
    (arguments.out / "slices.png").write_bytes(comparison_figure({"truth": clean, **shown}))
    print_table(rows, seconds, len(paths))


def print_table(rows: list[list], seconds: dict[str, list[float]], subjects: int) -> None:
    """Mean PSNR over the subjects for each method and level, and the seconds a volume took."""
    table = Table(title=f"PSNR in the brain, dB, mean of {subjects} scans", title_justify="left")
    for column in ("method", *(f"{level:.0%}" for level in LEVELS), "s per volume"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, times in seconds.items():
        means = [np.mean([row[3] for row in rows if row[1] == name and row[2] == level]) for level in LEVELS]
        table.add_row(name, *(f"{mean:.2f}" for mean in means), f"{np.mean(times):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
