"""Makes the picture of README from a home: `python -m tests.pictures.make HOME`. Needs playwright and Chromium."""

import shutil
import sys
from pathlib import Path
from typing import get_args

from synpo_assets.graph.stage import Group
from tests.ui import running_ui

FOLDER = Path(__file__).parent


def main(home: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with running_ui(home) as ui, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 2000, "height": 1100})
        page.goto(ui.url)
        page.get_by_role("link", name="Lineage").click()
        for group in get_args(Group):
            page.locator(f"text={group}").first.wait_for()
        page.wait_for_timeout(4000)
        # The graph without the lists and buttons around it.
        page.screenshot(path=FOLDER / "lineage.png", clip={"x": 560, "y": 425, "width": 1420, "height": 275})
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
