"""The page in a real browser: wide and on a phone, light and dark, without an error, and its script works."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasternet.records import append_records
from fasternet.report import create_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0"),
)
RESULTS = Path(__file__).parents[2] / "results"
# Added to a copy of the page, which has no policy against it: sorts the first table by its first column of numbers.
PROBE = """<script>
const table = document.querySelector("table");
const button = table.querySelector("th.number button");
const column = button.closest("th").cellIndex;
button.click();
parent.postMessage(JSON.stringify({
  width: innerWidth,
  needed: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor,
  sorted: [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.sort ?? ""),
  link: document.getElementById("download-records").href,
  tables: document.querySelectorAll("table").length,
}), "*");
</script></body>"""
# A window is at least 500 pixels wide, a frame is not.
FRAME = """<meta name="color-scheme" content="light dark">
<script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="probe.html" style="border: 0; width: %dpx; height: 1000px"></iframe>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on PATH"),
]


@pytest.fixture(scope="module", params=["made up", "results"])
def page(request: pytest.FixtureRequest, example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of every section, and that of the records of this repository."""
    folder = tmp_path_factory.mktemp("browser")
    if request.param == "results":
        if not list(RESULTS.rglob("*.jsonl")):
            pytest.skip("there are no records in results/")
        return create_report([RESULTS], folder / "report.html")
    networks = [*example.make_networks(), *example.make_networks(32), *example.make_engines()]
    others = [
        *example.make_operators(),
        *example.make_forms(),
        *example.make_optimize(),
        *example.make_training_speed(),
    ]
    append_records(folder / "speeds.jsonl", [*networks, *others, *example.make_faults()])
    return create_report([folder / "speeds.jsonl", example.write_run(folder / "run")], folder / "report.html")


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Open a page; return what the browser prints, and what it complains about."""

    def open_page(path: Path, width: int, *flags: str, dark: bool) -> tuple[str, str]:
        assert BROWSER
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200", scheme]
        result = subprocess.run(
            [*command, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return result.stdout, result.stderr

    return open_page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1440, 375])
def test_page_opens_without_error_and_fits(
    page: Path, browse: Callable[..., tuple[str, str]], tmp_path: Path, width: int, *, dark: bool
) -> None:
    picture = tmp_path / "page.png"
    _, complaints = browse(page, width, f"--screenshot={picture}", dark=dark)
    assert picture.stat().st_size > 10_000
    assert "CONSOLE" not in complaints
    assert "Content Security Policy" not in complaints

    probe = tmp_path / "probe.html"
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    probe.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % width, encoding="utf-8")
    printed, complaints = browse(frame, 1500, "--virtual-time-budget=5000", "--dump-dom", dark=dark)
    assert "CONSOLE" not in complaints
    found: dict[str, Any] = json.loads(unescape(re.findall("<title>(.*?)</title>", printed)[0]))
    assert found["width"] == width
    assert found["needed"] <= width
    assert found["dark"] == dark
    assert (sum(map(int, re.findall(r"\d+", found["paper"])[:3])) < 3 * 128) == dark
    assert found["link"].startswith("blob:")
    numbers = [float(value) for value in found["sorted"] if value]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 9
    twin = page.with_suffix(".md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| [-:| ]+ \|$", twin, re.MULTILINE)) == found["tables"]
