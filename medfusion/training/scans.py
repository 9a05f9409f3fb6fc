"""From a data folder to cases: scans are found with what belongs to them, prepared once, and audited.

Every problem of every scan is listed before the first step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch.utils.data import DataLoader, Dataset

from medfusion.config import Config, DataConfig
from medfusion.data.cache import cache_file, load_case, save_case
from medfusion.data.crops import STRIPPED, UNKNOWN, WHOLE_HEAD, Case, prepare, stripped
from medfusion.errors import MedfusionError, some
from medfusion.io import Series, discover, read
from medfusion.io.classes import read_classes
from medfusion.io.companions import check_patterns, companion, read_beside, read_labels, without
from medfusion.io.training_set import TrainingSet
from medfusion.training.audit import Audit, Scan, measure

MOST_WORKERS = 8  # scans prepared at a time: each takes several copies of its voxels


def load_cases(
    folder: Path,
    config: Config,
    *,
    cache: Path,
    exclude: Sequence[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> tuple[list[Case], Audit]:
    """The scans under ``folder`` that match ``config.data.images``, and with masks their skull-stripped twins.

    Scans with the same voxels are used once. The voxels are memory-mapped from the cache.

    Parameters
    ----------
    cache : folder that keeps the prepared scans; several runs may share it, also at the same time.
    exclude : shell patterns of the names of cases to leave out.
    progress : called after each scan that had to be prepared: how many are, how many there were to do, its name.

    Raises
    ------
    MedfusionError : nothing is found; a pattern or the table of classes does not fit; or some scans cannot be used: all
        of them are named, with the reason.
    """
    check_patterns(config.data.images, "data.", masks=config.data.masks, labels=config.data.labels)
    found, excluded = without(discover(folder, pattern=config.data.images), exclude)
    classes = _classes(folder, [series.name for series in found], config)
    sources, problems = _sources(found, config, cache)
    return _loaded(folder, sources, problems, classes, excluded, config, cache, progress)


def load_domains(
    folders: Sequence[Path],
    config: Config,
    *,
    cache: Path,
    exclude: Sequence[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> tuple[list[Case], Audit]:
    """The scans of two domains, a folder each; as ``load_cases``, but that a domain with masks is skull-stripped alone.

    The ``class_index`` of a case is the number of its domain, and its name begins with the name of it.

    Raises
    ------
    MedfusionError : as ``load_cases``; or there are not as many folders as domains, or a pattern of ``exclude`` is not
        of the form DOMAIN/NAME.
    """
    assert config.cyclegan is not None
    domains = config.cyclegan.domains
    if odd := [name for name in exclude if not name.startswith(tuple(f"{domain.name}/" for domain in domains))]:
        raise MedfusionError(f"--exclude {odd[0]}: names no domain", fix=f"e.g. --exclude {domains[0].name}/NAME")
    if len(folders) != len(domains):
        raise MedfusionError(
            f"{len(folders)} folder(s) for the domains {' and '.join(domain.name for domain in domains)}",
            fix="--data FIRST --data SECOND, in this order",
        )
    cases, scans, of, excluded = list[Case](), list[Scan](), dict[str, str](), list[str]()
    for number, (folder, domain) in enumerate(zip(folders, domains, strict=True)):
        data = config.data.model_copy(update={"images": domain.images, "masks": domain.masks})
        of_it = config.model_copy(update={"data": data})
        left_out = [name.removeprefix(f"{domain.name}/") for name in exclude if name.startswith(f"{domain.name}/")]
        found, audit = load_cases(folder, of_it, cache=cache, exclude=left_out, progress=progress)
        own = [scan.model_copy(update={"name": f"{domain.name} {scan.name}"}) for scan in audit.scans]
        scans += own
        of |= {scan.name: domain.name for scan in own}
        excluded += [f"{domain.name} {name}" for name in audit.excluded]
        cases += [
            replace(case, name=f"{domain.name} {case.name}", kind=WHOLE_HEAD, class_index=number)
            for case in found
            if not domain.masks or case.kind == STRIPPED
        ]
    audit = Audit(tuple(scans), config, of, tuple(excluded))
    return [case for case in cases if case.name not in audit.copies], audit


def load_training_set(
    real: TrainingSet,
    config: Config,
    *,
    cache: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> tuple[list[Case], Audit]:
    """The cases of a training set, those without a label map too; as ``load_cases``, but for patterns and masks.

    Raises
    ------
    MedfusionError : some scans cannot be used: all of them are named, with the reason.
    """
    sources = []
    for case in real.cases:
        [series] = discover(case.image)
        files = {"scan": series.files, "labels": [case.labels] if case.labels else []}
        cached = {WHOLE_HEAD: cache_file(cache, case.name, WHOLE_HEAD, config.preprocessing, files)}
        sources.append(_Source(replace(series, name=case.name), None, case.labels, cached))
    classes = _classes(real.root, [case.name for case in real.cases], config)
    return _loaded(real.root, sources, {}, classes, (), config, cache, progress)


def _classes(folder: Path, names: Sequence[str], config: Config) -> dict[str, str]:
    """The class of each scan, where the config has a table of them."""
    table = config.data.classes
    return read_classes(folder / table, names, config.network.classes) if table else {}


def _loaded(
    folder: Path,
    sources: Sequence[_Source],
    problems: dict[str, str],
    classes: dict[str, str],
    excluded: tuple[str, ...],
    config: Config,
    cache: Path,
    progress: Callable[[int, int, str], None],
) -> tuple[list[Case], Audit]:
    """The cases of all sources, prepared where the cache has them not."""
    refused = len(problems)  # they have no source
    problems = problems | _fill(cache, sources, config, progress)
    loaded = [_load(source) for source in sources if source.series.name not in problems]
    scans = tuple(scan for _, scan in loaded)
    problems |= _labels_beyond(scans, config.network.labels)
    if problems:
        raise MedfusionError(
            f"{folder}: {len(problems)} of {len(sources) + refused} scans cannot be trained on",
            fix="mend them, or leave them out: --exclude NAME"
            + (", or train without masks: --set data.masks=''" if config.data.masks else ""),
            **{f"problem_{number}": problems[name] for number, name in enumerate(sorted(problems), start=1)},
        )
    if config.data.labels and not any(scan.labels for scan in scans):
        raise MedfusionError(f"{folder}: no scan has a label map", labels=config.data.labels, fix="check data.labels")
    audit, known = Audit(scans, config, classes, excluded), config.network.classes
    cases = [case for kinds, scan in loaded for case in kinds if scan.name not in audit.copies]
    told = {name: known.index(found) for name, found in classes.items()}
    return [replace(case, class_index=told.get(case.name, UNKNOWN)) for case in cases], audit


@dataclass(frozen=True)
class _Source:
    """A scan, its mask and label map where the config has them, and the cached file of each kind of image of it."""

    series: Series
    mask: Path | None
    labels: Path | None
    cached: dict[float, Path]

    def is_cached(self) -> bool:
        return all(load_case(path) for path in self.cached.values())


def _sources(found: Sequence[Series], config: Config, cache: Path) -> tuple[list[_Source], dict[str, str]]:
    """What each scan is prepared from; and name to problem of those for which that cannot be."""
    sources, problems = [], {}
    for series in found:
        try:
            sources.append(_source(series, config, cache))
        except MedfusionError as error:
            problems[series.name] = _line(error)
    return sources, problems


def _source(series: Series, config: Config, cache: Path) -> _Source:
    data, preprocessing = config.data, config.preprocessing
    if series.problems:
        read(series)  # raises them
    if series.modality and series.modality != preprocessing.modality:
        raise MedfusionError(f"{series.name}: is {series.modality}, the config is for {preprocessing.modality}")
    mask = companion(series, data.images, data.masks, "mask") if data.masks else None
    labels = _labels(series, data) if data.labels else None
    files = {"scan": series.files, "labels": [labels] if labels else []}
    cached = {WHOLE_HEAD: cache_file(cache, series.name, WHOLE_HEAD, preprocessing, files)}
    if mask:
        cached[STRIPPED] = cache_file(cache, series.name, STRIPPED, preprocessing, files | {"mask": [mask]})
    return _Source(series, mask, labels, cached)


def _labels(series: Series, data: DataConfig) -> Path | None:
    """The label map; None where there is none and that is allowed, and of DICOM series, which have no file beside."""
    try:
        return companion(series, data.images, data.labels, "labels")
    except MedfusionError:
        if data.unlabelled:
            return None
        raise


def _line(error: MedfusionError) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in error.facts.items())
    return f"{error.what} ({facts})" if facts else error.what


def _fill(
    cache: Path, sources: Sequence[_Source], config: Config, progress: Callable[[int, int, str], None]
) -> dict[str, str]:
    """Prepare what is not in the cache, on all cores; returns name to problem of the scans where this failed.

    The lock makes the processes of one launch, and runs that share a cache, prepare each scan once.
    """
    if all(source.is_cached() for source in sources):
        return {}
    cache.mkdir(parents=True, exist_ok=True)
    problems = {}
    with FileLock(cache / ".lock"):
        missing = [source for source in sources if not source.is_cached()]
        workers = min(len(missing), os.cpu_count() or 1, MOST_WORKERS)
        prepared = DataLoader(
            _Preparation(missing, config),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers if workers > 1 else 0,
        )
        for done, (source, problem) in enumerate(zip(missing, prepared, strict=True), start=1):
            if isinstance(problem, MedfusionError):
                raise problem
            if problem:
                problems[source.series.name] = problem
            progress(done, len(missing), source.series.name)
    return problems


class _Preparation(Dataset[str | MedfusionError]):
    """Item n is what went wrong when scan n was put into the cache: with the scan a line, with the cache the error."""

    def __init__(self, sources: Sequence[_Source], config: Config) -> None:
        self.sources, self.config = sources, config

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> str | MedfusionError:
        source = self.sources[index]
        try:
            made = _prepare(source, self.config)
        except MedfusionError as error:
            return _line(error)
        try:
            for case, scan in made:
                save_case(source.cached[case.kind], case, scan.model_dump_json())
        except MedfusionError as error:
            return error
        return ""


def _as_it_is(item: Any) -> Any:
    return item


def _prepare(source: _Source, config: Config) -> list[tuple[Case, Scan]]:
    volume = read(source.series)
    labels = read_labels(source.labels, volume) if source.labels else None
    images = {WHOLE_HEAD: volume}
    if source.mask:
        images[STRIPPED] = stripped(volume, read_beside(source.mask, volume, "mask").array > 0)
    cases = [prepare(image, config.preprocessing, kind, labels) for kind, image in images.items()]
    return [(case, measure(volume, case, labels)) for case in cases]


def _load(source: _Source) -> tuple[list[Case], Scan]:
    """The images of a scan, and what the audit measured when the first of them was prepared."""
    loaded = [found for path in source.cached.values() if (found := load_case(path))]
    if len(loaded) < len(source.cached):
        raise MedfusionError(
            f"{source.series.name}: vanished from the cache",
            cache=source.cached[WHOLE_HEAD].parent,
            fix="begin again, and leave the cache alone meanwhile",
        )
    return [case for case, _ in loaded], Scan.model_validate_json(loaded[0][1])


def _labels_beyond(scans: Sequence[Scan], number: int) -> dict[str, str]:
    """Name to problem of the scans with labels that a network of so many (0: it is shown none) does not know."""
    beyond = {scan.name: [value for value in scan.labels if value >= number] for scan in scans} if number else {}
    return {
        name: f"{name}: label values {some(map(str, values))}, network.labels has 0 to {number - 1}"
        for name, values in beyond.items()
        if values
    }
