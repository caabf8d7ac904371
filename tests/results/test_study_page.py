"""The study page in a browser, with clicks and keys, and what its pictures hold."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from small_series import detection_of, read_turned
from test_result_files import VOLUME, detection

from pe_app.ct.volume import Volume, axial_affine
from pe_app.model.detector import DetectionResult
from pe_app.results.pictures import STACK_GRAYS, stack
from pe_app.results.study_page import study_page

HU = np.full((40, 64, 64), -1000, np.int16)
HU[:, 8:56, 8:56] = 100
CHEST = Volume(HU, axial_affine((4.0, 5.0, 5.0)))


def result():
    cells = np.zeros((40, 4, 4), np.uint8)
    cells[10, 1, 1] = 255
    grid = Volume(cells, CHEST.affine @ np.array([[1, 0, 0, 0], [0, 16, 0, 7.5], [0, 0, 16, 7.5], [0, 0, 0, 1.0]]))
    return DetectionResult(detection(candidates=(10, 20)), grid)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    (tmp_path / "page.html").write_text(study_page(result(), CHEST, "a study"), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    return browser


def shows(page, **expected):
    """Wait until the viewer shows a slice, a window, attention or not."""

    def now(driver):
        screen = driver.find_element(By.ID, "screen")
        return {name: screen.get_attribute(f"data-{name}") for name in expected} == {
            name: str(value) for name, value in expected.items()
        }

    WebDriverWait(page, 20).until(now, str(expected))


def pixel(page, canvas="ct", x=0.5, y=0.5):
    return page.execute_script(
        "const c = document.getElementById(arguments[0]);"
        "return [...c.getContext('2d').getImageData(arguments[1] * c.width, arguments[2] * c.height, 1, 1).data]",
        canvas, x, y,
    )  # fmt: skip


def test_keys_wheel_clicks_and_the_curve_scroll_the_stack(page):
    shows(page, slice=10, window="PE")  # the strongest candidate's
    screen = page.find_element(By.ID, "screen")
    screen.send_keys(Keys.ARROW_UP)
    shows(page, slice=11)
    screen.send_keys(Keys.ARROW_LEFT)
    shows(page, slice=10)
    screen.send_keys(Keys.PAGE_UP)
    shows(page, slice=15)
    page.execute_script(
        "document.getElementById('screen').dispatchEvent(new WheelEvent('wheel', {deltaY: 120, cancelable: true}))"
    )
    shows(page, slice=14)
    page.find_elements(By.CSS_SELECTOR, ".candidates button")[1].click()
    shows(page, slice=20)
    page.find_elements(By.CSS_SELECTOR, ".keys img")[0].click()
    shows(page, slice=10)
    curve = page.find_element(By.CSS_SELECTOR, "#curve svg")
    ActionChains(page).move_to_element_with_offset(curve, round(0.16 * curve.size["width"]), 0).click().perform()
    shows(page, slice=26)  # two thirds of the way from the feet
    page.execute_script(
        "const screen = document.getElementById('screen');"
        "const touch = y => ({cancelable: true, bubbles: true, touches: ["
        "new Touch({identifier: 1, clientX: 5, clientY: y, target: screen})]});"
        "screen.dispatchEvent(new TouchEvent('touchstart', touch(200)));"
        "screen.dispatchEvent(new TouchEvent('touchmove', touch(160)))"
    )
    shows(page, slice=31)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize(("key", "name", "low", "high"), [("2", "Lung", -1350, 150), ("3", "Mediastinum", -160, 240)])
def test_a_window_shows_the_hu_as_gray(page, key, name, low, high):
    shows(page, window="PE")
    page.find_element(By.ID, "screen").send_keys(key)
    shows(page, window=name)
    assert pixel(page)[0] == pytest.approx(255 * (100 - low) / (high - low), abs=6)
    page.find_element(By.CSS_SELECTOR, "[data-window=PE]").click()
    shows(page, window="PE")
    assert pixel(page)[0] == pytest.approx(255 * 350 / 700, abs=6)


def test_attention_is_off_until_asked_for_and_lies_where_it_is(page):
    shows(page, slice=10, attention="false")
    assert pixel(page, "tint", 0.3, 0.3)[3] == 0
    page.find_element(By.ID, "screen").send_keys("a")
    shows(page, attention="true")
    alpha = np.array([[pixel(page, "tint", x, y)[3] for x in np.linspace(0.05, 0.95, 9)] for y in (0.3, 0.8)])
    assert alpha[0].argmax() in (2, 3)  # columns 16 to 32 of 64, of which 2 to 62 are shown
    assert alpha[0].max() > 100
    assert not alpha[1].any()


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_window_size(width, 1000)
    page.execute_script("document.querySelector('details').open = true")
    assert page.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.set_window_size(1400, 1000)


def test_the_page_holds_all_of_it_and_loads_nothing():
    text = study_page(result(), CHEST, "a study")
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert "connect-src" not in text
    assert "default-src 'none'" in text


def test_the_stack_gives_hu_back_by_its_grays():
    content = stack(result(), CHEST)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(content["pictures"][0]))))
    grays, hu = zip(*STACK_GRAYS, strict=True)
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
    assert np.interp(middle, grays, hu) == pytest.approx(100, abs=10)
    assert len(content["pictures"]) == len(content["names"]) == 40
    json.dumps(content, allow_nan=False)


def test_slices_are_called_as_the_pacs_calls_them_or_by_their_place_from_the_feet(write_series):
    _, volume = read_turned(write_series)
    text = study_page(detection_of(volume), volume, "a study")
    image = detection_of(volume).detection.image
    assert image.slice_name(3) == f"series 2, image {volume.source.instances[3].number}"
    assert image.slice_name(4) in text  # of a slab
    assert "Patient P1, accession A1, 2026-01-02" in text
    assert detection().image.slice_name(0) == "slice 1 of 40 from the feet"


def test_a_positive_study_without_a_candidate_says_to_distrust_the_number():
    text = study_page(DetectionResult(detection(0.9), None), VOLUME, "a study")
    assert "No place stands out." in text
    assert "distrust the number" in text
    assert "distrust" not in study_page(DetectionResult(detection(0.2), None), VOLUME, "a study")


def test_a_refused_study_can_be_scrolled_without_curve_and_attention():
    text = study_page(DetectionResult(detection(None), None), VOLUME, "a study")
    assert "Not analysed" in text
    assert 'id="curve"' not in text
    assert 'id="screen"' in text
