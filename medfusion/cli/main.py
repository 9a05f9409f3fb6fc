"""The ``medfusion`` command.

Exit codes: 0 done, 1 some case failed, 2 wrong use or unreadable input, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medfusion import __version__
from medfusion.cli.errors import app as errors_app
from medfusion.errors import MedfusionError

app = typer.Typer(
    name="medfusion",
    help="One diffusion prior for 3D MRI and CT: denoise scans, map anomalies, generate training volumes.\n\n"
    "For research, not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

evaluate_app = typer.Typer(help="Measure on scans with truth.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(errors_app, name="errors")

Input = Annotated[Path, typer.Argument(metavar="IN", help="A NIfTI file, or a folder of NIfTI files or DICOM series.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results; must lie outside IN.")]
PriorName = Annotated[str, typer.Option("--prior", help="A shipped prior by name, or a prior.safetensors file.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the first GPU, else the CPU.")]
VolumeIndex = Annotated[int | None, typer.Option("--volume", help="Which volume of 4D files, counted from 0.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep what an earlier run with the same inputs and settings made, do the rest.")
]
Seed = Annotated[int, typer.Option(help="With the case name it fixes the noise that is drawn.")]


class NoiseKind(StrEnum):
    """Of noise: of magnitude MRI, or of everything else."""

    gaussian = "gaussian"
    rician = "rician"


class Quality(StrEnum):
    """How much work goes into a result."""

    standard = "standard"
    high = "high"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"medfusion {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """One diffusion prior for 3D MRI and CT."""


@app.command("inspect")
def inspect_command(
    path: Input, as_json: Annotated[bool, typer.Option("--json", help="A JSON list instead of a table.")] = False
) -> None:
    """Show what is under a path: scans, their geometry and intensities, and why some cannot be used."""
    from medfusion.cli.inspect import inspect

    raise typer.Exit(inspect(path, as_json))


@app.command("denoise")
def denoise_command(
    input: Input,
    output: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Folder for the results, outside IN; none with --estimate-only."),
    ] = None,
    prior: PriorName = "brain-t1",
    sigma: Annotated[float | None, typer.Option(min=0, help="Noise in the scan's units; default: estimated.")] = None,
    kind: Annotated[NoiseKind | None, typer.Option(help="Of the noise; default: told from the air.")] = None,
    quality: Annotated[
        Quality, typer.Option(help="high: the mean of four views, four times slower.")
    ] = Quality.standard,
    samples: Annotated[int, typer.Option(min=0, help="Posterior samples, and with two or more their spread.")] = 0,
    maps: Annotated[bool, typer.Option("--maps", help="Write what was taken off, and where it has structure.")] = False,
    adapt: Annotated[
        float | None, typer.Option(min=0.05, metavar="MINUTES", help="First train the prior on these scans.")
    ] = None,
    estimate_only: Annotated[bool, typer.Option("--estimate-only", help="Print the noise, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --estimate-only: a JSON list.")] = False,
    seed: Seed = 0,
    device: Device = None,
    volume: VolumeIndex = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Remove noise: each scan comes back on its own grid, in its units and format (DICOM in, derived DICOM out)."""
    from medfusion.cli.denoise import denoise_scans, show_estimates

    if estimate_only == (output is not None):
        raise typer.BadParameter("OUT is for results, and --estimate-only has none" if output else "OUT is missing")
    if as_json and not estimate_only:
        raise typer.BadParameter("--json is for --estimate-only")
    if output is None:
        if sigma is not None or kind or samples or maps or adapt or overwrite or resume or quality is Quality.high:
            raise typer.BadParameter("--estimate-only goes with --prior, --device, --volume and --json alone")
        raise typer.Exit(show_estimates(input, prior=prior, device=device, volume=volume, as_json=as_json))
    code = denoise_scans(
        input,
        output,
        adapt=adapt,
        prior=prior,
        sigma=sigma,
        kind=kind and kind.value,
        high_quality=quality is Quality.high,
        samples=samples,
        maps=maps,
        seed=seed,
        device=device,
        volume=volume,
        overwrite=overwrite,
        resume=resume,
    )
    raise typer.Exit(code)


@app.command("detect")
def detect_command(
    input: Input,
    output: Output,
    prior: PriorName = "brain-t1",
    method: Annotated[str, typer.Option(help="How scans are rebuilt: docs/detect.md has all.")] = "default",
    fast: Annotated[bool, typer.Option("--fast", help="For triage: the method of that name.")] = False,
    fdr: Annotated[float, typer.Option(help="Share of false ones that is expected among the voxels of a mask.")] = 0.05,
    min_ml: Annotated[float, typer.Option(min=0, help="Smaller regions are dropped from the mask.")] = 0.1,
    unlike: Annotated[
        bool, typer.Option("--unlike", help="Score scans unlike the healthy reference too; p-values do not hold.")
    ] = False,
    images: Annotated[str, typer.Option(help="How scans are called, where --labels are beside them.")] = "*.nii.gz",
    labels: Annotated[str, typer.Option(help="How their label maps are called, e.g. '*_labels.nii.gz'.")] = "",
    label_names: Annotated[Path | None, typer.Option(help="CSV or lookup table: number and name of labels.")] = None,
    seed: Seed = 0,
    device: Device = None,
    volume: VolumeIndex = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Map anomalies: heatmap, mask and findings with p-values on each scan's own grid, and a page to review them."""
    from medfusion.cli.detect import detect_scans
    from medfusion.cli.show import show_run

    if fast and method != "default":
        raise typer.BadParameter("--fast is a method, and --method names one")
    run = detect_scans(
        input,
        output,
        prior=prior,
        method="fast" if fast else method,
        fdr=fdr,
        min_ml=min_ml,
        unlike=unlike,
        images=images,
        labels=labels,
        label_names=label_names,
        seed=seed,
        device=device,
        volume=volume,
        overwrite=overwrite,
        resume=resume,
    )
    raise typer.Exit(show_run(run, output))


@app.command("calibrate")
def calibrate_command(
    prior: Annotated[str, typer.Argument(help="Name of a shipped prior, or a .safetensors file.")],
    healthy: Annotated[Path, typer.Argument(metavar="HEALTHY_DIR", help="Folder of healthy scans.")],
    out: Annotated[Path, typer.Option(help="The prior with its reference: a .safetensors file.")],
    method: Annotated[
        list[str] | None, typer.Option(help="Of detection; may be repeated. Default: default and fast.")
    ] = None,
    images: Annotated[str, typer.Option(help="How scans are called, where --masks are beside them.")] = "*.nii.gz",
    masks: Annotated[str, typer.Option(help="How their brain masks or labels are called: score the brain only.")] = "",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out scans: a name or pattern; may be repeated.")
    ] = None,
    strip: Annotated[bool, typer.Option("--strip", help="Cut the scans off outside the masks first.")] = False,
    stripped: Annotated[bool, typer.Option("--stripped", help="The scans are brains without skull already.")] = False,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Store with a prior what detection leaves on healthy scans, so that detect can state error rates."""
    from medfusion.cli.calibrate import calibrate_prior

    code = calibrate_prior(
        prior,
        healthy,
        out,
        methods=method or ["default", "fast"],
        exclude=exclude or [],
        images=images,
        masks=masks,
        strip=strip,
        stripped=stripped,
        seed=seed,
        device=device,
        overwrite=overwrite,
    )
    raise typer.Exit(code)


@evaluate_app.command("detect")
def evaluate_detect_command(
    scans: Annotated[Path, typer.Argument(metavar="SCANS", help="A NIfTI file, or a folder of them.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the tables; must lie outside SCANS.")],
    truth: Annotated[str, typer.Option(help="How the true lesions beside a scan are called: '*_lesions.nii.gz'.")],
    prior: PriorName = "brain-t1",
    method: Annotated[
        list[str] | None, typer.Option(help="May be repeated, and baselines are added. Default: all calibrated ones.")
    ] = None,
    images: Annotated[str, typer.Option(help="How the scans are called: '*_T1.nii.gz'.")] = "*.nii.gz",
    masks: Annotated[str, typer.Option(help="How masks are called in which alone voxels and findings count.")] = "",
    healthy_without_truth: Annotated[
        bool, typer.Option("--healthy-without-truth", help="A scan without a file of lesions is healthy.")
    ] = False,
    patients: Annotated[
        Path | None, typer.Option(help="CSV with columns case,patient; default: each case is a patient.")
    ] = None,
    fdr: Annotated[float, typer.Option(help="Share of false ones that is expected among the voxels of a mask.")] = 0.05,
    min_ml: Annotated[float, typer.Option(min=0, help="Smaller regions are dropped from the mask.")] = 0.1,
    unlike: Annotated[
        bool, typer.Option("--unlike", help="Score scans unlike the healthy reference too; p-values do not hold.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Detect in scans whose lesions are known: AUPRC, Dice, FROC, by lesion size, with intervals, beside baselines."""
    from medfusion.cli.evaluate import evaluate_detection_command

    code = evaluate_detection_command(
        scans,
        output,
        truth=truth,
        prior=prior,
        methods=method or [],
        images=images,
        masks=masks,
        healthy_without_truth=healthy_without_truth,
        patients=patients,
        fdr=fdr,
        min_ml=min_ml,
        unlike=unlike,
        seed=seed,
        device=device,
        overwrite=overwrite,
    )
    raise typer.Exit(code)


@evaluate_app.command("augment")
def evaluate_augment_command(
    real: Annotated[Path, typer.Argument(metavar="REAL", help="The real training set.")],
    synthetic: Annotated[Path, typer.Argument(metavar="SYNTH", help="What `medfusion augment` made of it.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the tables; must lie outside REAL.")],
    test: Annotated[Path, typer.Option(help="A training set that neither prior nor segmenter saw.")],
    size: Annotated[
        list[int] | None, typer.Option(help="Number of real cases to train on; may be repeated. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind and size.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each training.")] = 1500,
    crop: Annotated[int, typer.Option(min=16, help="Edge of what the segmenter is shown, in voxels.")] = 64,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one segmenter on real, synthetic and both kinds of cases, and compare its Dice on scans that none saw."""
    from medfusion.cli.evaluate import evaluate_augmentation_command

    raise typer.Exit(
        evaluate_augmentation_command(
            real,
            synthetic,
            output,
            test=test,
            sizes=size or [],
            seeds=seeds,
            steps=steps,
            crop=crop,
            device=device,
            overwrite=overwrite,
        )
    )


@app.command("augment")
def augment_command(
    input: Annotated[
        Path,
        typer.Argument(metavar="REAL", help="A training set: nnU-Net raw, BIDS, or the folders images/ and labels/."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the new dataset; must lie outside REAL.")],
    number: Annotated[int, typer.Option("-n", "--number", help="How many new cases.")],
    prior: Annotated[
        str | None,
        typer.Option(help="A shipped prior by name, or a prior.safetensors file. Default: one is trained on REAL."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="For the training: a YAML file, see configs/. Default: planned from REAL.")
    ] = None,
    strength: Annotated[
        float,
        typer.Option(help="How much of an image is drawn anew, 0 to 1; the rest is its parent's, deformed alike."),
    ] = 0.8,
    from_real: Annotated[
        float | None,
        typer.Option(metavar="STRENGTH", help="The same for real cases as they are: labels stay, texture changes."),
    ] = None,
    insert: Annotated[
        str, typer.Option(metavar="LABEL", help="Put lesions of this label into the cases that have none.")
    ] = "",
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="Class of each real case, columns case and class; new ones get their parent's."
        ),
    ] = None,
    class_name: Annotated[str, typer.Option("--class", help="Which of the prior's classes all new cases are of.")] = "",
    flips: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Mirror new label maps? Default: unless labels tell left from right."),
    ] = None,
    guidance: Annotated[float, typer.Option(help="How strongly labels and class are followed; 1: as learnt.")] = 1.5,
    steps: Annotated[int, typer.Option(min=1, help="Evaluations of the prior for each case.")] = 10,
    stripped: Annotated[bool, typer.Option("--stripped", help="The scans are skull-stripped heads.")] = False,
    bids: Annotated[bool, typer.Option("--bids", help="Write BIDS and not an nnU-Net raw dataset.")] = False,
    audit_steps: Annotated[int, typer.Option(min=1, help="Of the two segmenters that judge the new cases.")] = 600,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Make new image-label pairs for a segmentation training set: nnU-Net and MONAI train on real and new ones."""
    from medfusion.cli.augment import augment_set

    code = augment_set(
        input,
        output,
        number=number,
        prior=prior,
        config=config,
        strength=strength,
        from_real=from_real,
        insert=insert,
        classes="" if classes is None else str(classes),
        class_name=class_name,
        flips=flips,
        guidance=guidance,
        steps=steps,
        stripped=stripped,
        bids=bids,
        audit_steps=audit_steps,
        seed=seed,
        device=device,
        overwrite=overwrite,
        resume=resume,
    )
    raise typer.Exit(code)


@app.command("translate")
def translate_command(
    input: Input,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results, outside IN.")],
    prior: Annotated[str, typer.Option("--prior", help="A CycleGAN, or the diffusion prior of IN's scanner; a file.")],
    to: Annotated[str, typer.Option("--to", help="A domain of the CycleGAN, or the prior of the other scanner.")],
    device: Device = None,
    volume: VolumeIndex = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Show scans as another scanner would: by a CycleGAN, or encoded by one diffusion prior and decoded by another."""
    from medfusion.cli.show import show_run
    from medfusion.tasks.translate import translate

    done = translate(
        input,
        output,
        prior=prior,
        to=to,
        device=device,
        volume=volume,
        overwrite=overwrite,
        resume=resume,
    )
    raise typer.Exit(show_run(done, output))


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/.")],
    data: Annotated[
        list[Path], typer.Option(help="Folder of NIfTI files or DICOM series; of a CycleGAN two, --data A --data B.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for prior.safetensors, metrics.jsonl and the checkpoint.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, e.g. training.steps=500; may be repeated.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of prepared scans, which runs may share; default: OUT/cache.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out scans: a name, or a shell pattern of names; may be repeated.")
    ] = None,
    device: Device = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that draw crops ahead; default: as many as help.")
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in OUT.")] = False,
) -> None:
    """Train a prior on a folder of scans."""
    from medfusion.cli.train import train_prior

    raise typer.Exit(
        train_prior(
            config,
            data,
            out,
            set or [],
            cache=cache,
            exclude=exclude or [],
            device=device,
            workers=workers,
            overwrite=overwrite,
            resume=resume,
        )
    )


@app.command("priors")
def priors_command(name: Annotated[str | None, typer.Argument(help="Print the card of this prior.")] = None) -> None:
    """List the priors that ship with the package, or print the card of one."""
    from medfusion.cli.show import show_priors

    raise typer.Exit(show_priors(name))


def main() -> None:
    """Entry point: a user error is one short block on standard error, never a traceback.

    A terminated run (SIGTERM, as schedulers send) ends as after Ctrl-C: nothing half-written stays.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except MedfusionError as error:
        sys.stderr.write(f"Error  {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
