"""Makes the picture of README from a home: `python -m tests.pictures.make HOME`. Needs playwright and Chromium."""

import sys
from pathlib import Path
from typing import get_args

from synpo_assets.graph.stage import Group
from tests.ui import browser_page, running_ui

FOLDER = Path(__file__).parent


def main(home: Path) -> None:
    with running_ui(home) as ui, browser_page(ui.url, width=2000, height=1100) as page:
        page.get_by_role("link", name="Lineage").click()
        for group in get_args(Group):
            page.locator(f"text={group}").first.wait_for()
        page.wait_for_timeout(4000)
        # The graph without the lists and buttons around it.
        page.screenshot(path=FOLDER / "lineage.png", clip={"x": 560, "y": 425, "width": 1420, "height": 275})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
