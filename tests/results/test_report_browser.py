"""Reports in a real browser: opened from the disk, looked through, filtered, searched, and drawn."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from result_examples import diagnostics, self_influence

from lightning_influence.results.attributions import Attributions

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
support = pytest.importorskip("selenium.webdriver.support.ui")
Select, WebDriverWait = support.Select, support.WebDriverWait

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="no Chromium with chromedriver: apt install chromium chromium-driver"
    ),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"
)
Q, N = 1000, 400


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def attributions(queries):
    generator = torch.Generator().manual_seed(0)
    return Attributions(
        scores=torch.randn(queries, N, generator=generator),
        train_indices=torch.arange(N),
        query_indices=torch.arange(queries),
        diagnostics=diagnostics(residuals=torch.full((queries,), 0.05)),
    )


def dataset(count):
    return [(torch.rand(8, 8, generator=torch.Generator().manual_seed(i)), i % 4) for i in range(count)]


def load(browser, path, fragment=""):
    browser.get("about:blank")
    browser.get(path.as_uri() + fragment)
    WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "nav a.here"))


def visible(browser, selector):
    return [node for node in browser.find_elements(By.CSS_SELECTOR, selector) if node.is_displayed()]


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def count(browser):
    (node,) = visible(browser, ".count")
    return node.text


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A page of a thousand queries."""
    return attributions(Q).report(
        tmp_path_factory.mktemp("report") / "large.html",
        dataset(N),
        dataset(Q),
        predictions=[(i % 4 if i % 10 else (i + 1) % 4) for i in range(Q)],
        class_names=["cat", "dog", "bird", "fish"],
    )


def test_rows_are_drawn_as_one_scrolls(browser, large):
    load(browser, large)
    assert browser.title == "What the model learned this from"
    assert count(browser) == "1,000 of 1,000 queries"
    drawn = len(visible(browser, ".query"))
    assert 0 < drawn < 100
    for _ in range(3):
        browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
        WebDriverWait(browser, 10).until(
            lambda b, before=drawn: len(b.find_elements(By.CSS_SELECTOR, ".query")) > before
        )
        drawn = len(browser.find_elements(By.CSS_SELECTOR, ".query"))
    first = visible(browser, ".query")[0]
    best = attributions(Q).top(5).indices[0].tolist()
    shown = [tile.get_attribute("data-train") for tile in first.find_elements(By.CSS_SELECTOR, ".top .tile")]
    assert shown == [f"train-{index}" for index in best]
    picture = first.find_element(By.CSS_SELECTOR, ".asked img")
    assert browser.execute_script("return arguments[0].naturalWidth", picture) == 8
    assert not complaints(browser)


def test_queries_are_filtered_and_searched(browser, large):
    load(browser, large)

    def choose(name, value):
        Select(browser.find_element(By.NAME, name)).select_by_visible_text(value)

    choose("queryClass", "bird")
    assert count(browser) == "250 of 1,000 queries"
    labels = {node.text for node in visible(browser, ".asked .chip[title=label]")}
    assert labels == {"bird"}
    browser.find_element(By.NAME, "wrong").click()
    assert count(browser) == "50 of 1,000 queries"
    assert all("bad" in node.get_attribute("class") for node in visible(browser, ".asked .chip:nth-child(3)"))
    choose("sign", "hurt most")
    assert not visible(browser, ".end.top")
    assert visible(browser, ".end.bottom")
    choose("trainClass", "other than the query's")
    assert visible(browser, ".tile")
    assert all("bird" not in node.text for node in visible(browser, ".tile"))
    choose("trainClass", "all")
    choose("queryClass", "all")
    browser.find_element(By.NAME, "wrong").click()
    choose("sign", "both")
    box = browser.find_element(By.NAME, "search")
    box.send_keys("query 77")
    assert count(browser) == "11 of 1,000 queries"
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("no such thing")
    assert count(browser) == "0 of 1,000 queries"
    assert not complaints(browser)


def test_links_lead_to_queries_and_examples(browser, large):
    load(browser, large, "#query-917")
    assert [node.get_attribute("data-query") for node in visible(browser, ".query")] == ["query-917"]
    (banner,) = visible(browser, ".banner")
    assert "Only query 917 is shown" in banner.text
    tile = visible(browser, ".tile .index")[0]
    name = tile.get_attribute("href").partition("#")[2]
    tile.click()
    WebDriverWait(browser, 10).until(lambda b: visible(b, "dialog"))
    (dialog,) = visible(browser, "dialog")
    assert name.replace("train-", "training example ") in dialog.text
    assert "query 917" in dialog.text
    dialog.find_element(By.CSS_SELECTOR, ".close").click()
    assert not visible(browser, "dialog")
    visible(browser, ".banner a")[0].click()
    WebDriverWait(browser, 10).until(lambda b: len(visible(b, ".query")) > 1)
    load(browser, large, "#train-3")
    assert "training example 3" in visible(browser, "dialog")[0].text
    load(browser, large, "#%E0%A4%A")
    assert len(visible(browser, ".query")) > 1, "a fragment that is nonsense shows the first part"
    assert not complaints(browser)


def test_every_part_is_drawn_and_coloured(browser, large, tmp_path):
    load(browser, large)
    pixels = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")).astype(int)
    red, blue = pixels[..., 0], pixels[..., 2]
    assert int(((blue - red > 120) & (blue > 200)).sum()) > 200, "no blue bars of proponents"
    assert int(((red - blue > 150) & (red > 200)).sum()) > 200, "no orange bars of opponents"
    for tab in browser.find_elements(By.CSS_SELECTOR, "nav a"):
        tab.click()
        assert len(visible(browser, ".part")) == 1
    assert len(visible(browser, ".chart")) == 3
    assert visible(browser, "rect.plus")
    browser.get_screenshot_as_file(str(tmp_path / "charts.png"))
    assert not complaints(browser)


def test_ten_queries_of_texts_rows_and_signals(browser, tmp_path):
    shown = [f"sentence number {i} of a corpus" for i in range(N)]
    path = attributions(10).report(
        tmp_path / "small.html",
        shown,
        {i: torch.rand(2, 300) for i in range(10)},
        k=3,
    )
    load(browser, path)
    assert count(browser) == "10 of 10 queries"
    assert visible(browser, ".tile .text")[0].text.startswith("sentence number")
    assert visible(browser, ".asked svg path")
    browser.find_element(By.NAME, "search").send_keys("NUMBER 3")
    assert count(browser) != "10 of 10 queries"
    assert visible(browser, ".tile.hit")
    assert not complaints(browser)


def test_measured_targets_are_no_classes(browser, tmp_path):
    rows = [(torch.randn(3), index / 7) for index in range(N)]
    load(browser, attributions(5).report(tmp_path / "measured.html", rows, rows))
    assert not visible(browser, "select[name=queryClass], select[name=trainClass], .differs")
    assert visible(browser, "select[name=sign]")
    (tile, *_) = visible(browser, ".tile .chip")
    assert float(tile.text) == pytest.approx(float(attributions(5).top(1).indices[0]) / 7, rel=1e-3)
    load(browser, self_influence().report(tmp_path / "ranked.html", rows))
    cell = visible(browser, ".ranking .row td")[0]
    assert cell.size["height"] < 40, "numbers are not broken into characters"


def test_a_ranking_is_sorted_and_searched(browser, tmp_path):
    rows = [({"age": i, "city": "Bern"}, "yes" if i % 2 else "no") for i in range(100)]
    load(browser, self_influence().report(tmp_path / "self.html", rows))
    order = [node.get_attribute("data-train") for node in visible(browser, "tbody tr[data-train]")]
    assert order == [f"train-{index}" for index in self_influence().top(8).indices[0].tolist()]
    head = visible(browser, "th button")[0]
    head.click()
    head.click()
    assert [node.get_attribute("data-train") for node in visible(browser, "tbody tr[data-train]")] == order[
        ::-1
    ]
    Select(browser.find_element(By.NAME, "trainClass")).select_by_visible_text("yes")
    assert len(visible(browser, "tbody tr[data-train]")) == 4
    assert not complaints(browser)


def test_what_the_data_say_is_shown_and_never_run(browser, tmp_path):
    run = "document.title='run'"
    nasty = f'</script><script>{run}</script><img src=x onerror="{run}">\'\u2028\0'
    data = [(nasty, nasty)] * 100
    path = self_influence(diagnostics=diagnostics(warnings=[nasty])).report(
        tmp_path / "nasty.html", data, title=f"safe {nasty}"
    )
    load(browser, path)
    assert browser.title.startswith("safe </script>")
    assert "document.title='run'" in visible(browser, "td .text")[0].text
    assert not browser.find_elements(By.CSS_SELECTOR, "img")
    load(browser, path, "#certificate")
    assert any("</script>" in node.text for node in visible(browser, ".sentences li"))
    assert not complaints(browser)


def test_the_page_asks_for_nothing_elsewhere(browser, large):
    load(browser, large)
    seen = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(name.startswith("data:") for name in seen)
    inject = (
        "const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        "document.body.append(script); return window.ran === true"
    )
    assert browser.execute_script(inject) is False, "the policy of the page lets other scripts run"
    assert any("Content Security Policy" in message for message in complaints(browser))
