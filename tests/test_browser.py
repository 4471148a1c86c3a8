"""The UI in a real browser, on a home with two finished nano iterations. `pytest -n 0 -m slow`.

Screenshots are kept as test artefacts in the folder that SYNPO_SCREENSHOTS names, else in pytest's temporary folder.
"""

import os
import shutil
from pathlib import Path
from typing import get_args

import dagster as dg
import polars as pl
import pytest

from resources.storage.tables import table_metadata
from synpo_assets.graph.stage import Group, stages_in
from synpo_assets.stages import improver, responses
from tests.ui import CHROMIUM, browser_page, running_ui, wait_for

pytestmark = pytest.mark.slow
HOSTILE = "<script>document.title = 'owned'; alert(1)</script> | **bold** | \x1b[31mred\x1b[0m\n| a | b |\n|---|---|"


@pytest.fixture(scope="module")
def ui(nano_run, tmp_path_factory):
    """A copy of the home with two iterations, and its UI."""
    assert nano_run.result.returncode == 0, nano_run.result.stderr[-3000:]
    home = tmp_path_factory.mktemp("browser") / "home"
    shutil.copytree(nano_run.home, home)
    with running_ui(home) as running:
        yield running


@pytest.fixture(scope="module")
def page(ui):
    pytest.importorskip("playwright.sync_api", reason="pip install playwright to test the UI in a browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with browser_page(ui.url) as page:
        yield page


@pytest.fixture
def screenshot(page, request, tmp_path_factory):
    """Keeps a picture of the page as it is when the test ends, failed or not."""
    yield
    folder = Path(os.environ.get("SYNPO_SCREENSHOTS") or tmp_path_factory.getbasetemp() / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{request.node.name}.png")


def open_partition(page, ui, asset, partition):
    page.goto(f"{ui.url}/assets/{asset}?view=partitions&partition={partition}")
    page.get_by_text("Latest materialization").wait_for()


def row(page, label):
    """The value cell of a metadata entry."""
    return page.locator("tr", has=page.get_by_text(label, exact=True)).locator("td").nth(1)


def test_lineage_opens_on_the_phases_from_left_to_right_and_each_opens_into_its_stages(page, ui, screenshot):
    page.get_by_role("link", name="Lineage").click()
    # The list beside the graph names the groups first.
    boxes = {group: page.get_by_text(group, exact=True).last for group in get_args(Group)}
    for box in boxes.values():
        box.wait_for()
    wait_for(lambda: all(box.bounding_box()["x"] > 540 for box in boxes.values()), 30)
    places = [box.bounding_box()["x"] for box in boxes.values()]
    assert places == sorted(places)
    boxes["responses"].click()
    for stage in stages_in([improver, responses]):
        page.get_by_text(stage.name, exact=True).last.wait_for()


def test_a_partition_shows_sample_rows_links_and_statistics(page, ui, screenshot):
    open_partition(page, ui, "preference_pairs", "0002")
    pair_id = pl.read_parquet(ui.home / "tables" / "preference_pairs" / "0002.parquet")["pair_id"][0]
    row(page, "sample").get_by_text(f"synpo trace {pair_id}").wait_for()
    row(page, "sample").get_by_text(pair_id, exact=True).wait_for()
    row(page, "statistics").get_by_text("mean").first.wait_for()
    row(page, "made_from").get_by_role("link", name="refined_responses[0002]").wait_for()


def test_links_lead_from_data_to_the_checkpoint_that_made_it(page, ui, screenshot):
    open_partition(page, ui, "base_responses", "0002")
    sha = ui.metadata("model_checkpoint", "0001")["sha"]
    assert row(page, "checkpoint_sha").inner_text() == sha
    page.goto(ui.url + row(page, "checkpoint_page").get_by_role("link").first.get_attribute("href"))
    page.get_by_text(sha).first.wait_for()
    open_partition(page, ui, "base_responses", "0002")
    row(page, "checkpoint_run").get_by_role("link").click()
    page.wait_for_url("**/runs/**")


def test_a_checkpoint_lists_every_partition_of_pairs_it_was_trained_on(page, ui, screenshot):
    open_partition(page, ui, "model_checkpoint", "0002")
    row(page, "trained_on").get_by_role("link", name="preference_pairs[0001]").click()
    page.wait_for_url("**/assets/preference_pairs?view=partitions&partition=0001")


def test_checks_show_their_figures_by_partition(page, ui, screenshot):
    page.goto(f"{ui.url}/assets/preference_pairs?view=checks")
    page.get_by_text("blocking", exact=True).wait_for()
    page.get_by_text("least_allowed").first.wait_for()
    page.get_by_role("tab", name="Partitions").last.click()
    page.get_by_text("0002").first.wait_for()


def test_the_report_is_made_of_each_iteration_and_shows_headlines_plots_and_a_link_to_its_page(page, ui, screenshot):
    for asset in ("boosting_report", "evaluation", "promotion"):
        open_partition(page, ui, asset, "0001")
        row(page, "boosting").get_by_role("cell", name="0001").wait_for()
    page.goto(f"{ui.url}/assets/boosting_report?view=events")
    row(page, "table").get_by_text("win rate").first.wait_for()
    row(page, "plots").get_by_text("Show Markdown").click()
    image = page.locator('img[src^="data:image/svg+xml;base64,"]').first
    image.wait_for()
    assert wait_for(lambda: image.evaluate("picture => picture.naturalWidth"), 20) >= 400
    page.goto(f"{ui.url}/assets/boosting_report?view=events")
    page.goto(ui.url + row(page, "report").get_by_role("link").first.get_attribute("href"))
    page.get_by_role("heading", name="Which experiment").wait_for()


def test_metrics_come_first_with_their_values_on_the_page(page, ui, screenshot):
    open_partition(page, ui, "evaluation", "0002")
    table = row(page, "metrics")
    for text in ("value", "low", "high", "split"):
        assert table.get_by_text(text, exact=True).first.bounding_box()["x"] < 1500
    table.get_by_text("held_out_prompts").first.wait_for()


def test_what_is_not_configured_is_off_and_says_what_turns_it_on(page, ui, screenshot):
    page.goto(f"{ui.url}/assets/benchmark_scores")
    page.get_by_text("Name lm-eval's tasks in").wait_for()
    page.get_by_text("Never materialized").wait_for()


def test_jobs_stand_in_the_order_of_use(page, ui, screenshot):
    page.goto(f"{ui.url}/jobs")
    jobs = [page.get_by_text(name, exact=True).last for name in ("foundation", "iteration", "synpo")]
    for job in jobs:
        job.wait_for()
    places = [job.bounding_box()["y"] for job in jobs]
    assert places == sorted(places)


def test_an_asset_shows_the_settings_that_it_was_made_with(page, ui, screenshot):
    open_partition(page, ui, "promotion", "0002")
    row(page, "settings").get_by_text("random_seed").wait_for()


def test_generated_text_with_scripts_and_markup_is_shown_as_text(page, ui, screenshot):
    frame = pl.DataFrame({"prompt": [HOSTILE]})
    with dg.DagsterInstance.from_config(str(ui.home)) as instance:
        instance.report_runless_asset_event(
            dg.AssetMaterialization("synthetic_prompts", partition="0002", metadata={"sample": table_metadata(frame)})
        )
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    open_partition(page, ui, "synthetic_prompts", "0002")
    row(page, "sample").get_by_text("<script>document.title").wait_for()
    row(page, "sample").get_by_text("| **bold** |").wait_for()
    row(page, "sample").get_by_text("⟨U+001B⟩[31mred").wait_for()
    assert dialogs == []
    assert page.title() != "owned"


def test_iteration_2_is_made_again_from_its_job_and_succeeds(page, ui, screenshot):
    before = {run["id"] for run in ui.runs()}
    page.goto(f"{ui.url}/locations/__repository__@{ui.location()}/jobs/iteration")
    page.get_by_role("button", name="Materialize all").click()
    page.get_by_text("Select a partition or create one").click()
    page.get_by_placeholder("Filter partitions").fill("0002")
    page.locator("label", has_text="0002").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Launch").click()
    made = wait_for(lambda: [run for run in ui.runs() if run["id"] not in before and run["partition"] == "0002"], 120)
    assert ui.wait_for_run(made[0]["id"], 600) == "SUCCESS"
    assert {"path": ["prompt_generator"]} not in made[0]["assetSelection"], "made again what all iterations share"
    page.goto(f"{ui.url}/runs/{made[0]['id']}")
    page.get_by_text("Success").first.wait_for()
