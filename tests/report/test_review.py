"""The review page: true geometry, nothing sent, hostile text harmless, verdicts kept and saved, in a real browser."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.spatial.transform import Rotation

from medfusion.errors import MedfusionError
from medfusion.io.findings import Finding
from medfusion.report import review
from medfusion.report.review import format_place, write_review
from medfusion.volume import Volume

HOSTILE = '</script><img src=x onerror="window.hacked=1">\'&\u2028<!--<script>'
BRIGHT, DARK = (30, 12, 20), (10, 26, 16)  # voxels of two lesions
SCAN_AT = {BRIGHT: 900, DARK: 450}
COLUMNS = "case finding x y z i j k volume_ml peak mean direction p label verdict comment reviewer reviewed_at"


def oblique() -> np.ndarray:
    """Axes swapped and turned, so that i runs to the left, j up and k to the front, near enough."""
    affine = np.eye(4)
    turned = Rotation.from_euler("xyz", (8, -6, 10), degrees=True).as_matrix()
    affine[:3, :3] = turned @ np.array([[-2.0, 0, 0], [0, 0, 2.5], [0, 2.0, 0]])
    affine[:3, 3] = (50.0, -40.0, -20.0)
    return affine


def scan_of(name: str = "sub-01") -> Volume:
    """A head-like block of 300 with a lesion of 900 and one of 450."""
    array = np.zeros((40, 36, 32), np.int16)
    array[3:37, 3:33, 3:29] = 300
    for voxel, value in SCAN_AT.items():
        array[ball(voxel)] = value
    return Volume(array, oblique(), name, "MR")


def ball(voxel: tuple[int, int, int]) -> np.ndarray:
    return np.linalg.norm(np.moveaxis(np.indices((40, 36, 32)), 0, -1) - voxel, axis=-1) <= 4


def anomaly() -> np.ndarray:
    return (8.0 * ball(BRIGHT) - 5.0 * ball(DARK)).astype(np.float32)


def finding_at(number: int, voxel: tuple[int, int, int], **values: Any) -> Finding:
    x, y, z = (round(float(value), 1) for value in scan_of().to_world(voxel))
    known: dict[str, Any] = {"volume_ml": 2.25, "peak": 8.0, "mean": 7.5, "direction": "brighter", "p": 0.004}
    return Finding(number, x, y, z, *voxel, **{**known, **values})


FINDINGS = [finding_at(1, BRIGHT, label=HOSTILE), finding_at(2, DARK, direction="darker", peak=5.0, p=float("nan"))]


def write(path: Path, **changes: Any) -> Path:
    scan = changes.pop("scan", scan_of())
    arguments: dict[str, Any] = {
        "signed": anomaly(),
        "findings": FINDINGS,
        "threshold": 3.0,
        "facts": {"p of the heaviest region": 0.0123456, HOSTILE: HOSTILE, "Cautions": [HOSTILE]},
        "mask": (anomaly() != 0).astype(np.uint8),
    }
    write_review(path, scan, **{**arguments, **changes})
    return path


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("review") / "sub-01.html")


class Page(HTMLParser):
    """Tags and the content of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    def embedded(self, name: str) -> str:
        return next(text for attributes, text in self.scripts if attributes.get("id") == name)

    def nifti(self, name: str) -> nibabel.Nifti1Image:
        return nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(self.embedded(f"{name}-nifti"))))


def test_scan_and_map_lie_in_the_page_on_their_own_grid(page_file: Path) -> None:
    scan, shown = scan_of(), Page(page_file)
    for name, array in (("scan", scan.array), ("map", anomaly())):
        image = shown.nifti(name)
        np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)
        np.testing.assert_allclose(image.get_fdata(), array, atol=np.ptp(array) / 1500)
    assert image.header["sform_code"] > 0
    mask = shown.nifti("mask").get_fdata() != 0
    assert mask[anomaly() != 0].all()
    assert mask.sum() < 2.5 * np.count_nonzero(anomaly())


def test_what_lies_far_below_the_threshold_is_left_out(tmp_path: Path) -> None:
    signed = np.where(ball(BRIGHT), 8.0, np.where(ball(DARK), -1.6, 1.4)).astype(np.float32)
    image = Page(write(tmp_path / "page.html", signed=signed)).nifti("map").get_fdata()
    np.testing.assert_allclose(image, np.where(signed == np.float32(1.4), 0, signed), atol=0.005)


def test_a_large_scan_is_shown_at_half_resolution_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medfusion.report.viewer.VOXELS", 12_000)
    affine = oblique() @ np.diag([1, 1, 3, 1.0])  # slices thrice as thick stay as they are
    index = np.moveaxis(np.indices((40, 36, 31)), 0, -1)
    right = index @ affine[0, :3] + affine[0, 3]
    signed = np.zeros(right.shape, np.float32)
    signed[20, 21, 7], signed[21, 21, 7] = -7.0, 4.0
    path = write(
        tmp_path / "page.html", scan=Volume(right, affine), signed=signed, findings=[], mask=np.zeros(signed.shape)
    )
    shown = Page(path)
    scan, signs = shown.nifti("scan"), shown.nifti("map").get_fdata()
    assert scan.shape == signs.shape == (20, 18, 31)
    expected = np.moveaxis(np.indices(scan.shape), 0, -1) @ scan.affine[0, :3] + scan.affine[0, 3]
    np.testing.assert_allclose(scan.get_fdata(), expected, atol=0.5)  # mm; the rarest values are clipped
    assert signs.min() == signs[10, 10, 7] == pytest.approx(-7, abs=0.01)
    assert np.count_nonzero(signs) == 1
    assert "blocks of 2 × 2 × 1 voxels" in path.read_text(encoding="utf-8")


def test_text_from_scans_is_text_and_only_the_scripts_of_the_page_may_run(tmp_path: Path) -> None:
    path = write(tmp_path / "page.html", scan=scan_of(f"a{HOSTILE}"))
    html, shown = path.read_text(encoding="utf-8"), Page(path)
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
    assert all((attributes["src"] or "").startswith("data:image/png") for tag, attributes in shown.tags if tag == "img")
    assert json.loads(shown.embedded("page"))["case"] == f"a{HOSTILE}"
    executed = [text for attributes, text in shown.scripts if "type" not in attributes]
    policy = next(attributes["content"] or "" for tag, attributes in shown.tags if "Policy" in str(attributes))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in executed]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert len(hashes) == 3
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in shown.tags}
    assert html.index("For research, not for diagnosis") < html.index("<h1>")
    assert "0.01235" in html


def test_each_finding_has_a_picture_up_to_a_dozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "PICTURES", 1)
    shown = Page(write(tmp_path / "page.html"))
    alts = [attributes["alt"] or "" for tag, attributes in shown.tags if tag == "img"]
    assert len(alts) == 2
    assert "Finding 1" in alts[1]
    assert "brighter" in alts[1]


def test_what_cannot_be_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        write(tmp_path / "page.html", mask=np.zeros((4, 4, 4), np.uint8))
    path = tmp_path / "there.html"
    path.write_text("mine")
    with pytest.raises(MedfusionError):
        write(path)
    assert path.read_text() == "mine"
    write(path, overwrite=True, findings=[], signed=np.zeros((40, 36, 32), np.float32))
    assert "No finding" in path.read_text(encoding="utf-8")


def test_places_name_the_side() -> None:
    assert format_place((-12.4, 34.0, -0.2)) == "L 12, A 34, S 0"
    assert format_place((3.6, -1.0, -7.5)) == "R 4, P 1, I 8"


# ---- In a browser


@pytest.fixture(scope="module")
def viewer(browser: Callable[..., Any], page_file: Path) -> Any:
    """The page in a browser whose WebGL runs in software."""
    driver = browser("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
    driver.get(page_file.as_uri())
    wait(driver, "return Boolean(window.review)")
    return driver


def wait(driver: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 60, poll_frequency=0.1).until(lambda d: d.execute_script(script))


def find(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def crosshair(driver: Any) -> np.ndarray:
    script = "const v = window.review.viewer; return [...v.frac2mm(v.scene.crosshairPos)].slice(0, 3)"
    return np.array(driver.execute_script(script))


def coloured_columns(driver: Any, sign: int) -> np.ndarray:
    """Columns, as shares of the width, of the orange (sign 1) or blue (-1) pixels in the picture of the canvas."""
    image = imread(io.BytesIO(find(driver, "#canvas").screenshot_as_png), format="png")[..., :3]
    return np.argwhere(sign * (image[..., 0] - image[..., 2]) > 0.3)[:, 1] / image.shape[1]


def test_the_viewer_opens_and_asks_for_nothing(viewer: Any) -> None:
    assert (
        viewer.execute_script("return window.review.viewer.volumes.map((v) => v.hdr.dims.slice(1, 4))")
        == [[40, 36, 32]] * 2
    )
    events = [json.loads(entry["message"])["message"] for entry in viewer.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in asked)
    own = ("data:", "blob:", "chrome:")  # the last is the browser's own first tab
    assert not [url for url in asked if not url.startswith(own) and not url.endswith("/sub-01.html")]
    assert not viewer.get_log("browser")
    assert not find(viewer, "#pictures").get_attribute("open")


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.direction)
def test_a_click_on_a_finding_shows_its_place_on_an_oblique_grid(viewer: Any, finding: Finding) -> None:
    find(viewer, f"[data-key='{finding.number}'] .values .number").click()
    assert find(viewer, f"[data-key='{finding.number}']").get_attribute("aria-current") == "true"
    np.testing.assert_allclose(crosshair(viewer), (finding.x, finding.y, finding.z), atol=0.01)
    location = find(viewer, "#location").text
    voxel = (finding.i, finding.j, finding.k)
    assert f"voxel {voxel[0]}, {voxel[1]}, {voxel[2]}" in location
    assert float(re.search(r"scan (\d+\.?\d*)", location)[1]) == pytest.approx(SCAN_AT[voxel], abs=1)
    assert format_place((finding.x, finding.y, finding.z)) in location


def test_the_patients_right_is_on_the_left_and_the_threshold_hides_the_map(viewer: Any) -> None:
    viewer.execute_script("window.review.viewer.opts.crosshairColor = [1, 1, 1, 1]")
    find(viewer, "[data-key='1'] .go").click()
    select(viewer, "#plane", "AXIAL")
    outlined = len(coloured_columns(viewer, -1))
    find(viewer, "#outline").click()
    assert len(coloured_columns(viewer, -1)) < outlined - 50
    middle = scan_of().to_world((19.5, 17.5, 15.5))
    shares = {}
    for number, voxel, sign in ((1, BRIGHT, 1), (2, DARK, -1)):
        find(viewer, f"[data-key='{number}'] .go").click()
        columns = coloured_columns(viewer, sign)
        assert len(columns) > 50
        assert (columns.mean() < 0.5) == (scan_of().to_world(voxel)[0] > middle[0])
        assert len(coloured_columns(viewer, -sign)) < len(columns) / 5
        shares[number] = columns.mean()
    assert abs(shares[1] - shares[2]) > 0.1
    slider = find(viewer, "#threshold")
    viewer.execute_script("arguments[0].value = 6; arguments[0].dispatchEvent(new Event('input'))", slider)
    assert viewer.execute_script("return window.review.viewer.volumes[1].cal_min") == 6
    assert "6.00" in find(viewer, "label[for=threshold]").text
    assert len(coloured_columns(viewer, -1)) < 5
    find(viewer, "[data-key='1'] .go").click()
    assert len(coloured_columns(viewer, 1)) > 50
    select(viewer, "#plane", "MULTIPLANAR")


def select(driver: Any, selector: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(find(driver, selector)).select_by_value(value)


def test_text_from_the_scan_is_shown_as_text(viewer: Any) -> None:
    assert find(viewer, "[data-key='1'] .label").get_property("textContent").strip() == HOSTILE
    assert viewer.execute_script("return [window.hacked, document.querySelectorAll('img[src=x]').length]") == [None, 0]


def test_verdicts_outlast_a_reload_and_are_saved(viewer: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    body = find(viewer, "body")
    find(viewer, "[data-key='1'] .go").click()
    body.send_keys("f")
    find(viewer, "[data-key='1'] .comment").send_keys('=cmd(),"x"; jk')
    find(viewer, "[data-key='1'] .go").send_keys("j")
    find(viewer, "[data-key='2'] label.true").click()
    find(viewer, "[data-key='2'] label.true").click()  # taken back
    find(viewer, "[data-key='2'] label.unsure").click()
    find(viewer, "#reviewer").send_keys("@Ada")
    find(viewer, "#canvas").send_keys(Keys.ARROW_LEFT, Keys.PAGE_UP)
    find(viewer, "#add-missed").click()
    find(viewer, "[data-key='M1'] .comment").send_keys("-2 more")
    find(viewer, "#add-missed").click()
    find(viewer, "[data-key='M2'] .remove").click()
    place = crosshair(viewer)
    assert place[0] > FINDINGS[1].x + 1  # to the patient's right, which is on the left
    assert place[2] > FINDINGS[1].z + 1
    viewer.refresh()
    wait(viewer, "return Boolean(window.review)")
    assert find(viewer, "#progress").text == "2 of 2 judged, 1 missed"
    assert find(viewer, "[data-key='2'] input[value=unsure]").is_selected()
    find(viewer, "#save").click()
    saved = viewer.downloads / "sub-01_review.csv"
    wait(viewer, "return document.getElementById('progress').textContent.startsWith('Saved')")
    for _ in range(100):
        if saved.is_file():
            break
        viewer.execute_async_script("setTimeout(arguments[0], 50)")
    with saved.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS.split()
    first, second, missed = rows
    for row, finding in ((first, FINDINGS[0]), (second, FINDINGS[1])):
        for name in ("x", "y", "z", "i", "j", "k", "volume_ml", "peak", "mean"):
            assert float(row[name]) == getattr(finding, name)
        assert (row["case"], row["finding"], row["direction"]) == ("sub-01", str(finding.number), finding.direction)
    assert (first["verdict"], first["comment"], first["label"]) == ("false", '\'=cmd(),"x"; jk', HOSTILE)
    assert (second["verdict"], second["comment"], second["p"]) == ("unsure", "", "")
    assert (missed["finding"], missed["verdict"], missed["comment"]) == ("M1", "missed", "'-2 more")
    np.testing.assert_allclose([float(missed[axis]) for axis in "xyz"], place, atol=0.051)
    voxel = np.linalg.inv(oblique()) @ [*place, 1]
    assert all(re.fullmatch(r"-?\d+(\.\d)?", missed[axis]) for axis in "xyz")
    assert [int(missed[axis]) for axis in "ijk"] == np.rint(voxel[:3]).astype(int).tolist()
    assert {row["reviewer"] for row in rows} == {"'@Ada"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", row["reviewed_at"]) for row in rows)
    assert not viewer.get_log("browser")


def test_without_webgl_pictures_and_verdicts_remain(browser: Callable[..., Any], page_file: Path) -> None:
    driver = browser("--disable-3d-apis")
    driver.get(page_file.as_uri())
    wait(driver, "return document.body.classList.contains('no-viewer')")
    assert "no WebGL 2" in find(driver, "#stage-notice").text
    driver.execute_script("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager' })")
    wait(driver, "return [...document.images].length === 3 && [...document.images].every((i) => i.naturalWidth > 500)")
    assert find(driver, "#pictures img").is_displayed()
    find(driver, "[data-key='2'] label.false").click()
    assert find(driver, "#progress").text == "1 of 2 judged"
