"""A headless Chromium for the pages, and a model that gives them something to show."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from groupvit_fast.model import create_model
from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage", "force-device-scale-factor=1",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    here, missing = Path(__file__).parent, not (CHROMIUM and DRIVER)
    for item in items:
        if here in item.path.parents and missing:
            item.add_marker(pytest.mark.skip(reason="no chromium with chromedriver is installed"))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")  # a proxy of the machine must not see the driver
        patch.setenv("no_proxy", "localhost,127.0.0.1")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


class Browser:
    """What the tests do in a page; `problems` are the errors and refused loads that it logged."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get_log("browser")
        self.driver.get(url)

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def script(self, text: str, *values):
        return self.driver.execute_script(text, *values)

    def wait(self, condition, what: str, seconds: float = 20):
        """The first true value of `condition()`."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(
            self.driver, seconds, 0.02, ignored_exceptions=[StaleElementReferenceException]
        )
        return waiting.until(lambda _: condition(), f"{what} did not come about")

    def point(self, x: float, y: float) -> None:
        """Move the mouse to a place of the picture, both 0..1."""
        from selenium.webdriver import ActionChains

        canvas = self.find("canvas")
        size = canvas.size
        ActionChains(self.driver).move_to_element_with_offset(
            canvas, round((x - 0.5) * size["width"]), round((y - 0.5) * size["height"])
        ).perform()

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def pixels(self) -> str:
        """The picture as it is now, as a data URL, after what is pending was drawn."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return self.script("return document.querySelector('canvas').toDataURL()")

    def colour_at(self, x: float, y: float) -> list[int]:
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return self.script(
            "const c = document.querySelector('canvas'), [x, y] = arguments;"
            "const pixel = c.getContext('2d').getImageData(x * c.width, y * c.height, 1, 1);"
            "return [...pixel.data].slice(0, 3)",
            x, y,
        )  # fmt: skip


@pytest.fixture
def browser(chromium) -> Iterator[Browser]:
    yield Browser(chromium)
    chromium.get("about:blank")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Random weights with two grouping stages; names and groups are arbitrary but differ."""
    folder = tmp_path_factory.mktemp("weights") / "two-stages"
    config = ModelConfig(
        image=ImageConfig(
            image_size=64, patch_size=8, width=32, heads=4, depths=(1, 1, 1), group_tokens=(12, 5),
            output_groups=(12, 5), assign_scale=40.0,
        ),
        text=TextConfig(context_length=16, width=24, layers=1, heads=2),
        embed_dim=20,
        projector_hidden=40,
    )  # fmt: skip
    create_model(config, seed=2).save_pretrained(folder)
    return folder
