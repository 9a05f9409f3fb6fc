"""Review page: the findings of one scan in a viewer, where a reader judges each; one file, offline, nothing is sent.

The viewer is NiiVue (vendor/niivue). Scan, signed anomaly map and mask lie in the page as gzipped NIfTI in base64.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from medfusion.io.output import staged
from medfusion.report.figures import grey_window, slice_figure
from medfusion.report.page import Figure, template_environment
from medfusion.report.viewer import block_affine, blocks, display_factors, map_nifti, nifti, scan_nifti
from medfusion.volume import Volume

if TYPE_CHECKING:
    from medfusion.io.findings import Finding

PICTURES = 6  # findings with a picture of their own

_HERE = Path(__file__).parent


def write_review(
    path: Path,
    scan: Volume,
    signed: NDArray[np.float32],
    findings: Sequence[Finding],
    *,
    threshold: float,
    facts: Mapping[str, object],
    mask: NDArray[np.uint8],
    overwrite: bool = False,
) -> None:
    """Write the page on which a reader looks at the findings of one scan, judges them and saves a table.

    The table, ``CASE_review.csv``, has a row per finding with its verdict (true, false, unsure) and comment, and a row
    with verdict "missed" per place that the reader added. Verdicts are kept in the browser, by case and results.

    Parameters
    ----------
    signed : anomaly map on the scan's grid, above zero where brighter than expected, below where darker. Half the
        threshold and less is left out of the page.
    threshold : size of ``signed`` from which it is shown at first.
    facts : names and values for a box; the texts in a sequence "Cautions" stand above the viewer.
    mask : non-zero voxels on the scan's grid belong to findings; the viewer outlines them.

    Raises
    ------
    ValueError : the map or the mask is not on the scan's grid.
    MedfusionError : ``path`` exists and ``overwrite`` is False; its folder cannot be written; the disk is full.
    """
    if not scan.shape == signed.shape == mask.shape:
        raise ValueError(f"{scan.name}: scan {scan.shape}, map {signed.shape} and mask {mask.shape} differ in shape")
    signed = np.nan_to_num(signed)
    window, peak = grey_window(scan), max(float(np.abs(signed).max()), threshold) or 1.0
    factors = display_factors(scan)
    affine = block_affine(scan.affine, factors)
    volumes = {
        "scan": scan_nifti(blocks(scan.array, factors, np.mean), affine),
        "map": map_nifti(blocks(signed, factors, _extreme), affine, threshold / 2, peak),
        "mask": nifti(_grown(blocks(mask != 0, factors, np.max)), affine),
    }
    rows = [{key: _finite(value) for key, value in asdict(finding).items()} for finding in findings]
    page = {
        "case": scan.name,
        "results": _digest(scan.name, rows, threshold, signed),
        "findings": rows,
        "threshold": threshold,
        "least": threshold / 2,
        "peak": peak,
        "window": window,
        "to_voxel": np.linalg.inv(scan.affine)[:3].tolist(),
        "shape": scan.shape,
    }
    scripts = [(_HERE / name).read_text("utf-8") for name in ("vendor/niivue/niivue.umd.js", "viewer.js", "review.js")]
    environment = template_environment()
    environment.filters["place"] = format_place
    html = environment.get_template("review.html").render(
        page=page,
        volumes={name: base64.b64encode(content).decode("ascii") for name, content in volumes.items()},
        scripts=scripts,
        script_hashes=[_script_hash(script) for script in scripts],
        factors=factors if max(factors) > 1 else (),
        cautions=facts.get("Cautions", ()),
        facts={name: value for name, value in facts.items() if name != "Cautions"},
        pictures=_pictures(scan, signed, findings, threshold, mask, window),
        pictures_at_most=PICTURES,
        licence=(_HERE / "vendor/niivue/LICENSE").read_text("utf-8"),
    )
    with staged(path, overwrite) as beside:
        beside.write_text(html, encoding="utf-8")


def format_place(position_mm: ArrayLike) -> str:
    """World RAS mm with the side in letters, as signs mean the opposite in LPS: "L 12, A 34, S 5"."""
    sides = zip(("LR", "PA", "IS"), np.rint(position_mm), strict=True)
    return ", ".join(f"{letters[int(value >= 0)]} {abs(value):.0f}" for letters, value in sides)


def _pictures(
    scan: Volume,
    signed: NDArray[np.float32],
    findings: Sequence[Finding],
    threshold: float,
    mask: NDArray[np.uint8],
    window: tuple[float, float],
) -> list[Figure]:
    """The slices through the largest finding, then through each of the first findings."""
    size, label = np.abs(signed), "anomaly, either direction"
    places: list[tuple[str, Sequence[float] | None]] = [("Overview", None)]
    for finding in findings[:PICTURES]:
        position = (finding.x, finding.y, finding.z)
        caption = f"Finding {finding.number}: {format_place(position)} mm, {finding.volume_ml:.2g} ml"
        places.append((", ".join(filter(None, (caption, finding.direction, finding.label))), position))
    return [
        Figure(
            slice_figure(
                scan,
                overlay=size,
                threshold=threshold,
                overlay_label=label,
                mask=mask,
                position_mm=position,
                window=window,
            ),
            f"Axial, coronal and sagittal slice. {caption}",
            caption,
        )
        for caption, position in places
    ]


def _digest(name: str, rows: Sequence[Mapping[str, object]], threshold: float, signed: NDArray[np.float32]) -> str:
    """What tells these results from others of the same case."""
    text = json.dumps([name, rows, threshold])
    return hashlib.sha256(text.encode() + np.ascontiguousarray(signed).tobytes()).hexdigest()[:16]


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _script_hash(script: str) -> str:
    """For the Content-Security-Policy: this script runs, no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _extreme(array: NDArray[Any], axis: tuple[int, ...]) -> NDArray[Any]:
    """The value farthest from zero."""
    highest, lowest = array.max(axis=axis), array.min(axis=axis)
    return np.where(highest >= -lowest, highest, lowest)


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """One voxel larger: its outline then runs around the coloured map, which would cover it."""
    grown: NDArray[np.bool_] = ndimage.binary_dilation(mask)
    return grown
