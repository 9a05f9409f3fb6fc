"""How well the shipped prior removes Gaussian noise, beside two peers, on real heads that it was not trained on.

    MEDFUSION_DATA=... python pipelines/denoise.py [--subjects 23] [--prior brain-t1] [--out runs/denoise]

Scans: `ixi_t1_2mm/dev`, divided by the 99.5th percentile of their positive voxels. Noise of 5, 10 and 20 % is added to
the whole volume. PSNR (data range 1) is taken inside `labels > 0`. The peers are given the true sigma; ours
runs twice, with the true and with its own estimate. scikit-image NLM: patch 5, distance 4, h = 0.6 sigma, the best
setting of a sweep on the MNI template. dipy nlmeans: its default (blockwise) and the slower classic method (patch 1,
block 5). Prints the table; OUT receives `psnr.csv` with a row a subject, method and level, and `slices.png`.
"""

import argparse
import csv
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from medfusion.io import discover, read
from medfusion.metrics import psnr
from medfusion.prior import Prior
from medfusion.report.figures import comparison_figure
from medfusion.tasks.denoise import denoise_volume
from medfusion.volume import Volume

LEVELS = (0.05, 0.10, 0.20)
SEED = 20240
OURS, OURS_BLIND = "medfusion", "medfusion, estimated sigma"


def methods(prior: Prior) -> dict[str, Callable[[Volume, float], np.ndarray]]:
    """Name to a function of (noisy volume, true sigma)."""
    from dipy.denoise.nlmeans import nlmeans
    from skimage.restoration import denoise_nl_means

    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))

    def skimage_nlm(noisy: Volume, sigma: float) -> np.ndarray:
        return denoise_nl_means(noisy.array, patch_size=5, patch_distance=4, h=0.6 * sigma, sigma=sigma, fast_mode=True)

    def dipy_blockwise(noisy: Volume, sigma: float) -> np.ndarray:
        return nlmeans(noisy.array, sigma=sigma, rician=False, num_threads=threads)

    def dipy_classic(noisy: Volume, sigma: float) -> np.ndarray:
        settings = {"patch_radius": 1, "block_radius": 5, "method": "classic"}
        return nlmeans(noisy.array, sigma=sigma, rician=False, num_threads=threads, **settings)

    return {
        "noisy input": lambda noisy, sigma: noisy.array,
        "scikit-image NLM": skimage_nlm,
        "dipy nlmeans (default)": dipy_blockwise,
        "dipy nlmeans (classic)": dipy_classic,
        OURS: lambda noisy, sigma: denoise_volume(noisy, prior, sigma=sigma).volume.array,
        OURS_BLIND: lambda noisy, sigma: denoise_volume(noisy, prior).volume.array,
    }


def load_pair(path: Path) -> tuple[Volume, np.ndarray]:
    """A scan in units of its 99.5th percentile, and its brain mask."""
    scan = read(discover(path)[0])
    labels = read(discover(path.with_name(path.name.replace("_T1", "_labels")))[0])
    array = scan.array.astype(np.float32)
    return scan.with_array(array / np.percentile(array[array > 0], 99.5)), labels.array > 0


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=23)
    parser.add_argument("--prior", default="brain-t1")
    parser.add_argument("--out", type=Path, default=Path("runs/denoise"))
    arguments = parser.parse_args()
    if "MEDFUSION_DATA" not in os.environ:
        parser.error("set MEDFUSION_DATA to the folder of scans")
    paths = sorted((Path(os.environ["MEDFUSION_DATA"]) / "ixi_t1_2mm/dev").glob("*_T1.nii.gz"))[: arguments.subjects]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rivals = methods(Prior.load(arguments.prior))
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
