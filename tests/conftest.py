"""What every test may use."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scans; the tests that need it are skipped where MEDFUSION_DATA does not name one."""
    folder = os.environ.get("MEDFUSION_DATA")
    if not folder:
        pytest.skip("needs real scans: set MEDFUSION_DATA")
    return Path(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Opens a headless Chromium with further options; its downloads go to the attribute ``downloads``."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    opened = []

    def open_browser(*more: str) -> Any:
        folder = tmp_path_factory.mktemp("browser")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for option in (
            *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,800"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={folder / 'profile'}", *more),
        ):
            options.add_argument(option)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        opened.append(driver)
        driver.downloads = folder
        return driver

    yield open_browser
    for driver in opened:
        driver.quit()
