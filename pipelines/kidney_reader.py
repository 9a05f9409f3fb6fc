"""A reader of kidney masses in two components, on synthetic abdomens whose truth is known; a file for `errors run`.

    medfusion errors run pipelines/kidney_reader.py runs/kidney/parts.csv
    python pipelines/kidney_reader.py runs/kidney   writes its scans, masks and table of cases for docs/errors.md

The first component finds the kidney, the second says whether a mass is in it. Faults are planted in the scans, by
patient: at site B a spleen as bright as the kidney and larger, which the first component takes for it; a mass as bright
as the kidney, or a fold as dark as a mass, which misleads the second; a wrong label.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medfusion.analysis.system import component

SHAPE = (40, 32, 24)
KIDNEY, SPLEEN = np.array([12, 16, 12]), np.array([29, 16, 12])  # voxels of the centres
RADII = np.array([7.0, 6.0, 8.0])
MASS = 3.0  # radius, voxels
BODY, ORGAN, DARK = 0.3, 1.0, 0.55  # intensities
NOISE = 0.05
AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])
ALIKE = 0.6  # share of the scans of a faulty patient that have the fault
SHARES = {"organ": 0.2, "mass": 0.12, "label": 0.04}  # of patients with this fault
SITE_B = 0.4  # share of the patients
PATIENTS, SCANS = 75, 2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One scan; ``faults`` are those that were planted in it."""

    name: str
    patient: str
    site: str
    age: int
    has_mass: bool
    faults: frozenset[str]
    seed: int

    @cached_property
    def kidney(self) -> NDArray[np.bool_]:
        """Where the kidney is, mass included."""
        return ellipsoid(KIDNEY, RADII)

    @cached_property
    def image(self) -> Array:
        """Body, kidney, spleen, and in one of two a dark round mass."""
        rng = np.random.default_rng(self.seed)
        image = np.full(SHAPE, BODY)
        if "organ" in self.faults:
            image[ellipsoid(SPLEEN, 1.15 * RADII)] = ORGAN
        else:
            image[ellipsoid(SPLEEN, 0.7 * RADII)] = 0.8 * ORGAN
        image[self.kidney] = ORGAN
        # what misleads is there where no mass is seen, and the other way round
        if self.has_mass != ("mass" in self.faults):
            image[ellipsoid(KIDNEY + rng.integers(-2, 3, 3), np.full(3, MASS))] = DARK
        return image + NOISE * rng.standard_normal(SHAPE)

    @property
    def label(self) -> bool:
        """What the file of labels says."""
        return self.has_mass != ("label" in self.faults)


def ellipsoid(centre: Array, radii: Array) -> NDArray[np.bool_]:
    """Voxels inside."""
    places = np.moveaxis(np.indices(SHAPE), 0, -1)
    return (((places - centre) / radii) ** 2).sum(axis=-1) <= 1


def draw_cases(patients: int, seed: int) -> list[Case]:
    """Scans of patients; a fault that a patient has is in most of the patient's scans."""
    rng = np.random.default_rng(seed)
    drawn = []
    for number in range(patients):
        site, age = "AB"[rng.random() < SITE_B], int(rng.integers(30, 85))
        share = SHARES | {"organ": SHARES["organ"] / SITE_B if site == "B" else 0.0}
        prone = [fault for fault in SHARES if rng.random() < share[fault] / ALIKE]
        for scan in range(SCANS):
            faults = frozenset(fault for fault in prone if rng.random() < ALIKE)
            has_mass, noise = bool(rng.random() < 0.5), int(rng.integers(2**31))
            drawn.append(Case(f"p{number:03d}-{scan}", f"p{number:03d}", site, age, has_mass, faults, noise))
    return drawn


def cases() -> list[Case]:
    """What `errors run` runs."""
    return draw_cases(PATIENTS, seed=0)


@component(oracle=lambda case: case.kidney)
def organ(case: Case) -> NDArray[np.bool_]:
    """The kidney: the largest bright region, without its holes."""
    regions, count = ndimage.label(ndimage.gaussian_filter(case.image, 0.7) > (ORGAN + DARK) / 2)
    sizes = ndimage.sum_labels(np.ones(SHAPE), regions, range(1, count + 1))
    largest = regions == 1 + int(np.argmax(sizes))
    return ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(largest, 4), iterations=3))[4:-4, 4:-4, 4:-4]


@component(oracle=lambda case: case.has_mass)
def mass(case: Case, organ: NDArray[np.bool_]) -> bool:
    """Whether enough of the organ, its border left out, is dark."""
    inside = ndimage.binary_erosion(organ, iterations=2)
    dark = ndimage.gaussian_filter(case.image, 0.7) < (ORGAN + DARK) / 2
    return bool((dark & inside).sum() > 20)


def score(case: Case, mass: bool) -> dict[str, object]:
    """What the definition of an error reads."""
    return {"truth": "mass" if case.label else "none", "p": float(mass)}


def write_study(folder: Path) -> None:
    """Scans, true and found kidneys as NIfTI files, cases.csv with the reader's answers, and error.yaml."""
    for kind in ("scans", "truths", "predictions"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    rows = ["case,patient,site,age,truth,p"]
    for case in cases():
        found = organ(case)
        arrays = {"scans": case.image.astype(np.float32), "truths": case.kidney, "predictions": found}
        for kind, array in arrays.items():
            kept = array if array.dtype == np.float32 else array.astype(np.uint8)
            nibabel.save(
                nibabel.Nifti1Image(kept, np.diag([3.0, 3.0, 3.0, 1.0])), folder / kind / f"{case.name}.nii.gz"
            )
        answer = score(case, mass(case, found))
        rows.append(f"{case.name},{case.patient},{case.site},{case.age},{answer['truth']},{answer['p']}")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    (folder / "error.yaml").write_text(DEFINITION)


DEFINITION = """name: kidney-masses
case: one scan of one patient
error: {kind: classification, truth: truth, probabilities: {mass: p}}
"""

if __name__ == "__main__":
    write_study(Path(sys.argv[1]))
