"""The walk-through of docs/errors.md, with a browser in place of the reviewer: its commands, its tags, its pictures.

    python pipelines/error_walkthrough.py --out runs/kidney [--pictures docs]

Writes the synthetic scans of `pipelines/kidney_reader.py`, runs every command, tags each error by keyboard as a
reviewer would who sees why it is one, and takes screenshots of the tagging page and of the report. Needs Chromium, its
driver and selenium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import kidney_reader as reader

SYSTEM = Path(reader.__file__)
DEFINE = ("--define", "error.yaml")
TAGS = {"organ": "wrong organ", "mass": "mass misread", "label": "label is wrong"}


def medfusion(folder: Path, *arguments: str) -> str:
    """Run a command of the walk-through, and show it."""
    print("$ medfusion errors", *arguments, flush=True)
    command = [sys.executable, "-m", "medfusion", "errors", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def open_browser() -> Any:
    """Chromium without a window, its WebGL in software."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,800"),
        *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    ):
        options.add_argument(option)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def tag_all(folder: Path, browser: Any, picture: Path | None) -> None:
    """Serve the page, tag every case by keyboard, save the CSV as the page hands it out."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    faults = {case.name: case.faults for case in reader.cases()}
    folders = [word for kind in ("images", "predictions", "truths") for word in (f"--{kind}", kind)]
    folders[1] = "scans"
    options = [
        *DEFINE,
        *folders,
        "--split",
        "split",
        "--store",
        "tags.sqlite",
        "--tag",
        TAGS["organ"],
        "--tag",
        TAGS["mass"],
    ]
    command = [sys.executable, "-m", "medfusion", "errors", "tag", "cases.csv", *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = next(line.strip() for line in server.stdout if line.strip().startswith("http"))
        browser.get(address)
        browser.find_element("id", "reviewer").send_keys("resident", Keys.ENTER)
        wait = WebDriverWait(browser, 60, poll_frequency=0.05)
        wait.until(lambda page: page.execute_script("return window.tagging !== undefined"))
        number = 1
        while True:
            wait.until(lambda page: page.find_element("id", "case").text.startswith(f"Case {number} "))  # noqa: B023
            title = browser.find_element("id", "case").text
            place, many, name = re.fullmatch(r"Case (\d+) of (\d+): (.*)", title).groups()
            keys = [key for fault, key in (("label", "1"), ("organ", "2"), ("mass", "3")) if fault in faults[name]]
            ActionChains(browser).send_keys(*keys).perform() if keys else None
            wait.until(
                lambda page: len(page.find_elements("css selector", "#tags [aria-pressed=true]")) == len(keys)  # noqa: B023
            )
            if picture is not None and "organ" in faults[name]:
                wait.until(lambda page: page.execute_script("return window.tagging.number") == number - 1)  # noqa: B023
                browser.save_screenshot(str(picture))
                picture = None
            if place == many:
                break
            ActionChains(browser).send_keys("j").perform()
            number += 1
        ActionChains(browser).send_keys("k").perform()  # the last one is seen when it is left
        wait.until(lambda page: page.find_element("id", "progress").text == f"{many} of {many} seen")
        (folder / "tags.csv").write_bytes(urllib.request.urlopen(f"{address}tags.csv").read())
        server.terminate()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kidney"))
    parser.add_argument("--pictures", type=Path, help="folder for errors_tagging.png and errors_report.png")
    asked = parser.parse_args()
    folder = asked.out.resolve()
    if folder.exists():
        raise SystemExit(f"{folder} is there already")
    if asked.pictures:
        asked.pictures.mkdir(parents=True, exist_ok=True)
    reader.write_study(folder)
    medfusion(folder, "sizes", "--errors", "20", "--cases", "cases.csv", *DEFINE, "--available", "150")
    medfusion(
        folder, "split", "cases.csv", "split", *DEFINE, "--eyeball", "100", "--stratify", "site", "--images", "scans"
    )
    browser = open_browser()
    try:
        tag_all(folder, browser, asked.pictures and asked.pictures / "errors_tagging.png")
        medfusion(folder, "table", "cases.csv", "tags.csv", *DEFINE, "--split", "split", "--cost", "wrong organ=2")
        medfusion(folder, "run", str(SYSTEM), "parts.csv")
        medfusion(folder, "parts", "parts.csv", *DEFINE, "--split", "split")
        medfusion(folder, "slices", "cases.csv", *DEFINE, "--split", "split")
        medfusion(folder, "measure", "cases.csv", "measured.csv", *DEFINE, "--images", "scans", "--truths", "truths")
        medfusion(folder, "slices", "measured.csv", *DEFINE, "--split", "split")
        medfusion(folder, "ask", "split", "cases.csv", *DEFINE, "--model", "reader-1")
        tables = ["--tags", "tags.csv", "--parts", "parts.csv", "--split", "split"]
        medfusion(folder, "report", "cases.csv", "report", *DEFINE, *tables, "--images", "scans", "--truths", "truths")
        if asked.pictures:
            browser.set_window_size(1100, 1500)
            browser.get((folder / "report" / "report.html").as_uri())
            browser.execute_script("document.querySelectorAll('h2')[1].scrollIntoView()")
            browser.save_screenshot(str(asked.pictures / "errors_report.png"))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
