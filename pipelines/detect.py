"""How well anomalies are found without any lesion to learn from, beside simple baselines, with intervals.

    MEDFUSION_DATA=... OMP_NUM_THREADS=2 python pipelines/detect.py --sets implants control healthy lesions price

Heads are `ixi_t1_2mm/SPLIT`, shapes of lesions `stroke_masks/SPLIT`; report `--split dev`, choose settings on `train`.
Nothing here is fitted to the heads that are measured. Sets (`--sets`):
  implants   every second head with 1 to 5 lesions, dark, bright and textured, of sizes drawn from SHAPES_ML, one
             connected part each; the others as they are. Then each kind alone, without what lies around other kinds
  control    all heads as they are, the truth of implants that change no intensity: AUROC has to be 0.5
  healthy    all heads as they are: shares of voxels and scans with low p, false findings
  lesions    T1 and FLAIR of `ms_lesions/patient26`, FLAIR and T1 with contrast agent of `glioma`, skull-stripped at
             1 mm, beside brightness alone: x, and |x - median| / MAD in the brain
  price      what one head costs in a process of its own: evaluations of the network, seconds once all is loaded, peak
             memory of the process (Linux); and AUPRC in `implants`. Compare times of one run on an idle machine only
  draws      the default method with `--draws` draws of noise, each calibrated on the first `--calibrate` heads of
             `ixi_t1_2mm/train`: what each further evaluation buys in AUPRC

Voxels and lesions count within the brain (labels > 0). A method is a name, or NAME@PRIOR for that of another prior,
such as a latent one for `autoencoder`. Without `--methods`: all for which `--prior` has a healthy reference.

Prints the tables of `medfusion evaluate detect`. What was measured of each scan is kept in OUT/cases, a file a scan and
method, and not made again: another `--out`, or an emptied one, after a change of code. OUT also receives pictures,
`SCAN_METHOD.png`: the truth outlined, the anomaly as heat.
"""

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from medfusion.cli.evaluate import show_summary
from medfusion.data.lesions import implant, place
from medfusion.errors import MedfusionError
from medfusion.io import discover, read
from medfusion.metrics.detection import auroc, average_precision, best_dice, compact, regions, voxel_counts
from medfusion.prior import Prior, prior_path
from medfusion.reference import CLUSTER_P
from medfusion.report.figures import slice_figure
from medfusion.tasks.calibrate import gather, make_reference
from medfusion.tasks.detect import Detection, detect_volume
from medfusion.tasks.evaluate_detection import pick_methods
from medfusion.tasks.measure_detection import CaseResult, measure_case, summarise, whole
from medfusion.tasks.rebuild import METHODS
from medfusion.volume import Volume

SEED = 2024
KINDS = ("dark", "bright", "textured")
LEAST_ML = 0.5  # of truth on the head's grid
SHAPES_ML = ((0.6, 2.0), (2.0, 8.0), (8.0, 30.0), (30.0, 100.0))  # of shapes, one range drawn for each lesion
STRENGTH = (0.6, 1.0)
TRIES = 20  # shapes and places for one lesion
APART = 3  # voxels between lesions, and around those of other kinds that are left out
PICTURED = 4  # heads of the implants
SETS = ("implants", "control", "healthy", "lesions", "price", "draws")
Views = dict[str, tuple[np.ndarray, np.ndarray]]  # name to truth and to where it counts, (i, j, k) each
Load = Callable[[], tuple[Volume, Views]]
Methods = dict[str, tuple[Prior, str, Path]]  # label to prior, name of the method, and the prior's file


def heads(arguments: argparse.Namespace) -> list[tuple[int, str, Path]]:
    """Number, name and T1 scan of the heads of the split."""
    files = sorted((data() / "ixi_t1_2mm" / arguments.split).glob("*_T1.nii.gz"))
    found = [(number, f"{arguments.split}_{file.name[:-10]}", file) for number, file in enumerate(files)]
    return found[arguments.skip :][: arguments.subjects]


def load_head(path: Path) -> tuple[Volume, Volume]:
    """A scan and its brain."""
    scan = read(discover(path)[0])
    labels = read(discover(path.with_name(path.name.replace("_T1", "_labels")))[0])
    return scan, scan.with_array((labels.array > 0).astype(np.uint8))


def load_shape(file: Path) -> Volume:
    """The largest connected part of a lesion: the others would count as lesions of their own."""
    shape = read(discover(file)[0])
    labels, _ = regions(shape.array)
    return shape.with_array((labels == np.bincount(labels.ravel())[1:].argmax() + 1).astype(np.uint8))


@cache
def shapes(split: str) -> dict[tuple[float, float], list[Path]]:
    """The files of shapes of each range of sizes."""
    found: dict[tuple[float, float], list[Path]] = {sizes: [] for sizes in SHAPES_ML}
    for file in sorted((data() / "stroke_masks" / split).glob("*.nii.gz")):
        shape = load_shape(file)
        ml = float((shape.array > 0).sum()) * shape.voxel_ml
        for low, high in SHAPES_ML:
            if low <= ml < high:
                found[low, high].append(file)
    return found


def with_lesions(scan: Volume, brain: Volume, number: int, kinds: tuple[str, ...], split: str) -> tuple[Volume, Views]:
    """The ``number``-th head with one to five lesions; views "all" and of each kind."""
    rng = np.random.default_rng((SEED, number))
    inside = brain.array > 0
    truths = {kind: np.zeros(scan.shape, bool) for kind in kinds}
    for lesion in range(rng.integers(1, 6)):
        taken = ndimage.binary_dilation(np.any(list(truths.values()), axis=0), iterations=APART)
        kind, size = kinds[(number + lesion) % len(kinds)], SHAPES_ML[rng.integers(len(SHAPES_ML))]
        for _ in range(TRIES):
            files = shapes(split)[size]
            try:
                weights = place(load_shape(files[rng.integers(len(files))]), brain, rng)
            except MedfusionError:  # too small for the grid, or it does not fit
                continue
            _, parts = regions(weights >= 0.5)
            filled = float((weights >= 0.5).sum()) * scan.voxel_ml
            if parts == 1 and filled >= LEAST_ML and not (taken & (weights > 0)).any():
                scan, truth = implant(scan, inside, weights, kind, rng.uniform(*STRENGTH), rng)
                truths[kind] |= truth > 0
                break
    views = {"all": (np.any(list(truths.values()), axis=0), inside)}
    for kind, truth in truths.items():
        others = np.any([other for name, other in truths.items() if name != kind] or [~inside], axis=0)
        views[kind] = truth, inside & ~ndimage.binary_dilation(others & inside, iterations=APART)
    return scan, views


def ill(path: Path, number: int, split: str) -> tuple[Volume, Views]:
    """A head with lesions that can be seen."""
    scan, views = with_lesions(*load_head(path), number, KINDS, split)
    return replace(scan, name=f"{scan.name}_ill"), views


def healthy(path: Path, number: int, split: str) -> tuple[Volume, Views]:
    """A head as it is; view "healthy", and "control" with the truth of lesions that change nothing."""
    scan, brain = load_head(path)
    unchanged, views = with_lesions(scan, brain, number, ("unchanged",), split)
    assert np.array_equal(unchanged.array, scan.array)
    return scan, {"healthy": (np.zeros(scan.shape, bool), brain.array > 0), "control": views["all"]}


def load_lesions(file: Path, truth: Path, mask: Path | None) -> tuple[Volume, Views]:
    """A skull-stripped scan, 0 outside of the brain, and its lesions."""
    scan = read(discover(file)[0])
    inside = scan.array != scan.array.flat[0] if mask is None else read(discover(mask)[0]).array > 0.5
    array = scan.array.astype(np.float32)
    if mask is not None:  # z-scores of the brain
        array -= array[inside].min()
    array = np.where(inside, np.maximum(array, 0), 0)
    lesions = read(discover(truth)[0]).array > 0
    return scan.with_array(array, name=f"{file.parent.name}_{file.name.split('_')[0].split('.')[0]}"), {
        "lesions": (lesions & inside, inside)
    }


def real() -> list[Load]:
    """Scans with lesions of patients."""
    ms, glioma = data() / "ms_lesions/patient26", data() / "glioma/brats_2013_pat0001_1"
    found = [partial(load_lesions, ms / f"{name}.nii.gz", ms / "lesions.nii.gz", None) for name in ("T1", "FLAIR")]
    tumour, mask = glioma / "OTMultiClass.nii.gz", glioma / "brainmask.nii.gz"
    return found + [
        partial(load_lesions, glioma / f"{name}_subtrMeanDivStd.nii.gz", tumour, mask) for name in ("T1c", "Flair")
    ]


def measured(
    name: str, load: Load, methods: Methods, out: Path, *, picture: str = "", unlike: bool = False
) -> dict[str, list[CaseResult]]:
    """The results of each view of a scan, one of each method; ``picture`` is the view to draw, if any."""
    found: dict[str, list[CaseResult]] = {}
    loaded: tuple[Volume, Views] | None = None
    for label, (prior, method, file) in methods.items():
        plain = f"{name}_{label}".replace("/", "-")
        path = out / "cases" / f"{plain}_{file_key(file)}.npz"
        if not path.exists():
            scan, views = loaded = loaded or load()
            began = time.perf_counter()
            detection = detect_volume(scan, prior, method=method, unlike=unlike, seed=SEED)
            measure = partial(measure_case, detection, method=label, seconds=time.perf_counter() - began)
            results = {view: measure(truth, inside=inside) for view, (truth, inside) in views.items()}
            save(path, results)
            print(plain, *(f"{view} {auprc(result):.3f}" for view, result in results.items()), flush=True)
            if picture:
                (out / f"{plain}.png").write_bytes(draw(scan, detection, views[picture][0]))
        for view, result in load_results(path).items():
            found.setdefault(view, []).append(result)
    return found


def draw(scan: Volume, found: Detection, truth: np.ndarray) -> bytes:
    """The anomaly that one in a thousand healthy voxels reaches, and above, as heat; the truth outlined."""
    heat = found.anomaly.array
    common = float(heat[found.p_value.array > CLUSTER_P].max())
    return slice_figure(scan, overlay=heat, threshold=common, overlay_label="anomaly", mask=truth)


def auprc(result: CaseResult) -> float:
    return float(average_precision(whole(result.counts)))


def save(path: Path, results: dict[str, CaseResult]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{view}/{name}": value for view, result in results.items() for name, value in vars(result).items()}
    partly = path.with_suffix(".part.npz")
    np.savez_compressed(partly, **arrays)
    partly.rename(path)


def load_results(path: Path) -> dict[str, CaseResult]:
    with np.load(path) as file:
        arrays = dict(file)
    views = dict.fromkeys(name.split("/")[0] for name in arrays)
    of = {view: {field.name: arrays[f"{view}/{field.name}"] for field in fields(CaseResult)} for view in views}
    return {view: CaseResult(**{n: v if v.ndim else v.item() for n, v in each.items()}) for view, each in of.items()}


def methods_of(arguments: argparse.Namespace) -> Methods:
    """Those asked for, or all that the prior has a healthy reference for."""
    own = Prior.load(arguments.prior)
    known = arguments.methods or pick_methods(own)
    found = {}
    for label in known:
        name, _, other = label.partition("@")
        prior = Prior.load(other) if other else own
        shown = f"{name} ({prior.name})" if other else name
        found[shown] = prior, name, prior_path(other or arguments.prior)
    return found


@cache
def file_key(path: Path) -> str:
    """Tells one prior from another of the same name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def show(title: str, results: list[CaseResult]) -> None:
    """The tables of ``medfusion evaluate detect``."""
    show_summary(summarise(results), title, Console(width=120))


def implanted(methods: Methods, arguments: argparse.Namespace) -> dict[str, list[CaseResult]]:
    """The results of every view of the implants; each has every second head as it is."""
    found: dict[str, list[CaseResult]] = {view: [] for view in ("all", *KINDS)}
    for number, name, path in heads(arguments):
        if number % 2:
            views = measured(name, partial(healthy, path, number, arguments.split), methods, arguments.out)
        else:
            load, picture = partial(ill, path, number, arguments.split), "all" if number < 2 * PICTURED else ""
            views = measured(f"{name}_ill", load, methods, arguments.out, picture=picture)
        for view, results in found.items():
            of_head = views["healthy" if number % 2 else view]
            if number % 2 or of_head[0].ill:  # with lesions of other kinds alone it is neither ill nor healthy
                results.extend(of_head)
    return found


def as_they_are(methods: Methods, arguments: argparse.Namespace, view: str) -> list[CaseResult]:
    """The results of all heads without lesions."""
    loads = ((name, partial(healthy, path, number, arguments.split)) for number, name, path in heads(arguments))
    return [result for name, load in loads for result in measured(name, load, methods, arguments.out)[view]]


def lesions(methods: Methods, arguments: argparse.Namespace) -> None:
    """Real lesions, a table a scan: one patient each, so no intervals."""
    for load in real():
        scan, views = load()
        truth, inside = views["lesions"]
        table = Table(
            title=f"{scan.name}: {truth.sum() * scan.voxel_ml:.1f} ml of lesions; by chance AUPRC is "
            f"{truth.sum() / inside.sum():.4f}",
            title_justify="left",
        )
        for head in ("method", "AUPRC", "AUROC", "best Dice", "Dice of the mask", "lesions found", "false findings"):
            table.add_column(head, justify="left" if head == "method" else "right")
        middle = np.median(scan.array[inside])
        apart = np.abs(scan.array - middle)
        plain = {"|x - median| / MAD": apart / np.median(apart[inside]), "brightness": scan.array}
        for name, score in plain.items():
            table.add_row(name, *_ranking(*compact(voxel_counts(score, truth, inside))), "", "", "")
        results = measured(scan.name, load, methods, arguments.out, picture="lesions", unlike=True)
        for result in results["lesions"]:
            both, mask, true = result.overlap
            found = f"{result.found.sum()} of {len(result.found)}"
            written = f"{2 * both / (mask + true):.3f}", found, f"{result.false_findings}"
            table.add_row(result.method, *_ranking(whole(result.counts), result.values), *written)
        Console(width=120).print(table)


def _ranking(counts: np.ndarray, values: np.ndarray) -> list[str]:
    ranks = average_precision(counts), auroc(counts), best_dice(counts, values)[0]
    return [f"{float(rank):.3f}" for rank in ranks]


def price(methods: Methods, arguments: argparse.Namespace) -> None:
    """What one scan costs with each method, in a process of its own, beside AUPRC."""
    done, (_, _, head) = summarise(implanted(methods, arguments)["all"]), heads(arguments)[0]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    table = Table(title=f"{head.name}, {threads} thread(s)", title_justify="left")
    for column in ("method", "evaluations", "seconds", "CPU seconds", "peak MiB", "AUPRC"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for label, (_, method, file) in methods.items():
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            calls, seconds, used, peak = alone.submit(cost, file, method, head).result()
        found = done.measures[label]["auprc"]
        shown = f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
        table.add_row(label, f"{calls}", f"{seconds:.1f}", f"{used:.1f}", f"{peak:.0f}", shown)
    Console(width=120).print(table)


def cost(file: Path, method: str, head: Path) -> tuple[int, float, float, float]:
    """Evaluations of the network, seconds, CPU seconds of the second scan, and MiB that the process had at most."""
    prior, (scan, _), calls = Prior.load(file), load_head(head), []
    prior.network.register_forward_hook(lambda *_: calls.append(1))
    detect_volume(scan, prior, method=method, seed=SEED)
    first, began, used = len(calls), time.perf_counter(), time.process_time()
    detect_volume(scan, prior, method=method, seed=SEED)
    return first, time.perf_counter() - began, time.process_time() - used, memory_mib("VmHWM")


def memory_mib(what: str) -> float:
    """A line of the process's status."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return float(line.split()[1]) / 1024


def draws(arguments: argparse.Namespace) -> Methods:
    """The default method with each number of draws, calibrated on heads of the training split, as methods."""
    file = arguments.out / f"draws_{file_key(prior_path(arguments.prior))}.safetensors"
    names = {number: f"default, {number} draw(s)" for number in arguments.draws}
    for number, name in names.items():
        METHODS[name] = replace(METHODS["default"], rebuild=partial(METHODS["default"].rebuild, draws=number))
    prior = Prior.load(file if file.exists() else arguments.prior)
    missing = [name for name in names.values() if all(name != reference.method for reference in prior.references)]
    if missing:
        paths = sorted((data() / "ixi_t1_2mm/train").glob("*_T1.nii.gz"))[: arguments.calibrate]
        parts = ((scan, brain.array > 0) for scan, brain in map(load_head, paths))
        cohort = gather(parts, prior, stripped=False, progress=print)
        made = [make_reference(cohort, prior, name, seed=SEED, progress=print) for name in missing]
        prior = replace(prior, references=(*prior.references, *made))
        prior.save(file)
    return {name: (prior, name, file) for name in names.values()}


def data() -> Path:
    """The folder of scans."""
    return Path(os.environ["MEDFUSION_DATA"])


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["implants", "control", "healthy"])
    parser.add_argument("--prior", default="brain-t1", help="shipped, or a file, with healthy references")
    parser.add_argument("--methods", nargs="+", default=[], help="the first one is compared with the others")
    parser.add_argument("--split", choices=("dev", "train"), default="dev")
    parser.add_argument("--subjects", type=int, default=23)
    parser.add_argument("--skip", type=int, default=0, help="heads to pass over, such as those of the reference")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--calibrate", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/detect"))
    arguments = parser.parse_args()
    if "MEDFUSION_DATA" not in os.environ:
        parser.error("set MEDFUSION_DATA to the folder of scans")
    arguments.out.mkdir(parents=True, exist_ok=True)
    methods = methods_of(arguments)
    for name in arguments.sets:
        if name == "implants":
            for view, results in implanted(methods, arguments).items():
                show(f"Implants, {view}", results)
        elif name in ("control", "healthy"):
            show(name.capitalize(), as_they_are(methods, arguments, name))
        elif name == "lesions":
            lesions(methods, arguments)
        elif name == "price":
            price(methods, arguments)
        else:
            show("Draws", implanted(draws(arguments), arguments)["all"])


if __name__ == "__main__":
    main()
