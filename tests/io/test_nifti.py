"""NIfTI in and out on real files: odd grids, odd headers, damaged bytes."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medfusion.errors import MedfusionError
from medfusion.io.nifti import describe_nifti, read_nifti, write_nifti
from medfusion.volume import Volume

SHAPE = (6, 5, 4)
QFORM_ONLY = {"sform_code": 0, "qform_code": 1}


def rotation(seed: int = 0) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.diag(r))


def oblique(sizes: tuple[float, ...] = (0.7, 1.3, 4.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation() * sizes
    affine[:3, 3] = (-81.25, 12.3, 47.7)
    return affine


def values(dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (np.random.default_rng(1).normal(size=shape) * 50 + 100).astype(dtype)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **fields: object) -> Path:
    """Write with nibabel, then set header fields in the bytes, as a careless tool would."""
    image = nib.Nifti1Image(array, oblique() if affine is None else affine, dtype=array.dtype)
    nib.save(image, path)
    if fields:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = np.frombuffer(raw[:348], nib.nifti1.header_dtype).copy()
        for name, value in fields.items():
            header[name] = value
        raw = header.tobytes() + raw[348:]
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(path: Path, index: int | None = None) -> Volume:
    return read_nifti(describe_nifti(path, "case"), index)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_read_gives_the_values_and_affine_that_nibabel_gives(tmp_path, suffix, dtype):
    path = save(tmp_path / f"scan{suffix}", values(dtype), descrip=b"TE=3.1;Time=1230")
    series = describe_nifti(path, "case")
    assert series.problems == ()
    assert (series.name, series.kind, series.files, series.shape) == ("case", "nifti", (path,), SHAPE)
    assert series.description == "TE=3.1;Time=1230"
    volume = read_nifti(series)
    assert (volume.name, volume.modality, volume.source) == ("case", "", series)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array, nib.load(path).get_fdata())
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    np.testing.assert_array_equal(series.affine, volume.affine)


@pytest.mark.parametrize(("dtype", "expected"), [("uint8", "float32"), ("int16", "float32"), ("int32", "float64")])
def test_scaled_integers_become_floats(tmp_path, dtype, expected):
    volume = read(save(tmp_path / "scan.nii", values(dtype), scl_slope=0.37, scl_inter=-1024.5))
    assert volume.array.dtype == expected
    stored = values(dtype).astype(np.float64)
    np.testing.assert_allclose(volume.array, stored * np.float32(0.37) - 1024.5, rtol=1e-6)


def test_suffix_in_capitals_is_gzip_too(tmp_path):
    save(tmp_path / "scan.nii.gz", values("int16")).rename(tmp_path / "SCAN.NII.GZ")
    np.testing.assert_array_equal(read(tmp_path / "SCAN.NII.GZ").array, values("int16"))


def test_big_endian_file_is_read_in_native_order(tmp_path):
    image = nib.Nifti1Image(values("int16"), oblique()).as_reoriented(np.array([[0, 1], [1, 1], [2, 1]]))
    swapped = nib.Nifti1Image(image.get_fdata().astype("int16"), oblique(), image.header.as_byteswapped(">"))
    nib.save(swapped, tmp_path / "scan.nii")
    assert nib.load(tmp_path / "scan.nii").header.endianness == ">"
    volume = read(tmp_path / "scan.nii")
    assert volume.array.dtype.isnative
    np.testing.assert_array_equal(volume.array, values("int16"))
    write_nifti(volume, tmp_path / "out.nii")
    np.testing.assert_array_equal(read(tmp_path / "out.nii").affine, volume.affine)


def test_file_without_a_space_is_read_as_nibabel_does_and_keeps_its_codes(tmp_path):
    path = save(tmp_path / "scan.nii", values(), sform_code=0, qform_code=0)
    volume = read(path)
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    write_nifti(volume, tmp_path / "out.nii")
    header = nib.load(tmp_path / "out.nii").header
    assert (header["sform_code"], header["qform_code"]) == (0, 0)
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").affine, volume.affine)


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1000.0), ("micron", 0.001)])
def test_units_other_than_mm_are_converted(tmp_path, unit, scale):
    image = nib.Nifti1Image(values(), oblique())
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    volume = read(tmp_path / "scan.nii")
    np.testing.assert_allclose(volume.affine[:3], nib.load(tmp_path / "scan.nii").affine[:3] * scale)
    write_nifti(volume, tmp_path / "out.nii")
    written = nib.load(tmp_path / "out.nii")
    assert written.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(written.affine, volume.affine, rtol=1e-6)


@pytest.mark.parametrize("tail", [(1,), (1, 1), (1, 1, 1)])
def test_trailing_axes_of_length_one_are_dropped(tmp_path, tail):
    path = save(tmp_path / "scan.nii.gz", values().reshape(SHAPE + tail))
    assert describe_nifti(path, "case").shape == SHAPE
    np.testing.assert_array_equal(read(path).array, values())
    np.testing.assert_array_equal(read(path, 0).array, values())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_four_dimensional_file_needs_the_choice_of_a_volume(tmp_path, suffix):
    array = values("int16", (*SHAPE, 3))
    path = save(tmp_path / f"scan{suffix}", array)
    series = describe_nifti(path, "case")
    assert series.shape == (*SHAPE, 3)
    assert series.usable
    with pytest.raises(MedfusionError, match="case: which of its 3 volumes") as error:
        read_nifti(series)
    assert "--volume N" in error.value.fix
    for index in (-1, 3):
        with pytest.raises(MedfusionError, match=f"no volume {index}"):
            read_nifti(series, index)
    for index in range(3):
        np.testing.assert_array_equal(read_nifti(series, index).array, array[..., index])
    with pytest.raises(MedfusionError, match="no volume 1"):
        read(save(tmp_path / f"flat{suffix}", values()), 1)


BROKEN = {
    "2D": ({"dim": [2, 6, 20, 1, 1, 1, 1, 1]}, "this file has 2: 6 x 20"),
    "5D": ({"dim": [5, 6, 5, 2, 1, 2, 1, 1]}, "this file has 5: 6 x 5 x 2 x 1 x 2"),
    "zero axis": ({"dim": [3, 6, 0, 4, 1, 1, 1, 1]}, "an axis has no voxels: 6 x 0 x 4"),
    "zero time": ({"dim": [4, 6, 5, 4, 0, 1, 1, 1]}, "an axis has no voxels: 6 x 5 x 4 x 0"),
    "no axes": ({"dim": [0, 6, 5, 4, 1, 1, 1, 1]}, "this file has 1: 0"),
    "too large": ({"dim": [3, 600, 5, 4, 1, 1, 1, 1]}, "truncated: 832 of 48352 bytes"),
    "flat sform": ({"srow_z": [0, 0, 0, 0]}, "the affine cannot be inverted: voxel size"),
    "NaN sform": ({"srow_x": [np.nan] * 4}, "the affine holds NaN"),
    "zero voxel size": (
        {"sform_code": 0, "qform_code": 1, "pixdim": [1, 0, 1, 1, 0, 0, 0, 0]},
        "voxel size 0 x 1 x 1 mm",
    ),
    "wild quaternion": ({"sform_code": 0, "qform_code": 1, "quatern_b": 3}, "not a NIfTI file"),
    "unknown type": ({"datatype": 77}, "not a NIfTI file"),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_listed_and_refused(tmp_path, suffix, case):
    fields, message = BROKEN[case]
    path = save(tmp_path / f"scan{suffix}", values(), **fields)
    series = describe_nifti(path, "case")
    if not (case == "too large" and suffix == ".nii.gz"):  # there the header alone does not tell
        assert any(message in problem for problem in series.problems), series.problems
        assert (series.affine is None) == ("affine" in message or "voxel size" in message or "NIfTI" in message)
    with pytest.raises(MedfusionError, match="case: ") as error:
        read_nifti(series)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("complex64", "voxels are complex64"), ([("R", "u1"), ("G", "u1"), ("B", "u1")], "voxels are RGB")],
)
def test_voxels_that_are_not_real_numbers(tmp_path, dtype, message):
    path = save(tmp_path / "scan.nii.gz", np.zeros(SHAPE, dtype))
    assert any(message in problem for problem in describe_nifti(path, "case").problems)
    with pytest.raises(MedfusionError, match=message):
        read(path)


def damaged(path: Path, how: str) -> Path:
    noise = np.random.default_rng(0).integers(0, 30000, (24, 24, 24)).astype("int16")
    whole = save(path, noise).read_bytes()
    flipped = whole[:9000] + bytes([whole[9000] ^ 0x10]) + whole[9001:]
    cuts = {"cut in data": whole[:-5000], "cut in header": whole[:60], "empty": b"", "flipped bit": flipped}
    path.write_bytes(cuts.get(how) or {"not gzip": gzip.decompress(whole), "text": b"hello " * 99, "empty": b""}[how])
    return path


@pytest.mark.parametrize(
    ("how", "message", "header_tells"),
    [
        ("cut in data", "truncated", False),
        ("cut in header", "truncated", True),
        ("flipped bit", "gzip data are not valid", False),
        ("not gzip", "gzip data are not valid", True),
        ("text", "gzip data are not valid", True),
        ("empty", "empty", True),
    ],
)
def test_damaged_gzip_file(tmp_path, how, message, header_tells):
    path = damaged(tmp_path / "scan.nii.gz", how)
    assert any(message in problem for problem in describe_nifti(path, "case").problems) == header_tells
    with pytest.raises(MedfusionError, match=f"case: .*{message}"):
        read(path)


def test_other_files_are_not_nifti(tmp_path):
    (tmp_path / "text.nii").write_bytes(b"hello " * 99)
    (tmp_path / "packed.nii").write_bytes(save(tmp_path / "x.nii.gz", values()).read_bytes())
    (tmp_path / "empty.nii").touch()
    (tmp_path / "folder.nii").mkdir()
    nib.save(nib.MGHImage(values(), oblique()), tmp_path / "x.mgz")
    (tmp_path / "x.mgz").rename(tmp_path / "freesurfer.nii.gz")
    for name in ("text.nii", "packed.nii", "empty.nii", "folder.nii", "freesurfer.nii.gz", "absent.nii"):
        problems = describe_nifti(tmp_path / name, "case").problems
        assert len(problems) == 1, name
        with pytest.raises(MedfusionError, match="case: "):
            read(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    path = save(tmp_path / "scan.nii", values())
    path.chmod(0)
    assert describe_nifti(path, "case").problems == ("no permission to read the file",)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e36])
def test_values_that_no_sum_survives(tmp_path, bad):
    array = values()
    array[2, 3, 1] = array[4, 0, 0] = bad
    with pytest.raises(MedfusionError, match="case: 2 of 120 voxels are") as error:
        read(save(tmp_path / "scan.nii", array))
    assert "voxel (2, 3, 1)" in str(error.value)
    with pytest.raises(MedfusionError, match="2 of 120 voxels"):
        write_nifti(Volume(array.astype(np.float64), oblique()), tmp_path / "out.nii")
    assert not (tmp_path / "out.nii").exists()


SPACES = {
    "both": {"sform_code": 4, "qform_code": 1},
    "sform only": {"sform_code": 2, "qform_code": 0},
    "qform only": {
        "sform_code": 0,
        "qform_code": 1,
        "pixdim": [-1, 0.7, 1.3, 4, 0, 0, 0, 0],
        "quatern_b": 0.1,
        "quatern_d": -0.3,
    },
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("space", SPACES)
def test_round_trip_keeps_the_space_bit_for_bit(tmp_path, suffix, space):
    source = save(tmp_path / f"scan{suffix}", values("int16"), xyzt_units=2 | 8, **SPACES[space])
    before = source.read_bytes()
    volume = read(source)
    result = volume.with_array(volume.array * np.float64(0.93) + 0.5)
    write_nifti(result, tmp_path / f"out{suffix}")
    old, new = nib.load(source).header, nib.load(tmp_path / f"out{suffix}").header
    for field in ("qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "qoffset_x", "quatern_c"):
        np.testing.assert_array_equal(old[field], new[field])
    np.testing.assert_array_equal(old["pixdim"][:4], new["pixdim"][:4])
    again = read(tmp_path / f"out{suffix}")
    np.testing.assert_array_equal(again.affine, volume.affine)
    np.testing.assert_array_equal(again.array, result.array.astype(np.float32))
    assert again.array.dtype == np.float32
    assert source.read_bytes() == before


def test_one_volume_of_a_4d_file_keeps_its_space(tmp_path):
    source = save(tmp_path / "scan.nii.gz", values("int16", (*SHAPE, 3)), sform_code=3, qform_code=1, xyzt_units=2 | 8)
    write_nifti(read(source, 1), tmp_path / "out.nii.gz")
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.shape == SHAPE
    assert written.header["sform_code"] == 3
    np.testing.assert_array_equal(written.affine, nib.load(source).affine)


def test_nifti2_keeps_its_double_precision_affine(tmp_path):
    nib.save(nib.Nifti2Image(values(), oblique()), tmp_path / "scan.nii")
    volume = read(tmp_path / "scan.nii")
    np.testing.assert_array_equal(volume.affine, oblique())
    write_nifti(volume, tmp_path / "out.nii")
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").affine, oblique())


def test_other_grid_stays_in_the_world_of_its_source(tmp_path):
    source = describe_nifti(save(tmp_path / "scan.nii", values(), sform_code=4, qform_code=1), "case")
    write_nifti(Volume(values(shape=(3, 5, 4)), oblique((2, 2, 2)), source=source), tmp_path / "out.nii")
    header = nib.load(tmp_path / "out.nii").header
    assert (header["sform_code"], header["qform_code"], header.get_xyzt_units()[0]) == (4, 4, "mm")
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, oblique((2, 2, 2)), atol=1e-5)


def test_volume_from_elsewhere_is_in_scanner_space_and_opens_in_itk(tmp_path):
    write_nifti(Volume(values(), oblique()), tmp_path / "out.nii.gz")
    written = nib.load(tmp_path / "out.nii.gz")
    header = written.header
    assert (header["sform_code"], header["qform_code"], header.get_xyzt_units()[0]) == (1, 1, "mm")
    np.testing.assert_allclose(written.affine, oblique(), rtol=1e-6)
    np.testing.assert_allclose(header.get_qform(), oblique(), atol=1e-4)
    image = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    np.testing.assert_allclose(image.GetOrigin(), [-1, -1, 1] * oblique()[:3, 3], atol=1e-4)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, values())


def test_shear_stays_in_the_sform_and_no_wrong_qform_is_offered(tmp_path):
    sheared = oblique()
    sheared[:3, 2] += 0.4 * sheared[:3, 0]
    write_nifti(Volume(values(), sheared), tmp_path / "out.nii")
    header = nib.load(tmp_path / "out.nii").header
    assert (header["sform_code"], header["qform_code"]) == (1, 0)
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, sheared, rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "stored"),
    [
        (np.eye(4, dtype=bool)[None], "uint8"),
        (np.full((2, 2, 2), 255, "int64"), "uint8"),
        (np.full((2, 2, 2), -1, "int64"), "int16"),
        (np.full((2, 2, 2), 40_000, "uint16"), "int32"),
        (np.full((2, 2, 2), 2**40, "int64"), "int64"),
        (np.full((2, 2, 2), 0.1, "float64"), "float32"),
        (np.full((2, 2, 2), 0.1, "float16"), "float32"),
    ],
)
def test_types_on_disk_hold_the_values_unscaled(tmp_path, array, stored):
    write_nifti(Volume(array, oblique()), tmp_path / "out.nii.gz")
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.get_data_dtype() == stored
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    np.testing.assert_array_equal(np.asarray(written.dataobj), array.astype(stored))


def test_write_is_repeatable_and_refuses_existing_and_odd_names(tmp_path):
    volume = Volume(values(), oblique())
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(volume, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    with pytest.raises(MedfusionError, match="exists already"):
        write_nifti(volume, tmp_path / "a.nii.gz")
    write_nifti(volume.with_array(volume.array + 1), tmp_path / "a.nii.gz", overwrite=True)
    np.testing.assert_array_equal(read(tmp_path / "a.nii.gz").array, values() + 1)
    with pytest.raises(MedfusionError, match="not a NIfTI file name"):
        write_nifti(volume, tmp_path / "out.mgz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


@pytest.mark.parametrize("text", ["", "medfusion: SYNTHETIC", "x" * 100])
def test_description_goes_into_the_header(tmp_path, text):
    write_nifti(Volume(values(), oblique()), tmp_path / "out.nii.gz", description=text)
    assert describe_nifti(tmp_path / "out.nii.gz", "case").description == text[:79]


def test_vanished_source_is_an_error_not_a_guess(tmp_path):
    volume = read(save(tmp_path / "scan.nii", values()))
    (tmp_path / "scan.nii").unlink()
    with pytest.raises(MedfusionError, match="its source cannot be read any more"):
        write_nifti(volume, tmp_path / "out.nii")


@pytest.mark.skipif("MEDFUSION_DATA" not in os.environ, reason="needs MEDFUSION_DATA")
def test_real_scans_survive_a_round_trip(tmp_path):
    data = Path(os.environ["MEDFUSION_DATA"])
    folders = ("ixi_t1_2mm/dev", "hippocampus/dev", "stroke_masks/dev", "oasis_t1_2mm/dev", "ct", "glioma")
    found = [path for folder in folders for path in sorted((data / folder).rglob("*.nii.gz"))[:3]]
    assert len(found) > 10
    for path in found:
        volume = read(path)
        write_nifti(volume, tmp_path / path.name)
        again, original = nib.load(tmp_path / path.name), nib.load(path)
        np.testing.assert_array_equal(again.affine, original.affine)
        np.testing.assert_allclose(again.get_fdata(), original.get_fdata(), rtol=1e-6)
        assert again.header["sform_code"] == original.header["sform_code"]
