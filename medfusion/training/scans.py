"""Which scans of a folder train the prior: found, read and prepared, every problem listed before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from medfusion.config import Config
from medfusion.data.crops import STRIPPED, Case, prepare, stripped
from medfusion.errors import MedfusionError
from medfusion.io import Series, discover, read
from medfusion.volume import Volume


def load_cases(
    folder: Path, config: Config, progress: Callable[[int, int, str], None] = lambda done, total, name: None
) -> list[Case]:
    """The scans under ``folder`` that match ``config.data.images``, and with masks their skull-stripped twins.

    Raises
    ------
    MedfusionError : nothing is found, or some scans cannot be used: all of them are named, with the reason.
    """
    found = discover(folder, pattern=config.data.images)
    cases: list[Case] = []
    problems: list[str] = []
    for index, series in enumerate(found, 1):
        progress(index, len(found), series.name)
        try:
            cases += _prepare_scan(series, config)
        except MedfusionError as error:
            facts = ", ".join(f"{name} {value}" for name, value in error.facts.items())
            problems.append(f"{error.what} ({facts})" if facts else error.what)
    if problems:
        raise MedfusionError(
            f"{folder}: {len(problems)} of {len(found)} scans cannot be trained on",
            fix="mend or move them, or narrow the choice: --set data.images='*_T1.nii.gz'"
            + (", or train without masks: --set data.masks=''" if config.data.masks else ""),
            **{f"problem_{number}": problem for number, problem in enumerate(problems, start=1)},
        )
    return cases


def _prepare_scan(series: Series, config: Config) -> list[Case]:
    volume = read(series)
    wanted = config.preprocessing.modality
    if volume.modality and volume.modality != wanted:
        raise MedfusionError(f"{series.name}: is {volume.modality}, the config is for {wanted}")
    cases = [prepare(volume, config.preprocessing)]
    if config.data.masks:
        cases.append(prepare(stripped(volume, _mask_of(series, volume, config)), config.preprocessing, STRIPPED))
    return cases


def _mask_of(series: Series, volume: Volume, config: Config) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """The scan's file name with the fixed ending of ``images`` (after its *) replaced by ``masks``."""
    image = series.files[0]
    ending = config.data.images.rpartition("*")[2]
    path = image.with_name(image.name.removesuffix(ending) + config.data.masks)
    if not ending or not path.is_file():
        raise MedfusionError(f"{series.name}: no mask beside it", expected=path.name)
    mask = read(discover(path)[0])
    if mask.shape != volume.shape:
        raise MedfusionError(
            f"{series.name}: image and mask have different shapes", image=volume.shape, mask=mask.shape
        )
    return mask.array > 0
