"""The cache: what was prepared comes back bit for bit, only while nothing has changed, and is whole or absent."""

import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from medfusion.config import PreprocessingConfig
from medfusion.data.cache import cache_file, load_case, save_case
from medfusion.data.crops import STRIPPED, WHOLE_HEAD, Case
from medfusion.errors import MedfusionError

MR = PreprocessingConfig()


def some_case(size: int = 8, labels: bool = True) -> Case:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn((size, size + 1, size + 2), generator=generator).half()
    regions = torch.arange(image.numel()).view(image.shape).to(torch.int16) if labels else None
    return Case("sub-01_T1", image, np.array([1 / 3, 2.5, 1e-17]), 1.1, STRIPPED, regions)


@pytest.mark.parametrize("labels", [True, False])
def test_a_case_comes_back_bit_for_bit(tmp_path: Path, labels: bool) -> None:
    case = some_case(labels=labels)
    save_case(tmp_path / "new" / "c.safetensors", case, "what the audit said: é")
    loaded, about = load_case(tmp_path / "new" / "c.safetensors") or pytest.fail("not found")
    assert about == "what the audit said: é"
    assert (loaded.name, loaded.spacing, loaded.kind) == (case.name, case.spacing, case.kind)
    np.testing.assert_array_equal(loaded.centre, case.centre)
    assert loaded.image.dtype == torch.float16
    assert torch.equal(loaded.image, case.image)
    assert (loaded.labels is None) is not labels
    if labels:
        assert loaded.labels is not None
        assert loaded.labels.dtype == torch.int16
        assert torch.equal(loaded.labels, case.labels)


def test_the_same_case_makes_the_same_file(tmp_path: Path) -> None:
    for number in range(8):
        save_case(tmp_path / f"{number}.safetensors", some_case(), "about it")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_the_name_of_the_file_follows_all_that_a_case_is_made_from(tmp_path: Path) -> None:
    scan, mask = tmp_path / "scan.nii", tmp_path / "mask.nii"
    scan.write_bytes(b"voxels")
    mask.write_bytes(b"brain")

    def key(kind: float = WHOLE_HEAD, config: PreprocessingConfig = MR, name: str = "a", **files: list[Path]) -> str:
        return cache_file(tmp_path, name, kind, config, files or {"scan": [scan]}).name

    first = key()
    assert key() == first
    others = [
        key(kind=STRIPPED),
        key(config=PreprocessingConfig(spacing=1.0)),
        key(name="b"),
        key(scan=[scan], mask=[mask]),
        key(scan=[scan], labels=[mask]),
        key(scan=[mask]),
    ]
    os.utime(scan, ns=(1, 1))
    others.append(key())
    scan.write_bytes(b"other voxels")
    os.utime(scan, ns=(1, 1))
    others.append(key())
    assert len({first, *others}) == 1 + len(others)


def test_a_scan_is_the_same_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(b"voxels")
    (tmp_path / "link.nii").symlink_to(tmp_path / "scan.nii")
    direct, linked = (cache_file(tmp_path, "a", 1.0, MR, {"scan": [tmp_path / f"{n}.nii"]}) for n in ("scan", "link"))
    assert direct == linked


def test_what_is_missing_or_damaged_is_none(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    assert load_case(path) is None
    save_case(path, some_case(), "")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:200], b"\0" * len(whole), whole.replace(b"centre", b"cxntre")):
        path.write_bytes(damaged)
        assert load_case(path) is None
    path.write_bytes(whole)
    assert load_case(path) is not None


def test_loading_reads_no_voxels(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_case(path, Case("a", torch.zeros((256,) * 3).half(), np.zeros(3), 2.0, WHOLE_HEAD), "")
    process = psutil.Process()
    before = process.memory_info().rss
    kept = [load_case(path) for _ in range(8)]
    assert process.memory_info().rss - before < 2**25 < sum(found[0].image.nbytes for found in kept if found)


def test_a_failing_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MedfusionError, match="a file is in the way"):
        save_case(tmp_path / "file" / "c.safetensors", some_case(), "")
    path = tmp_path / "c.safetensors"
    save_case(path, some_case(), "")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_case(path, some_case(), b"not a text")  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"c.safetensors", "file"}
