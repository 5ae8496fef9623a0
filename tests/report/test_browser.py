"""The page in a real Chromium: no message on its console, no request, not wider than a phone, and dark where asked."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.report.sources import low_rank, source, stack

from adapterkit.report import Report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")

# Puts the page in a frame of this width, and writes what is seen there to the outer document.
PROBE = """<!DOCTYPE html><title>probe</title>
<iframe id=f style="border:0;width:{width}px;height:800px" srcdoc="{page}"></iframe><script id=s>
f.onload = () => {{
  const d = f.contentDocument, w = f.contentWindow, r = d.documentElement
  const wide = [...d.querySelectorAll('body *')].filter(e => !e.closest('.box, svg')
    && e.getBoundingClientRect().right > f.clientWidth + 1).map(e => e.tagName + '.' + e.className)
  document.title = JSON.stringify({{
    width: r.scrollWidth, wide, background: w.getComputedStyle(d.body).backgroundColor,
    requests: w.performance.getEntriesByType('resource').map(e => e.name),
    drawn: [...d.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width > 50),
    ink: [...d.querySelectorAll('svg text')].map(e => w.getComputedStyle(e).fill)[0],
    cells: d.querySelectorAll('.heat td').length, scripts: d.scripts.length,
  }})
}}
</script>"""


def report(name: str = "first") -> Report:
    a = stack(3, ("attention.self.query_of_a_long_name", "mlp.up"))
    b = {**stack(2, seed=9), "a.path.without.any.number.that.is.longer.than.a.phone.is.wide": low_rank(5, 4, 2)}
    labels = ("x" * 90, "y")
    return Report.of(
        [
            source(name, a, heads=("classifier",), labels=labels),
            source("second", a),
            source("third", b),
        ]
    )


def look(page: str, folder: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What a browser window of this width shows of the page."""
    file = folder / "probe.html"
    file.write_text(PROBE.format(width=width, page=html.escape(page)), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    title = re.search(r"<title>(.*?)</title>", run.stdout, re.DOTALL)
    assert title is not None
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    found["console"] = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return found


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)])
def test_the_page_fits_its_window_and_draws_everything(tmp_path: Path, width: int, dark: bool) -> None:
    seen = look(report().html, tmp_path, width, dark=dark)
    assert seen["console"] == []
    assert seen["requests"] == []
    assert seen["width"] <= width
    assert seen["wide"] == []
    assert len(seen["drawn"]) == 3 * 2 + 1
    assert all(seen["drawn"])
    brightness = [sum(map(int, re.findall(r"\d+", seen[part])[:3])) for part in ("background", "ink")]
    assert (brightness[0] < brightness[1]) == dark
