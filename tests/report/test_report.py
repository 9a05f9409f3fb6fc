"""Figures show the right anatomy at the right place; pages are whole, offline and safe."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.spatial.transform import Rotation

from medfusion.errors import MedfusionError
from medfusion.report import (
    Details,
    Figure,
    KeyValues,
    Section,
    Table,
    comparison_figure,
    grey_window,
    run_section,
    slice_figure,
    slice_position,
    write_report,
)
from medfusion.report.figures import _cut, _field_of_view
from medfusion.report.page import format_seconds
from medfusion.volume import Volume


def phantom(affine: np.ndarray, shape: tuple[int, int, int], name: str = "phantom") -> Volume:
    """A ball of radius 40 mm at world (10, 20, 30) with a bright ball at its right, front and top."""
    world = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    array = 100.0 * (np.linalg.norm(world - [10, 20, 30], axis=-1) < 40)
    array += 200.0 * (np.linalg.norm(world - [25, 35, 45], axis=-1) < 8)
    return Volume(array.astype(np.int16), affine, name, "MR")


def affine_of(spacing: tuple[float, float, float], angles: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """Grid of those voxels, turned by those degrees, whose index (25, 25, 25) mm lies at world (10, 20, 30)."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = np.array([10, 20, 30]) - affine[:3, :3] @ (60 / np.array(spacing))
    return affine


GRIDS = {
    "isotropic RAS": (affine_of((2, 2, 2)), (60, 60, 60)),
    "thick slices": (affine_of((1.5, 1.5, 6)), (80, 80, 20)),
    "oblique": (affine_of((2, 2, 3), (12, -9, 20)), (60, 60, 40)),
    "LPS, axes swapped": (
        np.array([[0, 0, -2, 70], [0, -2, 0, 80], [3, 0, 0, -30], [0, 0, 0, 1.0]]),
        (40, 60, 60),
    ),
}


@pytest.fixture(params=GRIDS, ids=str)
def volume(request: pytest.FixtureRequest) -> Volume:
    affine, shape = GRIDS[request.param]
    return phantom(affine, shape)


@pytest.fixture
def plain() -> Volume:
    return phantom(*GRIDS["isotropic RAS"])


def pixels(png: bytes) -> np.ndarray:
    return imread(io.BytesIO(png), format="png")[..., :3]


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_are_radiological_and_undistorted_on_any_grid(volume: Volume, plane: str) -> None:
    image = _cut(volume.array, volume, plane, np.array([25.0, 35.0, 45.0]), _field_of_view(volume))
    ball, bright = np.argwhere(image > 50), np.argwhere(image > 200)
    height, width = np.ptp(ball, axis=0)
    assert height == pytest.approx(width, rel=0.12)  # a ball is round whatever the voxels are
    offset = bright.mean(axis=0) - (ball.max(axis=0) + ball.min(axis=0)) / 2
    assert offset[0] < -2  # superior or anterior is up
    assert offset[1] < -2  # the patient's right, or front, is on the left


def test_a_figure_has_one_panel_per_plane_and_colour_only_with_an_overlay(plain: Volume) -> None:
    grey = pixels(slice_figure(plain))
    assert np.ptp(grey, axis=-1).max() == 0
    heat = np.where(plain.array > 200, 5.0, 0.0)
    position = (25, 35, 45)
    assert np.ptp(pixels(slice_figure(plain, overlay=heat, position_mm=position)), axis=-1).max() > 0.3
    above = slice_figure(plain, overlay=heat, threshold=6.0, position_mm=position)
    panels = pixels(above)[:, : int(0.9 * grey.shape[1])]  # without the colour bar
    assert np.ptp(panels, axis=-1).max() == 0


def test_a_mask_is_outlined_where_the_figure_is_centred(plain: Volume) -> None:
    outlined = pixels(slice_figure(plain, mask=plain.array > 200))
    cyan = (outlined[..., 1] - outlined[..., 0]) > 0.4
    thirds = np.array_split(cyan, 3, axis=1)
    assert all(third.any() for third in thirds)
    assert np.ptp(pixels(slice_figure(plain, mask=np.zeros(plain.shape))), axis=-1).max() == 0  # an empty mask is fine


def test_position_is_inside_the_largest_component_even_when_it_is_hollow(plain: Volume) -> None:
    world = np.moveaxis(plain.to_world(np.moveaxis(np.indices(plain.shape), 0, -1)), -1, 0)
    radius = np.hypot(world[0] - 10, world[1] - 20)
    ring = (np.abs(radius - 25) < 4) & (np.abs(world[2] - 30) < 4)
    mask = ring.copy()
    mask[2, 2, 2] = True
    index = np.linalg.inv(plain.affine) @ [*slice_position(plain, mask), 1]
    assert ring[tuple(np.rint(index[:3]).astype(int))]
    np.testing.assert_allclose(slice_position(plain), [10, 20, 30], atol=2)


def test_window_leaves_air_black_and_follows_the_tissue(plain: Volume) -> None:
    low, high = grey_window(plain)
    assert low == 0
    assert high >= 100
    ct = Volume(plain.array, plain.affine, "ct", "CT")
    assert grey_window(ct) == (-160, 240)
    low, high = grey_window(Volume(np.zeros((4, 4, 4)), np.eye(4)))
    assert high > low


@pytest.mark.parametrize("shape", [(40, 40, 1), (8, 8, 8)])
def test_a_single_slice_or_constant_volume_can_be_drawn(shape: tuple[int, int, int]) -> None:
    flat = Volume(np.full(shape, 7, np.int16), np.diag([2.0, 2.0, 5.0, 1.0]))
    assert slice_figure(flat).startswith(b"\x89PNG")


def test_comparison_puts_the_difference_beside_its_two_columns(plain: Volume) -> None:
    other = plain.with_array(plain.array + 40, name="other")
    same = pixels(comparison_figure({"a": plain, "b": plain}, difference=("a", "b")))
    changed = pixels(comparison_figure({"a": plain, "b": plain, "c": other}, difference=("a", "c")))
    bar = int(0.9 * same.shape[1])
    assert np.ptp(same[:, :bar], axis=-1).max() < 0.02  # no difference: no colour
    columns = np.array_split(np.ptp(changed[:, :bar], axis=-1).max(axis=(0)), 4)
    assert [bool(column.max() > 0.2) for column in columns] == [False, False, False, True]


def test_comparison_shows_grids_of_their_own_at_one_place(plain: Volume) -> None:
    coarse = phantom(*GRIDS["oblique"], name="coarse")
    image = pixels(comparison_figure({"fine": plain, "coarse": coarse}))
    left, right = np.array_split(image[int(0.1 * len(image)) :, ..., 0] > 0.2, 2, axis=1)
    assert left.mean() == pytest.approx(right.mean(), rel=0.1)
    with pytest.raises(ValueError, match="not on the same grid"):
        comparison_figure({"fine": plain, "coarse": coarse}, difference=("fine", "coarse"))


class Page(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
RUN = {
    "command": "medfusion denoise in --out out",
    "settings": {"sigma": 2.5},
    "prior": {"name": "brain-t1"},
    "environment": {"device": "cpu"},
    "seconds": 312.4,
    "cases": [
        {"name": "sub-01", "status": "done", "seconds": 4.2, "outputs": ["sub-01.nii.gz"], "message": ""},
        {"name": HOSTILE, "status": "failed", "seconds": 0.3, "outputs": [], "message": "image and mask differ"},
    ],
}


@pytest.fixture
def page_file(tmp_path: Path, plain: Volume) -> Path:
    path = tmp_path / "report.html"
    blocks = [
        HOSTILE,
        Figure(slice_figure(plain), HOSTILE, HOSTILE),
        Table((HOSTILE, "PSNR"), [(HOSTILE, 31.23456), ("b", None)], HOSTILE),
        KeyValues({HOSTILE: HOSTILE}),
        Details(HOSTILE, HOSTILE),
    ]
    write_report(path, HOSTILE, [Section(HOSTILE, blocks), Section("b", ["text"]), run_section(RUN)], subtitle=HOSTILE)
    return path


def test_text_from_scans_is_shown_and_never_run(page_file: Path) -> None:
    html = page_file.read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 12


def test_page_asks_for_nothing_outside_itself(page_file: Path) -> None:
    html = page_file.read_text(encoding="utf-8")
    for tag, attributes in Page(html).tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html
    assert list(page_file.parent.iterdir()) == [page_file]


def test_page_is_accessible_and_says_that_it_is_research(page_file: Path) -> None:
    html = page_file.read_text(encoding="utf-8")
    tags = Page(html).tags
    assert html.index("For research, not for diagnosis") < html.index("<h1>")
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert all(attributes.get("scope") in {"row", "col"} for tag, attributes in tags if tag == "th")
    anchors = {attributes.get("id") for _, attributes in tags}
    assert all(attributes["href"][1:] in anchors for tag, attributes in tags if tag == "a")
    assert "31.23" in html
    assert "31.23456" not in html


def test_run_section_names_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    write_report(path, "Run", [run_section(RUN)])
    html = path.read_text(encoding="utf-8")
    assert "1 of 2 cases failed" in html
    for shown in (
        "image and mask differ",
        "5\N{NO-BREAK SPACE}min\N{NO-BREAK SPACE}12",
        "sub-01.nii.gz",
        "sigma: 2.5",
    ):
        assert shown in html
    assert html.count('class="badge failed"') == 1
    assert run_section({**RUN, "cases": RUN["cases"][:1]}).blocks[0] == "1 case, none failed."


def test_an_existing_page_is_replaced_and_survives_a_failure(page_file: Path) -> None:
    before = page_file.read_bytes()
    with pytest.raises(TypeError):
        write_report(page_file, "New", [Section("a", [Figure("not bytes", "alt")])])  # type: ignore[arg-type]
    assert page_file.read_bytes() == before
    write_report(page_file, "New", [])
    assert "<h1>New</h1>" in page_file.read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MedfusionError):
        write_report(tmp_path / "file" / "report.html", "Title", [])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.423, "0.42 s"),
        (9.98, "10 s"),
        (59.7, "1 min 00 s"),
        (312.4, "5 min 12 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds).replace("\N{NO-BREAK SPACE}", " ") == text
