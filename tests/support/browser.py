"""A real browser without a window: Debian's Chromium, which is installed if it is missing and that is allowed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from celery_sharding.testing.processes import wait_until
from support.programs import find_program

# Where pictures of the pages go; a temporary folder if it is not set.
_PICTURES = "SHARDING_TEST_PICTURES"


class Browser:
    """A browser with one page open at a time."""

    def __enter__(self) -> Self:
        options = ChromeOptions()
        options.binary_location = find_program("chromium", package="chromium")
        options.add_argument("--headless=new")
        options.add_argument("--no-sandbox")  # which needs another user than root
        options.add_argument("--disable-dev-shm-usage")
        options.add_argument("--hide-scrollbars")
        options.add_argument("--window-size=1280,860")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._driver = Chrome(options, Service(find_program("chromedriver", package="chromium-driver")))
        self.pictures = Path(os.environ.get(_PICTURES) or tempfile.mkdtemp(prefix="sharding-pictures-"))
        self.pictures.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.quit()

    def open(self, url: str, *, theme: str = "light") -> None:
        """Open a page, for somebody whose system has that theme."""
        media = [{"name": "prefers-color-scheme", "value": theme}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        self._driver.get(url)

    def resize(self, width: int, height: int) -> None:
        self._driver.set_window_size(width, height)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a JavaScript function and return what it returns."""
        return self._driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """Return what is to be read in the first element that fits."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        found = self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)
        return [str(text) for text in found]

    def is_shown(self, selector: str) -> bool:
        return bool(self.run("return Boolean(document.querySelector(arguments[0])?.checkVisibility())", selector))

    def click(self, selector: str) -> None:
        """Click like a person: something that is hidden or covered cannot be."""
        self._driver.find_element("css selector", selector).click()

    def wait_for(self, condition: Callable[[Self], Any], *, timeout_seconds: float = 30.0) -> None:
        """Wait until `condition` holds.

        Raises:
            AssertionError: It did not; the message says what the page shows.
        """
        assert wait_until(lambda: bool(condition(self)), timeout_seconds=timeout_seconds), self.text("body")

    def complaints(self) -> list[str]:
        """Return what the console said since the last call, warnings and errors."""
        return [
            entry["message"] for entry in self._driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]

    def take_picture(self, name: str) -> None:
        """Keep what is shown as NAME.png."""
        self._driver.save_screenshot(str(self.pictures / f"{name}.png"))
