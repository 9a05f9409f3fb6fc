"""Detections of made-up scores on a small grid, and how well they did."""

import numpy as np

from medfusion.reference import CLUSTER_P
from medfusion.tasks.detect import Detection
from medfusion.tasks.measure_detection import CaseResult, measure_case
from medfusion.volume import Volume

SHAPE = (12, 10, 8)
AFFINE = np.diag([5.0, 10.0, 10.0, 1.0])  # voxels of half a millilitre


def detection(
    score: np.ndarray, regions: np.ndarray | None = None, *, name: str = "case", scan_p: float = 1.0, height: float = 3
) -> Detection:
    """Scores from ``height`` on are as rare as those of clusters; the mask is ``regions``, else of scores from 4 on."""
    volume = Volume(score.astype(np.float32), AFFINE, name)
    regions = (score >= 4).astype(np.int32) if regions is None else regions
    p = np.where(score >= height, CLUSTER_P, np.where(score > 0, 0.5, 1.0)).astype(np.float32)
    other = volume.with_array(np.zeros(SHAPE, np.float32))
    parts = {"signed": volume, "residual": other, "reconstruction": other, "p_value": volume.with_array(p)}
    return Detection(
        anomaly=volume,
        **parts,
        regions=volume.with_array(regions),
        scored=score > 0,
        findings=[],
        threshold=4.0,
        scan_p=scan_p,
        unlikeness={},
    )


def random_case(seed: int, method: str, signal: float, patient: str = "", ill: bool = True) -> CaseResult:
    """Scores of a coarse scale, higher by ``signal`` in two lesions of 12 and 2 voxels."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(SHAPE)
    if ill:
        truth[1:4, 1:5, 1] = truth[8:10, 8, 6] = 1
    noise = np.abs(np.random.default_rng(seed + 1000 * len(method)).normal(size=SHAPE))
    score = np.round(noise + signal * truth * rng.uniform(0.5, 1.5), 1)
    return measure_case(detection(score, name=f"s{seed}"), truth, method=method, patient=patient)
