"""The tagging page: who is answered and who is not, and twenty cases tagged by keyboard in a real browser."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medfusion.analysis.tag_store import TagStore
from medfusion.analysis.tags import WRONG_LABEL
from medfusion.cli.errors.tags import cases_to_look_at
from medfusion.report.tagging import Study, TaggingServer
from medfusion.report.viewer import nifti, scan_nifti

HOSTILE = "<img src=x onerror=window.hacked=1>"
CASES = [*(f"case{number:02d}" for number in range(19)), HOSTILE]


def pictures(case: str) -> dict[str, bytes]:
    array = np.random.default_rng(len(case)).normal(size=(12, 14, 16))
    mask = np.zeros(array.shape, np.uint8)
    mask[3:6, 4:8, 5:9] = 1
    return {"scan": scan_nifti(array, np.eye(4)), "prediction": nifti(mask, np.eye(4)), "truth": nifti(mask, np.eye(4))}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], TaggingServer]]:
    """Starts a server on the store in ``tmp_path``, one after the other."""
    running: list[TaggingServer] = []

    def start() -> TaggingServer:
        server = TaggingServer(
            Study(HOSTILE, "0123abcd", CASES, pictures, TagStore(tmp_path / "tags.sqlite", ["noisy", HOSTILE]))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(
    server: TaggingServer, path: str, body: Any = None, headers: dict[str, str] | None = None, token: str | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
    sent = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, f"/{server.token if token is None else token}/{path}", content, sent | (headers or {}))
    answer = connection.getresponse()
    return answer.status, answer.read()


GIVEN = {"case": 1, "reviewer": "ann", "tag": "noisy", "on": True}


def test_who_is_answered_and_who_is_not(serve: Callable[[], TaggingServer]) -> None:
    server = serve()
    assert ask(server, "give", GIVEN)[0] == 200
    for path in ("", "study/ann", "tags.csv", "image/0/scan.nii.gz", "script/tagging.js"):
        assert ask(server, path)[0] == 200
        assert ask(server, path, token="guess")[0] == 403
        assert ask(server, path, token="")[0] == 403
        assert ask(server, path, headers={"Host": "evil.example"})[0] == 403
        assert ask(server, path, headers={"Origin": "https://evil.example"})[0] == 403
        assert ask(server, path, headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
    other = GIVEN | {"tag": HOSTILE}
    assert ask(server, "give", other, {"Origin": "null"})[0] == 403
    assert ask(server, "give", other, {"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "give", other, token="guess")[0] == 403
    assert json.loads(ask(server, "study/ann")[1])["given"] == {"case01": ["noisy"]}


@pytest.mark.parametrize(
    "path",
    [
        "image/20/scan.nii.gz",
        "image/-1/scan.nii.gz",
        "image/0/..%2f..%2ftags.sqlite",
        "image/../../etc/passwd",
        "image/0/other.nii.gz",
        "script/../tagging.py",
        "script/review.js",
        "tags.sqlite",
    ],
)
def test_files_outside_the_study_are_not_served(serve: Callable[[], TaggingServer], path: str) -> None:
    assert ask(serve(), path)[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (GIVEN | {"case": 20}, 404),
        (GIVEN | {"case": "case01"}, 404),
        (GIVEN | {"tag": "unknown"}, 400),
        (GIVEN | {"reviewer": " "}, 400),
        ({"case": 1}, 400),
        ([1], 400),
        (GIVEN | {"more": "x" * 30000}, 413),
    ],
)
def test_requests_that_make_no_sense_change_nothing(serve: Callable[[], TaggingServer], body: Any, status: int) -> None:
    server = serve()
    assert ask(server, "give", body)[0] == status
    assert ask(server, "tags.csv")[1] == b"case,reviewer,tag,comment,definition\n"


def test_pictures_are_those_of_the_case(serve: Callable[[], TaggingServer], tmp_path: Path) -> None:
    server = serve()
    assert json.loads(ask(server, "image/3/names")[1]) == ["scan", "prediction", "truth"]
    (tmp_path / "truth.nii.gz").write_bytes(ask(server, "image/3/truth.nii.gz")[1])
    assert np.asarray(nibabel.load(tmp_path / "truth.nii.gz").dataobj).sum() == 3 * 4 * 4


def test_correct_cases_are_mixed_in() -> None:
    import pandas as pd

    judged = pd.DataFrame({"error": np.arange(100) < 20}, index=[f"c{number:02d}" for number in range(100)])
    found = cases_to_look_at(judged, 15, seed=0)
    assert len(found) == len(set(found)) == 35
    assert sum(judged.loc[found, "error"]) == 20
    assert 3 < sum(judged.loc[found[:17], "error"]) < 17
    assert found == cases_to_look_at(judged, 15, seed=0) != cases_to_look_at(judged, 15, seed=1)
    assert len(cases_to_look_at(judged.iloc[:25], 15, seed=0)) == 25


SERVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.report.test_tagging import CASES, HOSTILE, Study, TagStore, TaggingServer, pictures
server = TaggingServer(Study(HOSTILE, "0123abcd", CASES, pictures, TagStore(Path(sys.argv[2]), ["noisy", HOSTILE])))
print(server.address, flush=True)
server.serve_forever()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a server in a process of its own, on the store in ``tmp_path``; the address is its first line."""
    running: list[subprocess.Popen[str]] = []

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVER, str(Path(__file__).parents[2]), str(tmp_path / "tags.sqlite")]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()


def wait(driver: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 60, poll_frequency=0.05).until(lambda d: d.execute_script(script))


def begin(driver: Any, address: str, reviewer: str) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.get(address)
    driver.find_element("id", "reviewer").send_keys(reviewer, Keys.ENTER)
    wait(driver, "return !document.getElementById('side').hidden && window.tagging !== undefined")


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def at(driver: Any, number: int) -> None:
    wait(driver, f"return document.getElementById('case').textContent.startsWith('Case {number} of 20')")


def test_twenty_cases_are_tagged_by_keyboard(
    browser: Callable[..., Any], start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Two reviewers at once; the server is killed in between and another goes on; a hostile name does nothing."""
    from selenium.webdriver.common.keys import Keys

    server = start()
    address = server.stdout.readline().strip()
    ann, bob = (browser("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader") for _ in range(2))
    begin(ann, address, "ann")
    begin(bob, address, HOSTILE)
    assert wait(ann, "return window.tagging.viewer.volumes.length === 3")
    for number in range(1, 9):
        at(ann, number)
        press(ann, "2" if number % 2 else "1", "j")  # label is wrong, noisy: the first two tags
        press(bob, "2", Keys.ARROW_RIGHT)
    at(ann, 9)
    at(bob, 9)

    server.kill()
    server.wait()
    press(ann, "2")
    wait(ann, "return document.getElementById('cautions').textContent.includes('Not stored')")
    assert ann.execute_script("return document.querySelectorAll('#tags [aria-pressed=true]').length") == 0
    begin(ann, start().stdout.readline().strip(), "ann")
    at(ann, 9)  # the first that was not seen

    press(ann, "n")
    ann.find_element("id", "new-tag").send_keys("motion", Keys.ENTER)
    wait(ann, "return document.querySelectorAll('#tags button').length === 4")
    assert ann.execute_script("return document.querySelectorAll('#revisit button').length") == 8
    for number in range(9, 20):
        at(ann, number)
        press(ann, "4", "j")
    at(ann, 20)
    press(ann, "c")
    ann.find_element("id", "comment").send_keys("seen, no tag" + HOSTILE, Keys.TAB)
    wait(ann, "return !document.getElementById('comment').matches(':focus')")
    press(ann, "k")
    at(ann, 19)
    assert ann.execute_script("return document.getElementById('progress').textContent") == "20 of 20 seen"
    for driver in (ann, bob):
        assert driver.execute_script("return window.hacked") is None
        assert not [entry for entry in driver.get_log("browser") if "Content Security Policy" in entry["message"]]

    found = TagStore(tmp_path / "tags.sqlite").export()
    mine = found[found["reviewer"] == "ann"].set_index("case")
    assert len(mine) == 20
    assert [mine.loc[case, "tag"] for case in CASES[:8]] == ["noisy", WRONG_LABEL] * 4
    assert set(mine.loc[CASES[8:19], "tag"]) == {"motion"}
    assert tuple(mine.loc[HOSTILE, ["tag", "comment"]]) == ("", "seen, no tag" + HOSTILE)
    assert len(found[found["reviewer"] == HOSTILE]) == 8
