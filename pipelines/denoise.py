"""How well the shipped priors remove noise, beside peers, on real scans that they were not trained on.

    MEDFUSION_DATA=... OMP_NUM_THREADS=1 python pipelines/denoise.py [--sets ixi] [--subjects 6] [--noise g5 g10]

Scans (`--sets`), each divided by the 99.5th percentile of its positive voxels, CT by 1000 HU:
  ixi         `ixi_t1_2mm/dev`, whole heads
  oasis-2mm   `oasis_t1_2mm/dev`, another scanner, skull-stripped
  oasis-1mm   `oasis_t1_1mm/retest`, the first scan of each pair, at 1 mm
  contrasts   FLAIR, T1 and T2 of `ms_lesions/patient26`, 1 mm, skull-stripped
  glioma      FLAIR and T1 with contrast agent of `glioma`, 1 mm, skull-stripped
  mprage      the 176 slices of `dicom/mr_t1_mprage_siemens_176`, a whole head at 1 mm
  ct          `ct/abdomen_3mm`
and five studies of their own:
  retest      `oasis_t1_1mm/retest` as they are: is the denoised first scan closer to the second, rigidly registered?
  template    the MNI152 template of nilearn (`pip install nilearn`), the mean of 152 heads twenty times each: clean
  coverage    `ixi_t1_2mm/dev`: how many voxels of the truth lie in the 90 % interval of posterior samples
  adapt       the first scan of oasis-2mm, contrasts and ct: what ten minutes of `--adapt` on it are worth
  large       a CT of 512 x 512 x 600 made of `ct/abdomen_3mm` with 25 HU of noise: minutes and memory of the command;
              run it alone, because the memory is the most that any command of this process had

Noise (`--noise`): g5 is Gaussian of 5 % added to the whole volume, r5 Rician, d25 that of CT with 25 % of the photons
(Poisson in the projections). PSNR (data range 1) and SSIM are means over the brain (labels, a mask, where it is not
exactly 0, or the foreground). Peers are told the true sigma; ours run with it and, of the prior for the set, with their
own estimate and in high quality too. Where lesions are known: the contrast to their surround that is left, as a share
of the clean scan's.

CPU seconds and peak memory (above what was there before) are of each call, per million voxels; compare them in
one run on an idle machine only. A result that is in OUT/results.csv already is not made again.

Prints the tables; OUT receives `results.csv`, a row a scan, noise and method, and `SET.png`.
"""

import argparse
import csv
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from denoise_peers import PEERS, Method, Noisy, unbiased
from rich.console import Console
from rich.table import Table
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

from medfusion.data.intensity import foreground
from medfusion.io import discover, read, write_nifti
from medfusion.metrics import psnr
from medfusion.prior import Prior
from medfusion.report.figures import comparison_figure
from medfusion.tasks.adapt import adapt
from medfusion.tasks.denoise import denoise_volume, volume_noise
from medfusion.tasks.noise import Noise
from medfusion.volume import Volume

SEED = 20240
DRAWS = 8  # posterior samples a scan
WATER = 0.0192  # attenuation of water at 70 keV, per millimetre
PHOTONS = 2e5  # that reach a detector element without a patient
VIEWS = 360
MINUTES = 10.0
AROUND = 8  # voxels kept around the tissue
SETS = {  # and the prior for each: brain-t1 where scans are like those that it was trained on
    "ixi": "brain-t1",
    "oasis-2mm": "mri-patch",
    "oasis-1mm": "mri-patch",
    "contrasts": "mri-patch",
    "glioma": "mri-patch",
    "mprage": "mri-patch",
    "ct": "mri-patch",
    "retest": "mri-patch",
    "template": "brain-t1",
    "coverage": "brain-t1",
    "adapt": "",  # that of each set
    "large": "mri-patch",
}
COLUMNS = (
    "set",
    "scan",
    "noise",
    "method",
    "psnr_db",
    "ssim",
    "cpu_s",
    "peak_mib",
    "megavoxels",
    "sigma_ratio",
    "lesions",
)
Row = dict[str, str | float]


def scans_of(name: str, folder: Path) -> list[tuple[Path, Path | None, Path | None]]:
    """Scan, mask and lesions of a set; None: the mask is where the scan is not exactly 0, there are no lesions."""
    if name in ("ixi", "coverage"):
        heads = sorted((folder / "ixi_t1_2mm/dev").glob("*_T1.nii.gz"))
        return [(head, head.with_name(head.name.replace("_T1", "_labels")), None) for head in heads]
    if name == "oasis-2mm":
        heads = sorted((folder / "oasis_t1_2mm/dev").glob("*_T1.nii.gz"))
        return [(head, head.with_name(head.name.replace("_T1", "_tissues")), None) for head in heads]
    if name == "oasis-1mm":
        pairs = sorted((folder / "oasis_t1_1mm/retest").iterdir())
        return [(p / f"{p.name[:4]}_SS.nii.gz", p / f"{p.name[:4]}_mask.nii.gz", None) for p in pairs]
    if name == "contrasts":
        case = folder / "ms_lesions/patient26"
        return [(case / f"{c}.nii.gz", None, case / "lesions.nii.gz") for c in ("FLAIR", "T1", "T2")]
    if name == "glioma":
        case = folder / "glioma/brats_2013_pat0001_1"
        lesions = next(case.glob("*OTMultiClass*"))
        return [(case / f"{c}_subtrMeanDivStd.nii.gz", case / "brainmask.nii.gz", lesions) for c in ("Flair", "T1c")]
    if name == "ct":
        return [(folder / "ct/abdomen_3mm.nii.gz", None, None)]
    return [(folder / "dicom/mr_t1_mprage_siemens_176", None, None)]


def load(path: Path, beside: Path | None, lesion_file: Path | None = None) -> tuple[Volume, np.ndarray, np.ndarray]:
    """A scan in units of its 99.5th percentile, or of 1000 HU, its mask and its lesions.

    Where more than a third is air, that is cut off: the slow peers need as long for it.
    """
    scan = read(discover(path)[0])
    array = scan.array.astype(np.float32)
    if beside is not None:
        mask = read(discover(beside)[0]).array > 0
    else:
        mask = foreground(array) if np.mean(array == array.min()) < 0.2 else array != array.min()
    lesions = np.zeros(mask.shape, bool) if lesion_file is None else read(discover(lesion_file)[0]).array > 0
    if "ct" in path.parts:
        return scan.with_array(array / 1000), mask, lesions
    array -= array.min()  # z-scores of a brain: the constant outside becomes 0
    array /= np.percentile(array[array > 0], 99.5)
    box = tuple(slice(max(0, a.min() - AROUND), a.max() + AROUND + 1) for a in np.nonzero(foreground(array) | mask))
    if array[box].size > array.size / 1.5:
        return scan.with_array(array), mask, lesions
    affine = scan.affine.copy()
    affine[:3, 3] = scan.to_world([s.start for s in box])
    return Volume(array[box], affine, scan.name, scan.modality), mask[box], lesions[box]


def add_noise(clean: Volume, mask: np.ndarray, code: str) -> Noisy:
    """The same draw for each scan of one size."""
    rng, level = np.random.default_rng(SEED), float(code[1:]) / 100
    if code[0] == "d":
        added = low_dose(clean, level, rng)
        return Noisy(clean.with_array(clean.array + added), code, float(added[mask].std()), False, clean.array, mask)
    array = clean.array + level * rng.standard_normal(clean.shape)
    if code[0] == "r":
        array = np.hypot(np.maximum(clean.array, 0) + (array - clean.array), level * rng.standard_normal(clean.shape))
    return Noisy(clean.with_array(array.astype(np.float32)), code, level, code[0] == "r", clean.array, mask)


def low_dose(clean: Volume, dose: float, rng: np.random.Generator) -> np.ndarray:
    """What a ``dose`` of the photons adds to a CT in units of 1000 HU: Poisson noise, back-projected slice by slice."""
    from skimage.transform import iradon, radon

    across, size = float(clean.spacing[0]), max(clean.shape[:2])
    pad = [((size - n) // 2, size - n - (size - n) // 2) for n in clean.shape[:2]]
    inside = tuple(slice(before, before + n) for (before, _), n in zip(pad, clean.shape[:2], strict=True))
    angles, added = np.linspace(0, 180, VIEWS, endpoint=False), np.zeros(clean.shape, np.float32)
    for k in range(clean.shape[2]):
        water = np.pad(np.maximum(clean.array[:, :, k] + 1, 0), pad)
        lines = radon(water, angles, circle=False) * (WATER * across)
        counts = np.maximum(rng.poisson(PHOTONS * dose * np.exp(-lines)), 1)
        noise = -np.log(counts / (PHOTONS * dose)) - lines
        added[:, :, k] = iradon(noise / (WATER * across), angles, circle=False, output_size=size)[inside]
    return added


def ours(set_name: str, names: list[str], told: dict[str, float]) -> dict[str, Method]:
    """Each prior with the true sigma; that of the set with its own estimate, for ``told``, and in high quality."""
    priors = {name: Prior.load(name) for name in dict.fromkeys([SETS[set_name], *names])}
    first = priors[SETS[set_name]]

    def with_sigma(noisy: Noisy, prior: Prior, high_quality: bool = False) -> np.ndarray:
        noise = Noise(noisy.sigma, "rician" if noisy.rician else "gaussian")
        return denoise_volume(noisy.volume, prior, noise=noise, high_quality=high_quality).volume.array

    def blind(noisy: Noisy) -> np.ndarray:
        result = denoise_volume(noisy.volume, first)
        told["sigma_ratio"] = result.noise.sigma / noisy.sigma
        return result.volume.array

    found: dict[str, Method] = {f"medfusion {name}": partial(with_sigma, prior=p) for name, p in priors.items()}
    found[f"medfusion {SETS[set_name]}, own sigma"] = blind
    found[f"medfusion {SETS[set_name]}, high quality"] = partial(with_sigma, prior=first, high_quality=True)
    return found


def measured(method: Method, noisy: Noisy) -> tuple[np.ndarray, float, float]:
    """The result, CPU seconds, and MiB of memory at its peak above what was used before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory_mib("VmRSS"), time.process_time()
    result = np.asarray(method(noisy), np.float32)
    return result, time.process_time() - began, memory_mib("VmHWM") - before


def memory_mib(what: str) -> float:
    """A line of the process's status."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return float(line.split()[1]) / 1024


def lesion_contrast(image: np.ndarray, lesions: np.ndarray, mask: np.ndarray) -> float:
    """Mean of the lesions less that of the ring from two to four voxels around them, within the mask."""
    ring = ndimage.binary_dilation(lesions, iterations=4) & ~ndimage.binary_dilation(lesions, iterations=2) & mask
    return float(image[lesions].mean() - image[ring].mean())


def quality(name: str, paths: list[tuple], arguments: argparse.Namespace, known: set) -> Iterator[Row]:
    """A row for every scan, noise and method of a set that is not ``known``."""
    told: dict[str, float] = {}
    rivals: dict[str, Method] = {"noisy input": lambda noisy: unbiased(noisy.array, noisy)}
    rivals |= {peer: PEERS[peer][1] for peer in arguments.peers} | ours(name, arguments.priors, told)
    for path, beside, lesion_file in paths:
        clean, mask, lesions = load(path, beside, lesion_file)
        pictures, shown = {"truth": clean}, ("noisy input", "scikit-image NLM", "BM4D", f"medfusion {SETS[name]}")
        for code in arguments.noise:
            todo = [method for method in rivals if (name, clean.name, code, method) not in known]
            noisy = add_noise(clean, mask, code) if todo else None
            for method in todo:
                assert noisy is not None
                told.clear()
                result, seconds, peak = measured(rivals[method], noisy)
                _, similarity = structural_similarity(clean.array, result, data_range=1.0, full=True)
                kept: str | float = ""
                if lesions.any():
                    kept = lesion_contrast(result, lesions, mask) / lesion_contrast(clean.array, lesions, mask)
                megavoxels, db = clean.array.size / 1e6, psnr(clean.array, result, mask, 1.0)
                values = (name, clean.name, code, method, db, float(similarity[mask].mean()), seconds, peak, megavoxels)
                yield dict(zip(COLUMNS, (*values, told.get("sigma_ratio", ""), kept), strict=True))
                if method in shown:
                    pictures[method] = clean.with_array(result)
        if len(pictures) > 1:
            (arguments.out / f"{name}.png").write_bytes(comparison_figure(pictures))


def retest(arguments: argparse.Namespace) -> None:
    """PSNR of the first scan to the second one, registered and matched in brightness, before and after denoising."""
    prior, pairs = Prior.load(SETS["retest"]), sorted((data() / "oasis_t1_1mm/retest").iterdir())
    rows = []
    for pair in pairs[: arguments.subjects]:
        first, second = pair.name.split("_")
        scan, mask, _ = load(pair / f"{first}_SS.nii.gz", pair / f"{first}_mask.nii.gz")
        again = registered(load(pair / f"{second}_SS.nii.gz", None)[0], scan)
        mask &= again > 0
        noise = volume_noise(scan, prior)
        noisy = Noisy(scan, "real", noise.sigma, noise.kind == "rician", again, mask)
        methods: dict[str, Method] = {"first scan": lambda noisy: noisy.array}
        methods |= {peer: PEERS[peer][1] for peer in arguments.peers}
        methods["medfusion"] = lambda noisy, noise=noise: denoise_volume(noisy.volume, prior, noise=noise).volume.array
        for name, method in methods.items():
            result = np.asarray(method(noisy), np.float32)
            slope, offset = np.polyfit(again[mask].astype(np.float64), result[mask], 1)
            rows.append((pair.name, name, psnr(offset + slope * again, result, mask, 1.0)))
        print(f"{pair.name}: sigma {noise.sigma:.4f} {noise.kind}, neighbours share {noise.shared:.0%}", flush=True)
    print_means("PSNR to the second scan, dB", rows)


def registered(moving: Volume, fixed: Volume) -> np.ndarray:
    """``moving`` on the grid of ``fixed``, after a rigid registration by correlation (SimpleITK)."""
    import SimpleITK as sitk

    images = []
    for volume in (fixed, moving):
        image = sitk.GetImageFromArray(volume.array.astype(np.float32).transpose(2, 1, 0))
        image.SetSpacing([float(s) for s in volume.spacing])
        images.append(image)
    start = sitk.CenteredTransformInitializer(
        *images, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetOptimizerAsRegularStepGradientDescent(0.5, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    method.SetInitialTransform(start, inPlace=True)
    method.SetInterpolator(sitk.sitkLinear)
    method.Execute(*images)
    resampled = sitk.Resample(images[1], images[0], start, sitk.sitkBSpline, 0.0)
    return sitk.GetArrayFromImage(resampled).transpose(2, 1, 0)


def template() -> None:
    """What denoising does to a clean scan."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    prior = Prior.load(SETS["template"])
    for resolution in (2, 1):
        image = load_mni152_template(resolution=resolution)
        volume = Volume(np.asarray(image.get_fdata(), np.float32), image.affine, f"MNI152 at {resolution} mm")
        result = denoise_volume(volume, prior)
        mask = load_mni152_brain_mask(resolution=resolution).get_fdata() > 0
        same = np.array_equal(result.volume.array, volume.array)
        change = (
            "unchanged"
            if same
            else f"{psnr(volume.array, result.volume.array, mask, volume.array.max()):.2f} dB to itself"
        )
        print(f"{volume.name}: sigma {result.noise.sigma / volume.array.max():.4f} of the highest value: {change}")


def coverage(arguments: argparse.Namespace) -> None:
    """How many voxels of the mask lie within Student's 90 % interval of DRAWS samples about the posterior mean."""
    prior, rows = Prior.load(SETS["coverage"]), []
    reach = stats.t.ppf(0.95, DRAWS - 1)
    for path, beside, _ in scans_of("coverage", data())[: arguments.subjects]:
        clean, mask, _ = load(path, beside)
        for code in arguments.noise:
            noisy = add_noise(clean, mask, code)
            noise = Noise(noisy.sigma, "rician" if noisy.rician else "gaussian")
            result = denoise_volume(noisy.volume, prior, noise=noise, samples=DRAWS)
            error, std = (result.volume.array - clean.array)[mask], result.std.array[mask]
            rows.append((clean.name, f"{code}, share inside", float(np.mean(np.abs(error) <= reach * std))))
            rows.append(
                (clean.name, f"{code}, variance over squared error", float(np.mean(std**2) / np.mean(error**2)))
            )
            print(*rows[-2:], flush=True)
    print_means("90 % intervals of posterior samples", rows, digits=3)


def adaptation(arguments: argparse.Namespace) -> None:
    """PSNR before and after the prior was adapted to the noisy scan itself, and the risk that SURE gave."""
    rows = []
    for name in ("oasis-2mm", "contrasts", "ct"):
        prior, (path, beside, _) = Prior.load(SETS[name]), scans_of(name, data())[0]
        clean, mask, _ = load(path, beside)
        for code in arguments.noise:
            noisy = add_noise(clean, mask, code)
            noise = Noise(noisy.sigma, "rician" if noisy.rician else "gaussian")
            found = adapt([noisy.volume], [noise], prior, MINUTES)
            print(f"{name} {code}: risk {found.before:.4f}, then {found.after:.4f}; kept: {found.kept}", flush=True)
            for label, each in (("before", prior), ("after", found.prior)):
                result = denoise_volume(noisy.volume, each, noise=noise).volume.array
                rows.append((f"{name} {code}", label, psnr(clean.array, result, mask, 1.0)))
    print_means("PSNR, dB", rows)


def large(out: Path) -> None:
    """What the command takes for a long CT: the slices of a short one, up and down, each enlarged, with white noise."""
    scan = read(discover(data() / "ct/abdomen_3mm.nii.gz")[0])
    slices = np.pad(np.arange(scan.shape[2]), (0, 600 - scan.shape[2]), mode="reflect")
    enlarged = ndimage.zoom(scan.array.astype(np.float32), (512 / scan.shape[0], 512 / scan.shape[1], 1), order=1)
    noisy = enlarged[:, :, slices] + np.random.default_rng(SEED).normal(0, 25, (512, 512, 600)).astype(np.float32)
    path = out / "large.nii.gz"
    write_nifti(Volume(noisy.round().astype(np.int16), np.diag([0.8, 0.8, 1.0, 1.0]), "large"), path, overwrite=True)
    began = time.monotonic()
    command = ["medfusion", "denoise", str(path), str(out / "large"), "--prior", SETS["large"], "--overwrite"]
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"large: {(time.monotonic() - began) / 60:.1f} minutes, {peak:.2f} GB at the peak")


def data() -> Path:
    """The folder of scans."""
    return Path(os.environ["MEDFUSION_DATA"])


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    installed = [name for name, (package, _) in PEERS.items() if find_spec(package)]
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["ixi"])
    parser.add_argument("--subjects", type=int, default=6)
    parser.add_argument("--noise", nargs="+", default=["g3", "g5", "g10", "g20", "r5", "r10"])
    parser.add_argument("--priors", nargs="*", default=[], help="further ones, shipped or files")
    parser.add_argument("--peers", nargs="*", choices=installed, default=installed)
    parser.add_argument("--out", type=Path, default=Path("runs/denoise"))
    arguments = parser.parse_args()
    if "MEDFUSION_DATA" not in os.environ:
        parser.error("set MEDFUSION_DATA to the folder of scans")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        if name == "retest":
            retest(arguments)
        elif name == "template":
            template()
        elif name == "coverage":
            coverage(arguments)
        elif name == "adapt":
            adaptation(arguments)
        elif name == "large":
            large(arguments.out)
        else:
            paths = scans_of(name, data())[: arguments.subjects]
            print_set(name, collected(name, paths, arguments))


def collected(name: str, paths: list[tuple], arguments: argparse.Namespace) -> list[Row]:
    """The rows of a set, those that were made now added to the file."""
    path = arguments.out / "results.csv"
    rows: list[Row] = list(csv.DictReader(path.open())) if path.exists() else []
    known = {tuple(row[c] for c in COLUMNS[:4]) for row in rows}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for row in quality(name, paths, arguments, known):
            writer.writerow(row)
            file.flush()
            rows.append(row)
            print(
                f"{row['scan']} {row['noise']} {row['method']}: {row['psnr_db']:.2f} dB {row['sigma_ratio']}",
                flush=True,
            )
    return [row for row in rows if row["set"] == name]


def print_set(name: str, rows: list[Row]) -> None:
    """Means over the scans for each method and noise, the cost of each method, and what sigma was told."""
    codes = list(dict.fromkeys(str(row["noise"]) for row in rows))
    columns = [("psnr_db", "PSNR in the mask, dB", 2), ("ssim", "SSIM in the mask", 3)]
    columns += [("lesions", "Contrast of lesions, of the clean scan's", 3)] * any(row["lesions"] != "" for row in rows)
    columns += [("sigma_ratio", "Own sigma over the true one", 3)]
    for column, what, digits in columns:
        table = Table(
            title=f"{name}: {what}, mean of {len({row['scan'] for row in rows})} scan(s)", title_justify="left"
        )
        for head in ("method", *codes, *(["CPU s/Mvoxel", "peak MiB"] if column == "psnr_db" else [])):
            table.add_column(head, justify="left" if head == "method" else "right")
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method and row[column] != ""]
            if not mine:
                continue
            cells = [[float(row[column]) for row in mine if row["noise"] == code] for code in codes]
            cost = np.mean([float(row["cpu_s"]) / float(row["megavoxels"]) for row in mine])
            costs = [f"{cost:.2f}", f"{max(float(row['peak_mib']) for row in mine):.0f}"] * (column == "psnr_db")
            table.add_row(str(method), *(f"{np.mean(cell):.{digits}f}" if cell else "" for cell in cells), *costs)
        Console(width=140).print(table)


def print_means(title: str, rows: list[tuple[str, str, float]], digits: int = 2) -> None:
    """A line for each method, a column for each case."""
    cases = list(dict.fromkeys(case for case, _, _ in rows))
    table = Table(title=title, title_justify="left")
    for head in ("", *cases, "mean"):
        table.add_column(head, justify="right" if head else "left")
    for method in dict.fromkeys(method for _, method, _ in rows):
        values = [value for _, name, value in rows if name == method]
        table.add_row(method, *(f"{value:.{digits}f}" for value in values), f"{np.mean(values):.{digits}f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
