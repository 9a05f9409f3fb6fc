"""`medfusion calibrate`: a prior with what methods of detection leave on healthy scans."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfusion.errors import MedfusionError

if TYPE_CHECKING:
    from medfusion.io import Series
    from medfusion.volume import Volume


def calibrate_prior(
    prior: str,
    healthy: Path,
    out: Path,
    *,
    methods: Sequence[str],
    exclude: Sequence[str],
    images: str,
    masks: str,
    strip: bool,
    stripped: bool,
    seed: int,
    device: str | None,
    overwrite: bool,
) -> int:
    """Write the prior with a reference for each method, made from the scans under ``healthy``; returns the exit code.

    Raises
    ------
    MedfusionError : a method that does not exist; too few scans, or one that cannot be used: all are named at once.
    """
    import typer

    from medfusion.io import staged
    from medfusion.io.companions import check_patterns, scans_called, without
    from medfusion.io.output import check_output
    from medfusion.prior import Prior
    from medfusion.tasks.calibrate import FEWEST, gather, make_reference
    from medfusion.tasks.rebuild import METHODS, require_autoencoder
    from medfusion.tasks.runner import pick_device

    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise MedfusionError(f"{', '.join(unknown)}: no such method of detection", methods=", ".join(METHODS))
    if strip and not masks:
        raise MedfusionError("--strip needs brain masks", fix="--masks '*_mask.nii.gz', with --images '*_T1.nii.gz'")
    if out.suffix != ".safetensors":
        raise MedfusionError(f"{out}: a prior is a .safetensors file", fix=f"--out {out}.safetensors")
    check_patterns(images, masks=masks)
    check_output(out, healthy)
    if out.exists() and not overwrite:
        raise MedfusionError(f"{out}: exists already", fix="--overwrite, or another name")
    loaded = Prior.load(prior, pick_device(device))
    if "autoencoder" in methods:
        require_autoencoder(loaded)
    found, _ = without(scans_called(healthy, images, masks), exclude)
    if len(found) < FEWEST:
        raise MedfusionError(f"{len(found)} healthy scan(s) are too few for a reference", fewest=FEWEST)
    problems = {series.name: problem for series in found if (problem := _problem(series, images, masks))}
    if problems:
        raise MedfusionError(
            f"{len(problems)} scan(s) cannot be used: a reference is made of all or of none", **problems
        )

    def tell(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    cohort = gather(_scans(found, images, masks, strip), loaded, stripped=strip or stripped, progress=tell)
    made = [make_reference(cohort, loaded, method, seed=seed, progress=tell) for method in methods]
    for reference in made:
        heaviest = sorted(zip(reference.heaviest.tolist(), (series.name for series in found), strict=True))[::-1]
        shown = ", ".join(f"{name} {weight:.3g}" for weight, name in heaviest[:5])
        tell(f"{reference.method}: heaviest regions: {shown}; --exclude those that are not healthy")
    kept = [r for r in loaded.references if not any((r.method, r.stripped) == (m.method, m.stripped) for m in made)]
    with staged(out, overwrite=overwrite) as partial:
        replace(loaded, references=(*kept, *made)).save(partial)
    kind = "brains without skull" if strip or stripped else "scans"
    typer.echo(f"{out}: {loaded.name} with what {', '.join(methods)} leave(s) on {len(cohort.scans)} healthy {kind}")
    return 0


def _problem(series: Series, images: str, masks: str) -> str:
    """Why a scan cannot be used, as far as its header and the files beside it tell."""
    from medfusion.io.companions import companion

    found = [*series.problems, *["it has several volumes"] * (len(series.shape) > 3)]
    try:
        if masks:
            companion(series, images, masks, "mask")
    except MedfusionError as error:
        found.append(f"{error.what.partition(': ')[2]} ({', '.join(map(str, error.facts.values()))})")
    return "; ".join(found)


def _scans(found: Sequence[Series], images: str, masks: str, strip: bool) -> Iterator[tuple[Volume, Any]]:
    """Scans and the part of each that is of interest, or None: where there are no masks."""
    from medfusion.data.crops import stripped as cut_off
    from medfusion.io import read
    from medfusion.io.companions import companion, read_beside

    for series in found:
        scan = read(series)
        part = read_beside(companion(series, images, masks, "mask"), scan, "mask").array > 0 if masks else None
        yield (cut_off(scan, part) if strip and part is not None else scan), part
