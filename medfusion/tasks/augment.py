"""Augment: new image-label pairs for a segmentation training set, as a dataset that nnU-Net and MONAI train on."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medfusion.config import Config, SegmenterConfig
from medfusion.data.crops import UNKNOWN
from medfusion.data.label_maps import lateral
from medfusion.data.seeds import case_generator
from medfusion.errors import MedfusionError
from medfusion.io import staged, write_nifti
from medfusion.io.classes import read_classes
from medfusion.io.output import check_output
from medfusion.io.training_set import TrainingCase, TrainingSet, read_training_set
from medfusion.io.training_set_check import check_training_set
from medfusion.io.training_set_output import (
    MANIFEST,
    case_files,
    check_synthetic,
    read_manifest,
    write_description,
    write_manifest,
)
from medfusion.prior import Prior, prior_path, read_metadata
from medfusion.tasks.audit_synthetic import FEWEST, Audit, audit_cases
from medfusion.tasks.draw_case import GUIDANCE, STEPS, STRENGTH, WEAKEST, draw_case, read_parent
from medfusion.tasks.plan_cases import Planner, insertions, new_maps, real_maps
from medfusion.tasks.runner import Job, Run, Settings, pick_device, require_folder, run_jobs
from medfusion.tasks.segmenter import prepared

FOLDS_SEED = 0  # not that of the cases: more cases shall not make other folds
DROPPED = "dropped"  # folder of the cases that the audit drops


@dataclass(frozen=True)
class Request:
    """Which new cases are asked for.

    Attributes
    ----------
    number : of cases; they are named ``synth-SEED-NUMBER``.
    strength : process time to which the first parent's image, moved along with its label map, is noised; as in
        ``draw_case``.
    from_real : the same for real cases with their own label maps, instead of new ones.
    insert : name of a label: put lesions of it into the cases that have none.
    classes : CSV file that tells the class of each real case, as ``read_classes``; a new one is told that of its first
        parent.
    class_name : of the prior's classes; all new cases are told this one. Without both none is told.
    flips : whether new maps may be mirrored; None: unless names of labels tell left from right.
    guidance, steps, stripped : as in ``draw_case``.
    bids : lay the output out as BIDS and not as an nnU-Net raw dataset.
    """

    number: int
    strength: float = STRENGTH
    from_real: float | None = None
    insert: str = ""
    classes: str = ""
    class_name: str = ""
    flips: bool | None = None
    guidance: float = GUIDANCE
    steps: int = STEPS
    stripped: bool = False
    bids: bool = False
    seed: int = 0


def check_request(input: Path, output: Path, request: Request) -> TrainingSet:
    """The training set, if it and what is asked for can be used, whatever the prior.

    Raises
    ------
    MedfusionError : as ``augment``.
    """
    if request.number < 1:
        raise MedfusionError(f"-n {request.number}: at least one case must be asked for")
    for option, value in (("--strength", request.strength), ("--from-real", request.from_real)):
        if value is not None and not WEAKEST <= value <= 1:
            raise MedfusionError(f"{option} {value}: a process time from {WEAKEST} to 1")
    if request.from_real is not None and request.insert:
        raise MedfusionError("--from-real and --insert are two ways to a new case", fix="choose one of them")
    require_folder(output)
    check_output(output, input)
    if (input / MANIFEST).exists():
        raise MedfusionError(
            f"{input}: holds synthetic cases that medfusion made", fix="name the real training set that they came from"
        )
    real = read_training_set(input)
    check_training_set(real)
    if len(real.labelled) < FEWEST:
        raise MedfusionError(
            f"{input}: {len(real.labelled)} labelled case(s), too few to audit what is made from them",
            enough=f"{FEWEST}: half to train a segmenter on, half to judge it by",
        )
    return real


def check_prior(prior: str, config: Config, real: TrainingSet, request: Request) -> None:
    """Check that a prior with this config, trained or to be trained, can generate for a training set.

    Raises
    ------
    MedfusionError : it is shown no label maps, or not these labels, or does not know the classes.
    """
    if config.family != "diffusion":
        raise MedfusionError(f"{prior}: is of the family {config.family}, which draws no labelled cases")
    known = config.network.labels
    if not known and request.from_real is None:
        raise MedfusionError(
            f"{prior}: was trained without label maps and cannot draw an image for one",
            fix="train one with them, or vary real cases: --from-real 0.3",
        )
    if config.autoencoder is not None and request.insert:
        raise MedfusionError(f"--insert: {prior} works on latents, which cannot be drawn in part", fix="another prior")
    beyond = {name: value for name, value in real.label_names.items() if value >= known}
    names = dict(enumerate(config.label_names))
    other = {name: names[value] for name, value in real.label_names.items() if _differ(names.get(value), name)}
    if known and (beyond or other):
        raise MedfusionError(
            f"{prior}: was not trained on the labels of {real.root}",
            prior=", ".join(config.label_names) or f"labels 0 to {known - 1}",
            training_set=", ".join(f"{name} {value}" for name, value in real.label_names.items()),
            fix="train a prior on this set: leave --prior out",
        )
    if request.class_name and request.class_name not in config.network.classes:
        raise MedfusionError(
            f"--class {request.class_name}: the prior does not know it",
            classes=", ".join(config.network.classes) or "none",
        )


def stated_classes(request: Request, real: TrainingSet, config: Config) -> dict[str, str]:
    """The class of each case, where a table of them is named; raises as ``read_classes``."""
    names = [case.name for case in real.cases]
    return read_classes(Path(request.classes), names, config.network.classes) if request.classes else {}


def _differ(known: str | None, name: str) -> bool:
    """Whether two names are given and differ; a set without names calls its labels "label 1"."""
    return known is not None and not name.startswith("label ") and known.casefold() != name.casefold()


@dataclass(frozen=True)
class Made:
    """The synthetic cases in a folder: their entries in the manifest, and what is needed to audit and describe them."""

    output: Path
    real: TrainingSet
    config: Config
    request: Request
    cases: tuple[dict[str, Any], ...]

    def files(self, name: str) -> tuple[Path, Path]:
        """Image and label map of a case."""
        return case_files(self.output, name, self.real.file_ending, self.request.bids, self.real.channel)


def augment(
    input: Path,
    output: Path,
    request: Request,
    *,
    prior: str,
    audit_steps: int = SegmenterConfig().steps,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> tuple[Run, Audit | None]:
    """Generate new cases for the training set ``input``, audit them, and describe real and new ones in ``output``.

    The audit is in ``audit.json``; those that it drops go to ``output``/dropped. Cases that earlier runs left in
    ``output``, with another seed for instance, stay in the dataset and are audited with the new ones.

    Parameters
    ----------
    audit_steps : of the segmenters that judge whether images show their labels.

    Returns
    -------
    The run, and the audit; None when the run was interrupted or made nothing.

    Raises
    ------
    MedfusionError : before any work: what is asked for makes no sense, the training set has problems (all are listed),
        has too few cases, or is not one that the prior was trained for.
    """
    run, made = make_cases(input, output, request, prior=prior, device=device, overwrite=overwrite, resume=resume)
    if run.interrupted or not made.cases:
        return run, None
    audit = audit_made(made, SegmenterConfig(crop=made.config.data.crop, steps=audit_steps), device)
    describe(set_aside(made, audit.dropped))
    with staged(output / "audit.json", overwrite=True) as unfinished:
        unfinished.write_text(json.dumps(audit.plain(), indent=2) + "\n")
    return run, audit


def make_cases(
    input: Path,
    output: Path,
    request: Request,
    *,
    prior: str,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> tuple[Run, Made]:
    """Generate what is asked for; options and errors as in ``augment``. The manifest is written after every case."""
    real, earlier = check_request(input, output, request), read_manifest(output)
    config, _ = read_metadata(prior_path(prior))
    check_prior(prior, config, real, request)
    classes = stated_classes(request, real, config)
    flips = not lateral(real.label_names) and bool(config.data.flips) if request.flips is None else request.flips
    made = Made(output, real, config, replace(request, flips=flips), tuple(earlier))
    planner = _planner(made)
    entries: dict[str, dict[str, Any]] = {case["case"]: case for case in earlier}

    def work(index: int, name: str, loaded: Prior) -> str:
        drawn, entries[name] = _make(index, name, planner, made, classes, loaded, overwrite=overwrite or resume)
        write_manifest(output, list(entries.values()))
        return drawn

    files = tuple(path for case in real.labelled for path in (case.image, case.labels) if path)
    files += (Path(request.classes),) if request.classes else ()
    names = [f"synth-{request.seed}-{index + 1:04d}" for index in range(request.number)]
    planned = {name: {"case": name, "parents": []} for name in names}
    check_synthetic(output, real, list((planned | entries).values()), bids=request.bids)
    jobs = [Job(name, files, list(made.files(name)), partial(work, k, name)) for k, name in enumerate(names)]
    options = {name: value for name, value in asdict(made.request).items() if name != "number"}
    run = run_jobs(Settings("augment", input, output, prior, device, options, None, overwrite, resume), jobs)
    there = [entries[name] for name in sorted(entries) if all(path.exists() for path in made.files(name))]
    return run, replace(made, cases=tuple(there))


def _planner(made: Made) -> Planner:
    request, spacing = made.request, made.config.preprocessing.spacing
    if request.insert:
        return insertions(made.real, request.insert, spacing)
    if request.from_real is not None:
        return real_maps(made.real, spacing)
    return new_maps(made.real, spacing, bool(request.flips))


def _make(
    index: int,
    name: str,
    planner: Planner,
    made: Made,
    classes: dict[str, str],
    prior: Prior,
    *,
    overwrite: bool,
) -> tuple[str, dict[str, Any]]:
    """Write one case; returns a line about it and its entry in the manifest."""
    request = made.request
    rng = np.random.default_rng(case_generator(request.seed, name, draw=1).initial_seed())
    plan = planner(index, rng)
    told = request.class_name or classes.get(plan.parents[0].name, "")
    new = draw_case(
        read_parent(plan.parents[0], prior),
        prior,
        plan.labels if prior.config.network.labels else None,
        name=name,
        strength=request.strength if request.from_real is None else request.from_real,
        moved=plan.moved,
        drawn=plan.drawn,
        guidance=request.guidance,
        steps=request.steps,
        stripped=request.stripped,
        class_index=prior.config.network.classes.index(told) if told else UNKNOWN,
        seed=request.seed,
    )
    image, labels = made.files(name)
    write_nifti(new, image, overwrite=overwrite, description=f"SYNTHETIC, medfusion {prior.name}")
    write_nifti(new.with_array(plan.labels), labels, overwrite=overwrite)
    parents = [case.name for case in plan.parents]
    settings = {key: value for key, value in asdict(request).items() if key != "number"}
    entry = {"case": name, "synthetic": True, "parents": parents, "prior": prior.name, **settings, "class_name": told}
    return f"from {' and '.join(parents)}", entry


def audit_made(made: Made, segmenter: SegmenterConfig, device: str | None = None) -> Audit:
    """Audit synthetic cases beside all scans of the training set."""
    known = made.config.preprocessing
    new = [TrainingCase(case["case"], *made.files(case["case"]), patient="") for case in made.cases]
    return audit_cases(
        [prepared(case, known) for case in made.real.cases],
        [prepared(case, known) for case in new],
        [case["parents"][0] for case in made.cases],
        max(made.real.label_names.values()) + 1,
        segmenter.model_copy(update={"flips": bool(made.request.flips)}),
        device=pick_device(device),
    )


def set_aside(made: Made, dropped: Collection[str]) -> Made:
    """Move the files of some cases to the folder DROPPED, where no training finds them; returns the others."""
    for path in (path for name in dropped for path in made.files(name)):
        to = made.output / DROPPED / path.relative_to(made.output)
        to.parent.mkdir(parents=True, exist_ok=True)
        path.replace(to)
    return replace(made, cases=tuple(case for case in made.cases if case["case"] not in dropped))


def describe(made: Made) -> None:
    """Describe real and synthetic cases together."""
    write_description(made.output, made.real, made.cases, bids=made.request.bids, seed=FOLDS_SEED)
