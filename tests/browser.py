"""Debian's Chromium without a window: pages as people see them, what they complain of, and what they ask for.

Use it with `from tests.browser import browser` in a conftest. It reaches this machine alone, and a test that asks for
`browser.complaints()` sees whatever a page printed as an error, refused by its policy and could not load.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

LAPTOP, PHONE = 1440, 390  # pixels of width
WAIT = 30.0  # seconds
_HEIGHTS = {LAPTOP: 900, PHONE: 844}
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it cannot be made by root, nor in many containers
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--disable-features=OptimizationHints,MediaRouter,Translate",
    "--no-proxy-server",
    # No name has an address, so that no request can leave the machine even where a page asks for one.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
)


class Browser:
    """One tab. Every `open` begins with empty lists of complaints and requests."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._network: list[dict[str, Any]] = []
        self._console: list[dict[str, Any]] = []

    def open(self, address: str | Path, *, width: int = LAPTOP, height: int | None = None, dark: bool = False) -> None:
        """Load a page, or a file, in a window of so many pixels, and wait until it has loaded."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")
        self._collect()
        self._network, self._console = [], []
        self.driver.get(address.resolve().as_uri() if isinstance(address, Path) else address)

    def resize(self, width: int, height: int | None = None) -> None:
        size = {"width": width, "height": height or _HEIGHTS.get(width, 900)}
        more = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, **more})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of `return …` in the page."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, what: str, seconds: float = WAIT) -> Any:
        """Wait until a `return …` is true; that value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"waited in vain for {what}; the page shows:\n{self.text()[:3000]}"
            time.sleep(0.05)
        return value

    def text(self, selector: str = "body") -> str:
        """What can be read in the first element that matches; empty where there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector))

    def click(self, selector: str) -> None:
        from selenium.webdriver.common.by import By

        found = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found)
        found.click()

    def type(self, selector: str, text: str) -> None:
        """Type into an element; the empty selector types at whatever has the focus."""
        from selenium.webdriver.common.by import By

        found = (
            self.driver.find_element(By.CSS_SELECTOR, selector) if selector else self.driver.switch_to.active_element
        )
        found.send_keys(text)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.run("return document.documentElement.scrollWidth - window.innerWidth"))

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """Write a PNG. whole: the page in its full height, 8,000 pixels at most, else what the window shows."""
        import base64

        size = self.run(
            "const d = document.documentElement; return [window.innerWidth, window.innerHeight, d.scrollHeight]"
        )
        height = min(8000, size[2]) if whole else size[1]
        clip = {"x": 0, "y": 0, "width": size[0], "height": height, "scale": 1}
        asked = {"format": "png", "captureBeyondViewport": whole, **({"clip": clip} if whole else {})}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", asked)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def complaints(self) -> list[str]:
        """Errors and warnings in the console since `open`: exceptions, what the policy refused, what did not load."""
        self._collect()
        return [entry["message"] for entry in self._console if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since `open`, but those of data within itself."""
        self._collect()
        return [
            message["params"]["request"]["url"]
            for message in self._network
            if message["method"] == "Network.requestWillBeSent"
            and urlsplit(message["params"]["request"]["url"]).scheme not in ("data", "blob", "about")
        ]

    def strangers(self, own: Sequence[str] = ("127.0.0.1", "localhost")) -> list[str]:
        """Requests to any other host: there should be none."""
        return [url for url in self.requests() if urlsplit(url).scheme != "file" and urlsplit(url).hostname not in own]

    def _collect(self) -> None:
        self._console += self.driver.get_log("browser")
        self._network += [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """A browser whose profile is this folder."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and chromedriver, "install Debian's chromium and chromium-driver"
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    environ = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    service = webdriver.ChromeService(chromedriver, env=environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "localhost,127.0.0.1")  # the driver is here, whatever the way out is
        patch.setenv("SE_OFFLINE", "true")
        driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(WAIT)
    driver.set_script_timeout(WAIT)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests of a process; its profile is a folder of its own."""
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser
