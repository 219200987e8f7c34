"""The page in a real browser, headless: a phone and a desk, light and dark."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from plan_world import TWO_SITES, Pretended, plan_of

from sim.planner.answer import answer
from sim.planner.page import page
from sim.planner.search import search
from sim.units import format_duration, format_energy, format_money

pytestmark = pytest.mark.real

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_as_people_see_it(width: int, scheme: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    plan = plan_of(TWO_SITES)
    runner = Pretended(plan)
    content = answer(search(plan, runner), runner)
    best = content["recommended"]
    file = tmp_path / "plan.html"
    file.write_text(page(content), encoding="utf-8")
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        seen = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        seen.on("request", lambda request: asked.append(request.url))
        seen.goto(file.as_uri())
        assert asked == [file.as_uri()]  # it needs no network
        assert seen.inner_text("#time") == format_duration(best["time_s"])
        assert seen.inner_text("#money") == format_money(best["usd"])
        assert seen.inner_text("#energy") == format_energy(best["joules"])
        assert seen.inner_text("#gpus") == f"{best['num_gpus']:,}"
        assert seen.inner_text("#recommendation") == best["words"]
        assert seen.evaluate("document.documentElement.scrollWidth") <= width  # nothing runs off the side
        paper, ink = (seen.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
        bright = [sum(map(int, text[4:-1].split(","))) for text in (paper, ink)]
        assert (bright[0] > bright[1]) == (scheme == "light")
        assert abs(bright[0] - bright[1]) > 400  # of 765: it can be read
        for drawn in seen.locator("svg").all():  # whole, and all of it to be seen without scrolling
            assert drawn.bounding_box()["width"] <= width
            assert drawn.evaluate("svg => svg.getBBox().width <= svg.viewBox.baseVal.width")
        box = seen.locator("svg").first.bounding_box()
        assert box["width"] > 0
        assert box["height"] > 150
        browser.close()
