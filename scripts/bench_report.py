"""Measures the report: its size, its making beside `explain` of the same photos, and how fast a browser answers.

    python scripts/bench_report.py MODEL PHOTOS [--limit 50] [--rounds 3]

Ratios are of medians of runs taken in turn, in one process; processor time leaves out what else the machine does. With
Playwright and Chromium installed the page is opened and patches are asked for in the explorer.
"""

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vision_attn.look import explain_photos
from vision_attn.look.asking import find_photos
from vision_attn.models.factory import open_model
from vision_attn.report import report_photos


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos")
    parser.add_argument("--limit", type=int, default=50, help="photos (50)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (3)")
    options = parser.parse_args()
    model = open_model(options.model)
    photos = list(find_photos([options.photos]))[: options.limit]
    seconds: dict[str, list[float]] = {"explain": [], "report": [], "report, 3 explored": []}
    worked: dict[str, list[float]] = {name: [] for name in seconds}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name, times in seconds.items():
                out = Path(folder) / f"{name}-{number}"
                gc.collect()
                start, busy = time.perf_counter(), time.process_time()
                if name == "explain":
                    explain_photos(model, photos, out, progress=False)
                else:
                    explored = 3 if "explored" in name else 0
                    page = report_photos(
                        model, photos, out.with_suffix(".html"), explored=explored, progress=False, run=None
                    )
                    sizes[name] = page.path.stat().st_size
                times.append(time.perf_counter() - start)
                worked[name].append(time.process_time() - busy)
        table = Table(title=f"{len(photos)} photos, median of {options.rounds}")
        for head in ("", "s", "of explain", "processor s", "of explain", "MB"):
            table.add_column(head, justify="right" if head else "left")
        base, work = (statistics.median(found["explain"]) for found in (seconds, worked))
        for name, times in seconds.items():
            median = statistics.median(times)
            size = f"{sizes[name] / 1e6:.1f}" if name in sizes else ""
            busy = statistics.median(worked[name])
            table.add_row(name, f"{median:.1f}", f"{median / base:.2f}", f"{busy:.1f}", f"{busy / work:.2f}", size)
        console = Console()
        console.print(table)
        extra = (sizes["report, 3 explored"] - sizes["report"]) / min(3, len(photos)) / 1e6
        console.print(f"all layers of one photo, its gates and class maps: {extra:.2f} MB more than its last layer")
        _in_a_browser(Path(folder) / f"report, 3 explored-{options.rounds - 1}.html", console)


def _in_a_browser(page: Path, console: Console) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return console.print("Playwright or Chromium is not installed: the browser was not measured")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        opened = []
        for _ in range(5):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            start = time.perf_counter()
            tab.goto(page.resolve().as_uri())
            tab.wait_for_function("document.documentElement.dataset.ready === 'true'")
            tab.wait_for_function("document.querySelector('.card canvas').width > 1")
            opened.append(time.perf_counter() - start)
            tab.close()
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(page.resolve().as_uri())
        tab.click("#tab-explorer")
        tab.wait_for_function("explorer.layers.length > 1 && explorer.shown")
        asked = tab.evaluate(
            """async () => {
                 const times = [];
                 for (let i = 0; i < 40; i++) {
                   const start = performance.now();
                   await ask({ u: ((i * 7) % 16 + 0.5) / 16, v: ((i * 5) % 16 + 0.5) / 16 });
                   times.push(performance.now() - start);
                 }
                 return times;
               }"""
        )
        browser.close()
    console.print(f"opened in {statistics.median(opened):.2f} s (median of 5, largest {max(opened):.2f})")
    console.print(f"a patch answered in {statistics.median(asked):.0f} ms (median of 40, largest {max(asked):.0f})")
    return None


if __name__ == "__main__":
    main()
