"""Collects what a finished experiment came to: figures and plots of all its iterations, as files to keep.

Run from the repository root: `python -m tests.benchmarks.boosting HOME FOLDER`.
"""

import base64
import os
import shutil
import sys
from pathlib import Path

import dagster as dg
import polars as pl


def collect(home: Path, folder: Path) -> None:
    os.environ["SYNPO_HOME"] = str(home.absolute())
    from definitions import build
    from resources.settings.files import home_settings
    from synpo_assets.graph.history import newest
    from synpo_assets.reports.boosting_report import iterations_of, read_iteration
    from synpo_assets.reports.plots import draw_plots
    from synpo_assets.reports.rows import report_rows

    services = build(home_settings(home.absolute()), home.absolute())[1]
    folder.mkdir(parents=True, exist_ok=True)
    with dg.DagsterInstance.from_config(str(home.absolute())) as instance:
        keys, _ = iterations_of(instance, services)
        iterations = [read_iteration(instance, services, key) for key in keys]
        pictures = {plot.name: plot.data_uri for plot in draw_plots(iterations)}
        for key in keys:
            shown = newest(instance, "prompt_diversity", key).asset_materialization.metadata["similarities"].value
            pictures[f"similarities_{key}"] = shown.rpartition("(")[2].removesuffix(")")
    rows = [(row.section, row.label, *row.cells) for row in report_rows(iterations)]
    pl.DataFrame(rows, schema=["section", "figure", *keys], orient="row").write_csv(folder / "figures.csv")
    for name, data_uri in pictures.items():
        (folder / f"{name}.svg").write_bytes(base64.b64decode(data_uri.partition(",")[2]))
    for key in keys:
        texts = ["prompt", "answer", "initial_response", "candidate_response", "judge_over_initial"]
        answers = services.tables.read("evaluation", key).select(texts).head(20)
        answers.write_csv(folder / f"held_out_answers_{key}.csv")
    shutil.copy(home / "reports" / "boosting_report.html", folder)


if __name__ == "__main__":
    collect(Path(sys.argv[1]), Path(sys.argv[2]))
