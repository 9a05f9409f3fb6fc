"""The report of new cases: label maps are outlined where they are, the audit's figures are those of the audit."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from medfusion.report.augment import audit_rows
from medfusion.report.figures import LABEL_COLOURS, _best_plane, _largest, pairs_figure
from medfusion.tasks.audit_synthetic import Audit, Estimate, Nearness
from medfusion.volume import Volume


def pair(name: str, value: int = 1, axes: str = "RAS") -> tuple[str, Volume, np.ndarray]:
    """A bright box, labelled, in a dark scan."""
    array, labels = np.zeros((30, 40, 24), np.float32), np.zeros((30, 40, 24), np.uint8)
    array[10:20, 8:30, 10:16], labels[10:20, 8:30, 10:16] = 900, value
    affine = np.diag([-1.0 if axis in "LPI" else 1.0 for axis in axes] + [1.0])
    return name, Volume(array + np.random.default_rng(0).normal(0, 20, array.shape).astype(np.float32), affine), labels


def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.abs(pixels[..., :3] - wanted).max(axis=-1) < 0.15


def test_each_label_is_outlined_below_its_scan_in_its_colour() -> None:
    pixels = imread(io.BytesIO(pairs_figure([pair("a", 1), pair("b", 2)], columns=2)))
    half = pixels.shape[1] // 2
    for side, value in ((np.s_[:, :half], 1), (np.s_[:, half:], 2)):
        rows = np.flatnonzero(coloured(pixels[side], LABEL_COLOURS[value]).any(axis=1))
        assert len(rows) > 20
        assert rows.min() > pixels.shape[0] / 2  # below
        assert not coloured(pixels[side], LABEL_COLOURS[3 - value]).any()


@pytest.mark.parametrize("axes", ["RAS", "LPS"])
def test_the_cut_shows_most_of_the_label(axes: str) -> None:
    one = pair("a", axes=axes)
    _, volume, labels = one
    assert _best_plane([one, pair("b")]) == "axial"  # 10 x 22 voxels of it
    position = _largest(volume, labels)
    index = np.linalg.solve(volume.affine, [*position, 1])[:3]
    assert 10 <= index[2] < 16


def test_a_map_without_labels_is_shown_too() -> None:
    name, volume, labels = pair("a")
    assert imread(io.BytesIO(pairs_figure([(name, volume, 0 * labels)]))).std() > 0.01


def test_the_rows_are_the_audits() -> None:
    near = Nearness(np.array([0.3, 0.9]), ("r1", "r2"), np.array([0.5, 0.6, 0.7]), 0.4, 0.55)
    share = {"synthetic": Estimate(0.25, np.nan, np.nan), "real": Estimate(0.75, np.nan, np.nan)}
    distance = {"synthetic": Estimate(3.0, 1.0, 5.0), "real": Estimate(0.1, -1.0, 1.2)}
    audit = Audit(
        ("a", "b"),
        np.array([0.8, 0.9]),
        np.array([0.7, 0.95]),
        {"image": near},
        {"real": np.array([0.2, 0.4]), "synthetic": np.array([0.5])},
        {"Frechet distance": distance, "precision": share},
        {},
    )
    rows = {row[0]: row[1:] for row in audit_rows(audit)}
    assert rows["Dice to the labels asked for, mean (lowest)"] == ("0.850 (0.800)", "0.825 (0.700)")
    assert rows["distance to the nearest real case, image: median"] == ("0.6", "0.6")
    assert rows["nearer than 0.4"] == ("1", "0")
    assert rows["nearer than 1 % of all pairs of real cases, 0.55"] == ("1", "1")
    assert rows["MS-SSIM between pairs, mean; the lower, the more varied"] == ("0.500", "0.300")
    assert rows["Frechet distance"] == ("3 (1 to 5)", "0.1 (-1 to 1.2)")
    assert rows["precision"] == ("0.25", "0.75")
