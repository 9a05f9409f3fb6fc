"""Our training loop beside that of MONAI's 3D DDPM tutorial: one run, one machine, one after the other.

    MEDFUSION_DATA=... python benchmarks/training.py [--minutes 20] [--device cuda] [--out runs/benchmark_training]

Scans: `ixi_t1_2mm/train`, eight of them held out, the same for both; crops of one size for both. Each loop runs in a
process of its own. Ours is `medfusion.training.train` with `configs/brain_t1.yaml`: its learning rate follows the
number of steps, so a twentieth of the time goes into timing a step (and counts), and the number that fills the rest is
chosen. The peer then gets the wall time that ours took. Reading and preparing the scans is reported apart.

The peer follows the tutorial: `DiffusionModelUNet` at full resolution, two residual blocks a level, attention at the
last, epsilon-prediction on a scaled linear schedule of 1000 steps, mean squared error, Adam 5e-5, float32,
`CacheDataset`; random crops take the place of its resizing to 32x40x32. In its favour: scans go from -1 to +1 as ours
do, not from 0 to 1, so that twice as much noise stands for the same percentage and more of its times serve denoising;
it denoises tiles of the training size, blended, because group normalisation and attention know no other; on a CPU it
has (32, 64, 128) channels, because a step of one crop with the tutorial's (256, 256, 512) takes minutes on one core.

Noise of 5, 10 and 20 % of the 99.5th percentile is added to the held-out scans; both are told its level and answer with
the posterior mean in one evaluation. PSNR (data range 1) is taken inside `labels > 0`. Share of peak: FLOPs of the
network's forward and backward pass (none for zero padding) over those of the device, the dense bfloat16 rate of a GPU,
or what a matrix product in the same arithmetic reaches on this CPU. OUT receives `training.json`.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import DiffusionInferer, sliding_window_inference
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from monai.transforms import Compose, EnsureChannelFirstd, Lambdad, LoadImaged, Orientationd, RandSpatialCropd
from monai.utils import set_determinism
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from medfusion.config import load_config
from medfusion.data.crops import Case, split
from medfusion.data.grid import canonical
from medfusion.data.intensity import measure_scale
from medfusion.io import Series, discover, read
from medfusion.metrics import psnr
from medfusion.prior import build_network, fast_bfloat16
from medfusion.tasks.denoise import denoise_volume
from medfusion.tasks.noise import Noise
from medfusion.training import load_cases, train
from medfusion.volume import Volume

CONFIG = Path(__file__).parents[1] / "configs" / "brain_t1.yaml"
BATCH = {"cpu": (3, 1), "cuda": (64, 16)}  # crops, ours and theirs: where time is short, many small steps teach most
CHANNELS = {"cpu": (32, 64, 128), "cuda": (256, 256, 512)}  # of the peer
LEVELS = (0.05, 0.10, 0.20)
FASTER, BETTER = 8.0, 1.0  # the bars: times the voxels/s, and dB more at every level
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, by part of the name
TIMING_SHARE = 0.05  # of the minutes
PERCENTILE = 99.0  # as in the config: the peer's scans are scaled as ours
MARGIN = 4  # voxels around the brain that the peer is shown too
Row = dict[str, Any]
Denoise = Callable[[Volume, float, tuple[slice, ...]], np.ndarray]


class TimedOut(Exception):
    """Ends the run that only times a step."""


def folder() -> Path:
    """Of the scans."""
    return Path(os.environ["MEDFUSION_DATA"]) / "ixi_t1_2mm/train"


def halves(scans: int) -> tuple[list[Series], list[Series]]:
    """Training and held-out scans, those that our training would hold out: eight, or a quarter where there are few."""
    found = discover(folder(), pattern="*_T1.nii.gz")[:scans]
    names = sorted(series.name for series in found)
    away = set(np.random.default_rng(0).permutation(names)[: min(8, max(1, len(found) // 4))])
    return [series for series in found if series.name not in away], [series for series in found if series.name in away]


def ours(arguments: argparse.Namespace) -> Row:
    """Train and judge our prior."""
    device, (batch, _) = torch.device(arguments.device), BATCH[arguments.device]
    training, judged = halves(arguments.scans)
    changes = [f"data.crop={arguments.crop}", f"training.batch={batch}", f"data.validation={len(judged)}"]
    names = {series.name for series in training + judged}
    others = [series.name for series in discover(folder(), pattern="*_T1.nii.gz") if series.name not in names]
    cache = arguments.out / "cache"
    shutil.rmtree(cache, ignore_errors=True)  # of an earlier run, which would make the preparation look free
    began = time.perf_counter()
    cases, _ = load_cases(folder(), load_config(arguments.config, changes), cache=cache, exclude=others)
    prepared = time.perf_counter() - began
    if {case.name for case in split(cases, len(judged), 0)[1]} != {series.name for series in judged}:
        raise SystemExit("some of the scans are copies of others: the two loops would hold out different ones")
    timing, steps = steps_that_fit(cases, changes, arguments)
    config = load_config(arguments.config, [*changes, f"training.steps={steps}", f"training.validate_every={steps}"])
    prior = train(cases, config, arguments.out / "ours", data="IXI", device=arguments.device)
    peak = peak_memory(device)
    rows = [json.loads(line) for line in (arguments.out / "ours" / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "loss" in row][-1]  # up to the last step, without the last validation
    dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    flops = flops_a_crop(build_network(config).to(device), arguments.crop, torch.zeros(1, device=device))
    return {
        "prepared": prepared,
        "seconds": timing + seconds,
        "steps": steps,
        "voxels/s": steps * batch * arguments.crop**3 / seconds,
        "memory": peak,
        "waiting": prior.provenance["waiting_for_data"],
        "arithmetic": prior.provenance["arithmetic"],
        "share of peak": flops * steps * batch / seconds / peak_flops(device, dtype),
        "psnr": judge(judged, lambda noisy, sigma, box: denoise_volume(noisy, prior, noise=Noise(sigma)).volume.array),
    }


def steps_that_fit(cases: list[Case], changes: list[str], arguments: argparse.Namespace) -> tuple[float, int]:
    """Seconds spent on timing a step, and how many steps fill the rest of the minutes."""
    config, ends = load_config(arguments.config, [*changes, "training.steps=1000000"]), list[float]()
    began, budget = time.perf_counter(), 60 * arguments.minutes

    def note(state: object) -> None:
        ends.append(time.perf_counter())
        if len(ends) > 2 and ends[-1] - began > TIMING_SHARE * budget:
            raise TimedOut

    with suppress(TimedOut):
        train(cases, config, arguments.out / "timing", device=arguments.device, progress=note)
    timing = time.perf_counter() - began
    return timing, max(1, int((budget - timing) * (len(ends) - 1) / (ends[-1] - ends[0])))


def theirs(arguments: argparse.Namespace, allowed: float) -> Row:
    """The tutorial's loop for so many seconds of wall time."""
    set_determinism(0)
    device, (_, batch) = torch.device(arguments.device), BATCH[arguments.device]
    training, judged = halves(arguments.scans)
    began = time.perf_counter()
    batches = endless(tutorial_loader([series.files[0] for series in training], arguments.crop, batch, device))
    prepared = time.perf_counter() - began
    network = tutorial_network(arguments.channels).to(device)
    scheduler = DDPMScheduler(1000, schedule="scaled_linear_beta", beta_start=0.0005, beta_end=0.0195)
    inferer, optimizer = DiffusionInferer(scheduler), torch.optim.Adam(network.parameters(), lr=5e-5)
    waited, steps, crops, began = 0.0, 0, 0, time.perf_counter()
    while time.perf_counter() - began < allowed:
        asked = time.perf_counter()
        images = next(batches).to(device)
        waited += time.perf_counter() - asked
        optimizer.zero_grad(set_to_none=True)
        noise = torch.randn_like(images)
        k = torch.randint(0, 1000, (len(images),), device=device)
        loss = F.mse_loss(inferer(inputs=images, diffusion_model=network, noise=noise, timesteps=k), noise)
        loss.backward()
        optimizer.step()
        loss.item()  # the tutorial shows it at every step
        steps, crops = steps + 1, crops + len(images)
    seconds, peak = time.perf_counter() - began, peak_memory(device)
    flops = flops_a_crop(network, arguments.crop, torch.zeros(1, dtype=torch.long, device=device))
    return {
        "prepared": prepared,
        "seconds": seconds,
        "steps": steps,
        "voxels/s": crops * arguments.crop**3 / seconds,
        "memory": peak,
        "waiting": waited / seconds,
        "arithmetic": "float32",
        "share of peak": flops * crops / seconds / peak_flops(device, torch.float32),
        "psnr": judge(judged, tutorial_denoiser(network.eval(), scheduler, arguments.crop)),
    }


def tutorial_network(channels: tuple[int, ...]) -> DiffusionModelUNet:
    """Residual blocks, attention and heads of the tutorial."""
    attention = [level == len(channels) - 1 for level in range(len(channels))]
    return DiffusionModelUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=channels,
        attention_levels=attention,
        num_head_channels=[channels[-1] * here for here in attention],
        num_res_blocks=2,
    )


def tutorial_loader(paths: list[Path], crop: int, batch: int, device: torch.device) -> DataLoader:
    """Whole scans in a cache, a random crop of each in every epoch."""
    transforms = [
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        Orientationd("image", "RAS", labels=None),
        Lambdad("image", scaled),
        RandSpatialCropd("image", [crop] * 3, random_size=False),
    ]
    scans = CacheDataset([{"image": str(path)} for path in paths], Compose(transforms), progress=False)
    workers = 8 if device.type == "cuda" else 0  # on a CPU they would take the trainer's cores
    return DataLoader(scans, workers, batch_size=batch, shuffle=True, persistent_workers=workers > 0)


def scaled(image: Tensor) -> Tensor:
    """(1, d, h, w) in the scan's units to -1 (air) to +1 (bright tissue)."""
    array = np.ascontiguousarray(image[0])
    return torch.from_numpy(measure_scale(array, PERCENTILE).apply(array))[None]


def endless(loader: DataLoader) -> Iterator[Tensor]:
    """Epoch after epoch."""
    while True:
        for batch in loader:
            yield batch["image"]


def tutorial_denoiser(network: DiffusionModelUNet, scheduler: DDPMScheduler, crop: int) -> Denoise:
    """(x_t - sigma eps) / alpha at the step whose noise ratio is nearest, tile by tile over the brain's box."""
    device = next(network.parameters()).device
    alpha_bar = scheduler.alphas_cumprod
    ratios = ((1 - alpha_bar) / alpha_bar).sqrt()

    def denoise(noisy: Volume, sigma: float, box: tuple[slice, ...]) -> np.ndarray:
        scale = measure_scale(noisy.array, PERCENTILE)
        k = int((ratios.log() - math.log(sigma * 2 / (scale.high - scale.low))).abs().argmin())

        def posterior_mean(x: Tensor) -> Tensor:
            return x - ratios[k].to(x) * network(x * alpha_bar[k].sqrt().to(x), torch.full((len(x),), k, device=device))

        result, image = noisy.array.copy(), torch.from_numpy(scale.apply(noisy.array[box]))[None, None].to(device)
        with torch.no_grad():
            clean = sliding_window_inference(image, (crop,) * 3, 4, posterior_mean, overlap=0.25, mode="gaussian")
        result[box] = scale.invert(clean[0, 0].cpu().numpy())
        return result

    return denoise


def judge(scans: list[Series], denoise: Denoise) -> dict[str, dict[str, float]]:
    """Noise level to the mean PSNR in the brain before and after, with the same noise whoever denoises."""
    pairs: dict[str, list[list[float]]] = {f"{level:g}": [] for level in LEVELS}
    for index, series in enumerate(scans):
        scan, brain = scan_and_brain(series)
        box = tuple(slice(max(0, i.min() - MARGIN), i.max() + 1 + MARGIN) for i in np.nonzero(brain))
        for level in LEVELS:
            noise = np.random.default_rng((index, round(100 * level))).standard_normal(scan.shape)
            noisy = scan.with_array((scan.array + level * noise).astype(np.float32))
            images = (noisy.array, denoise(noisy, level, box))
            pairs[f"{level:g}"].append([psnr(scan.array, image, brain, 1.0) for image in images])
    means = {level: np.mean(pair, axis=0).tolist() for level, pair in pairs.items()}
    return {level: {"noisy": before, "denoised": after} for level, (before, after) in means.items()}


def scan_and_brain(series: Series) -> tuple[Volume, np.ndarray]:
    """A scan in units of its 99.5th percentile, and its brain mask; RAS axes."""
    [path] = series.files
    scan = canonical(read(series))
    labels = canonical(read(discover(path.with_name(path.name.replace("_T1", "_labels")))[0]))
    array = scan.array.astype(np.float32)
    return scan.with_array(array / np.percentile(array[array > 0], 99.5)), labels.array > 0


def flops_a_crop(network: nn.Module, crop: int, second: Tensor) -> int:
    """FLOPs of one forward and backward pass; ``second`` is the network's other input."""
    x = torch.zeros(1, 1, crop, crop, crop, device=second.device)
    formulas = {torch.ops.aten.convolution: flops_forward, torch.ops.aten.convolution_backward: flops_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        network(x, second).mean().backward()
    return counter.get_total_flops()


def flops_forward(
    x: list[int],
    kernel: list[int],
    _bias: object,
    stride: list[int],
    padding: list[int],
    _dilation: object,
    transposed: bool,
    *_: object,
    out_shape: list[int],
) -> int:
    """Of a convolution without dilation, from shapes; torch's own formula counts the taps on zero padding too."""
    dense, strided = (out_shape, x) if transposed else (x, out_shape)
    taps = 1
    for n, m, k, s, p in zip(dense[2:], strided[2:], kernel[2:], stride, padding, strict=True):
        taps *= sum(0 <= i * s - p + j < n for i in range(m) for j in range(k))
    return 2 * x[0] * kernel[0] * kernel[1] * taps


def flops_backward(
    gradient: list[int],
    x: list[int],
    kernel: list[int],
    _sizes: object,
    stride: list[int],
    padding: list[int],
    dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    wanted: list[bool],
    **_: object,
) -> int:
    """The gradients of the input and of the kernel take as many as the convolution, where they are wanted."""
    forward = flops_forward(x, kernel, None, stride, padding, dilation, transposed, out_shape=gradient)
    return sum(wanted[:2]) * forward


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device; nan for a GPU that is not in the table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((flops for part, flops in PEAKS.items() if part in name), math.nan)
    a, seconds = torch.ones(2048, 2048, dtype=dtype), []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * len(a) ** 3 / min(seconds)


def peak_memory(device: torch.device) -> int:
    """Bytes: the high-water mark of this process, on a GPU that of its tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alone(function: Callable[..., Row], *arguments: object) -> Row:
    """The function's result, from a process of its own, and so with a high-water mark of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:  # the parent runs no thread of torch
        return pool.submit(function, *arguments).result()


def compare(ours: Row, theirs: Row) -> dict[str, float]:
    """Ours over theirs: the ratio of the speeds and the difference in dB at each level."""
    gain = {level: pair["denoised"] - theirs["psnr"][level]["denoised"] for level, pair in ours["psnr"].items()}
    return {"voxels/s": ours["voxels/s"] / theirs["voxels/s"], **gain}


def print_table(rows: dict[str, Row], gain: dict[str, float], arguments: argparse.Namespace) -> None:
    """Both loops, the ratio, and whether the bars are met."""
    title = f"{arguments.crop}^3 crops, {arguments.device}, {torch.get_num_threads()} thread(s)"
    table = Table(title=title, title_justify="left")
    heads = (
        "",
        "steps",
        "s",
        "s prepared",
        "voxels/s",
        "memory",
        "waiting",
        "of peak",
        *(f"{n:.0%} dB" for n in LEVELS),
    )
    for column in heads:
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        figures = [f"{row[key]:.0f}" for key in ("steps", "seconds", "prepared", "voxels/s")]
        shares = [f"{row['waiting']:.1%}", f"{row['share of peak']:.1%}"]
        decibels = [f"{pair['denoised']:.2f}" for pair in row["psnr"].values()]
        table.add_row(name, *figures, f"{row['memory'] / 2**30:.2f} GiB", *shares, *decibels)
    noisy = [f"{pair['noisy']:.2f}" for pair in rows["ours"]["psnr"].values()]
    table.add_row("noisy input", *[""] * 7, *noisy)
    differences = [f"{value:+.2f}" for key, value in gain.items() if key != "voxels/s"]
    table.add_row("ratio, difference", *[""] * 3, f"{gain['voxels/s']:.1f}x", *[""] * 3, *differences)
    console = Console(width=140)
    console.print(table)
    for key, value in gain.items():
        bar = FASTER if key == "voxels/s" else BETTER
        what = "voxels/s" if key == "voxels/s" else f"dB at {float(key):.0%} noise"
        console.print(f"{what}: {value:.2f}, bar {bar:g}: {'met' if value >= bar else 'NOT met'}")


def main() -> None:
    """Run both loops, print the table, write training.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--crop", type=int, default=32)
    parser.add_argument(
        "--channels", type=int, nargs="+", help="of the peer; default (32, 64, 128), the tutorial's on a GPU"
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="ours")
    parser.add_argument("--scans", type=int, default=100, help="the first so many")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_training"))
    arguments = parser.parse_args()
    if "MEDFUSION_DATA" not in os.environ:
        parser.error("set MEDFUSION_DATA to the folder of scans")
    arguments.channels = arguments.channels or CHANNELS[arguments.device]
    rows = {"ours": alone(ours, arguments)}
    rows["MONAI tutorial"] = alone(theirs, arguments, rows["ours"]["seconds"])
    gain = compare(*rows.values())
    print_table(rows, gain, arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__}
    if arguments.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    report = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "machine": machine,
        **rows,
        "gain": gain,
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
