"""Pictures of a report for its docs, from Chromium through Playwright: three widths, both themes.

vision-attn report runs/clothing/export photos --evaluation judged --method grad_rollout,grad_cam --out report.html
python scripts/screenshots.py report.html docs/images --tabs gallery,explorer,trust
vision-attn report runs/shapes_resnet_cbam/export shapes/val --out blocks.html
python scripts/screenshots.py blocks.html docs/images --tabs blocks,run
"""

import argparse
import shutil
from pathlib import Path
from typing import Literal

from rich.console import Console

SHOTS: tuple[tuple[str, int, int, Literal["light", "dark"]], ...] = (
    ("gallery", 1280, 900, "light"),
    ("gallery", 360, 760, "dark"),
    ("explorer", 1280, 1180, "dark"),
    ("explorer", 768, 1120, "light"),
    ("blocks", 1280, 900, "light"),
    ("trust", 1280, 1000, "light"),
    ("run", 768, 900, "dark"),
)


def main() -> None:
    """Opens the page and takes all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tabs", default="gallery,explorer,blocks,trust,run", help="with commas between them (all)")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        for tab, width, height, theme in [shot for shot in SHOTS if shot[0] in options.tabs.split(",")]:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            page.goto(options.page.resolve().as_uri())
            page.click(f"#tab-{tab}")
            if tab == "explorer":
                page.wait_for_function("explorer.layers.length > 1 && explorer.shown")
                page.evaluate("ask({ u: 0.45, v: 0.45 })")
            page.mouse.move(0, 0)
            page.wait_for_function("unfinished === 0")
            path = options.out / f"report_{tab}_{width}_{theme}.jpg"
            page.screenshot(path=path, type="jpeg", quality=88)
            Console().print(str(path))
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
