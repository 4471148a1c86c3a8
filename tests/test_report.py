"""The boosting report on real Dagster instances, over small stand-in iterations and over the nano run."""

import base64
import io
import re
import shutil
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from resources.common.errors import FinalError
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.storage.tables import ParquetTables
from synpo_assets.graph.partitions import ITERATIONS, partition_key
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.reports.boosting_report import boosting_report, iterations_of, read_iteration
from synpo_assets.reports.rows import report_rows

PLOTS = {"rewards", "margins", "funnel", "held_out"}
NASTY = "<script>alert(1)</script>\x1b[31m\x00\n| a | b |\n|---|---|\n| <b>c</b> | \u202ed |"


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNPO_HOME", str(tmp_path))
    return tmp_path


def stores(home):
    return {
        "tables": ParquetTables(str(home / "tables")),
        "checkpoints": CheckpointStore(str(home / "checkpoints")),
    }


def pairs(iteration, count=5, text="x"):
    """Pairs whose margins are spread evenly around `iteration`."""
    columns = PreferencePairs.to_schema().columns
    strings = [name for name, column in columns.items() if str(column.dtype) == "String"]

    def row(place):
        margin = iteration + place / count
        messages = {side: [{"role": "user", "content": f"{side} {text}"}] for side in ("prompt", "chosen", "rejected")}
        scores = {"chosen_score": margin, "rejected_score": 0.0, "margin": margin, "iteration": iteration}
        return {name: f"{name}-{iteration}-{place}" for name in strings} | messages | scores

    return pl.DataFrame([row(place) for place in range(count)], schema=PreferencePairs.empty().schema)


def recorded(iteration, kept=5):
    """What the assets of an iteration record about themselves, in short."""
    generated = {"generated_tokens": 100, "checkpoint_sha": "0123456789abcdef-and-more"}
    return {
        "keyword_sets": {"dagster/row_count": 40},
        "synthetic_prompts": {
            "dagster/row_count": 12, "keyword_sets_used": 32, "dropped": {"unparsable": 19, "near_duplicate": 1},
            **generated,
        },
        "prompt_diversity": {
            "prompts_compared": 12, "mean_similarity synthetic": 0.1 * iteration, "mean_similarity seed": 0.05,
        },
        "seed_responses": {**generated, "scored_tokens": 7},
        "response_improver": {"tokens": 1000},
        "base_responses": {"dagster/row_count": 12, **generated},
        "initial_responses": {"dagster/row_count": 12, "generated_tokens": 0},
        "refined_responses": {"dagster/row_count": 12, **generated},
        "preference_pairs": {
            "dagster/row_count": kept, "candidates": 10, "dropped": {"margin": 5}, "mean_margin": iteration + 0.4,
            "chosen_to_rejected_length": 1.25, "chosen_cut_share": 0.1, "rejected_cut_share": 0.5,
            "scorer_sha": "feedfacefeedface-and-more", "scored_tokens": 7,
        },
        "model_checkpoint": {"examples": kept * iteration, "tokens": 2000, "training_log": training_log(iteration)},
        "evaluation": {
            "held_out_prompts": 8, "mean_repetition policy": 0.25, "mean_repetition initial": 0.125, "cut_share policy": 0.75,
        "held_out_reward initial": 0.1, "held_out_reward policy": 0.1 + iteration,
            "held_out_reward answer": 3.5, "win_rate_over_initial": 0.5 + iteration / 10, "scored_tokens": 7,
            "generated_tokens": 100, "win_rates": win_rates(iteration),
        },
        "instruction_following": {
            "instructions": 9, "verifiable_rate policy": 0.5, "verifiable_rate initial": 0.375, "verifiable_gain": 0.125,
            "verifiable_gain_low": -0.01, "verifiable_gain_high": 0.25, "constraint_rate policy": 0.6, "generated_tokens": 1,
        },
        "gold_comparison": {"gold_log_likelihood policy": -2.5, "gold_log_likelihood initial": -3.0, "gold_similarity policy": 0.7,
                            "gold_log_likelihood_gain": 0.5, "gold_log_likelihood_gain_low": 0.25,
                            "gold_log_likelihood_gain_high": 0.75},
    }  # fmt: skip


def win_rates(iteration, labels=("independent judge", "scorer (took part in training)")):
    """As they are recorded: a line for each judge and opponent."""
    lines = [
        {"label": label, "opponent": opponent, "wins": 5, "ties": 1, "losses": 2, "no_verdict": place, "prompts": 8,
         "win_rate": 0.5 + iteration / 10 - place / 10, "low": 0.4, "high": 0.9, "length_controlled": 0.55}
        for place, label in enumerate(labels)
        for opponent in ("initial", "previous")
    ]  # fmt: skip
    return dg.MetadataValue.table([dg.TableRecord(line) for line in lines])


def training_log(iteration):
    """As it is recorded: a table whose last line, the trainer's closing entry, holds no rewards."""
    steps = [
        {"step": step, "rewards/chosen": -2.0 + step * iteration / 10, "rewards/rejected": -2.0,
         "rewards/margins": step * iteration / 10}
        for step in range(1, 6)
    ]  # fmt: skip
    closing = {"step": 5, "rewards/chosen": None, "rewards/rejected": None, "rewards/margins": None}
    return dg.MetadataValue.table([dg.TableRecord(line) for line in [*steps, closing]])


def weights(iteration):
    def build(directory: Path):
        (directory / "merged").mkdir()
        (directory / "merged" / "model.safetensors").write_text(f"M_{iteration}")

    return build


def stand_in(name, metadata):
    """An asset of the pipeline that records what it is told to, instead of computing."""

    @dg.asset(name=name, partitions_def=ITERATIONS)
    def asset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata=metadata)

    return asset


def checkpoint_stand_in(iteration, metadata):
    @dg.asset(name="model_checkpoint", partitions_def=ITERATIONS, io_manager_key="checkpoints")
    def asset(
        context: dg.AssetExecutionContext, checkpoints: dg.ResourceParam[CheckpointStore]
    ) -> dg.Output[Checkpoint]:
        made, _ = checkpoints.create(
            context, weights(iteration), parents={}, trained_on={}, settings={}, random_seed=0
        )  # fmt: skip
        return dg.Output(made, metadata={"sha": made.sha, **metadata})

    return asset


def make_iteration(instance, home, iteration, text="x", without=(), **changes):
    """Materializes the stand-ins of an iteration; `changes` are further metadata by asset."""
    key = partition_key(iteration)
    figures = {asset: about | changes.get(asset, {}) for asset, about in recorded(iteration).items()}
    resources = stores(home)
    resources["tables"].write("preference_pairs", key, pairs(iteration, text=text))
    made = checkpoint_stand_in(iteration, figures.pop("model_checkpoint"))
    judged = figures.pop("evaluation")
    assets = [stand_in(name, about) for name, about in figures.items() if name not in without]
    result = dg.materialize([*assets, made], instance=instance, resources=resources, partition_key=key)
    sha = result.output_for_node("model_checkpoint").sha
    after = {"evaluation": judged, "promotion": {"promoted": True} | changes.get("promotion", {})}
    judges = [stand_in(name, {"checkpoint_sha": sha} | about) for name, about in after.items() if name not in without]
    dg.materialize(judges, instance=instance, partition_key=key)
    return sha


def report(instance, home, **options):
    """Materializes the report and returns its metadata, its content version and its page."""
    result = dg.materialize([boosting_report], instance=instance, resources=stores(home), **options)
    made = result.asset_materializations_for_node("boosting_report")[0]
    metadata = {name: entry.value for name, entry in made.metadata.items()}
    return metadata, made.tags["dagster/data_version"], Path(metadata["path"]).read_text()


def test_every_figure_stands_in_its_place(instance, home):
    shas = [
        make_iteration(instance, home, 1),
        make_iteration(instance, home, 2, synthetic_prompts={"dropped": {"unparsable": 20}}),
    ]
    iterations = [read_iteration(instance, stores(home)["tables"], key) for key in ("0001", "0002")]
    cells = {row.label: row.cells for row in report_rows(iterations)}
    assert cells == {
        "keyword sets drawn": ("40", "40"),
        "keyword sets used": ("32", "32"),
        "synthetic prompts": ("12", "12"),
        "base responses (policy)": ("12", "12"),
        "initial responses (rejected side)": ("12", "12"),
        "refined responses (chosen side)": ("12", "12"),
        "candidate pairs": ("10", "10"),
        "pairs kept": ("5", "5"),
        "pairs that M_t was trained on": ("5", "10"),
        "valid prompts per keyword set used": ("37.5%", "37.5%"),
        "pairs kept per candidate": ("50.0%", "50.0%"),
        "synthetic_prompts: near duplicate": ("1", "0"),
        "synthetic_prompts: unparsable": ("19", "20"),
        "preference_pairs: margin": ("5", "5"),
        "prompts compared, of each source": ("12", "12"),
        "mean similarity of synthetic prompts": ("0.100", "0.200"),
        "mean similarity of seed prompts": ("0.050", "0.050"),
        "mean similarity of Self-Instruct prompts by M_0": ("—", "—"),
        "mean margin of scores": ("1.400", "2.400"),
        "chosen length / rejected length": ("1.250", "1.250"),
        "chosen answers cut": ("10.0%", "10.0%"),
        "rejected answers cut": ("50.0%", "50.0%"),
        "reward margin at the last logged training step": ("0.500", "1.000"),
        "prompts": ("8", "8"),
        "mean reward of M_0, by the scorer": ("0.100", "0.100"),
        "mean reward of M_t, by the scorer": ("1.100", "2.100"),
        "mean reward of the gold answers, by the scorer": ("3.500", "3.500"),
        **{
            f"{judge}, over {opponent}: {figure}": cells
            for place, judge in enumerate(("independent judge", "scorer (took part in training)"))
            for opponent in ("M_0", "M_{t-1}")
            for figure, cells in (
                ("win rate, 95 % interval", (f"{6 - place}0.0% (40.0 to 90.0)", f"{7 - place}0.0% (40.0 to 90.0)")),
                ("length-controlled win rate", ("55.0%", "55.0%")),
                ("wins, ties, losses, no verdict", (f"5, 1, 2, {place}",) * 2),
            )
        },
        "repeated 3-grams in M_t's answers": ("25.0%", "25.0%"),
        "repeated 3-grams in M_0's answers": ("12.5%", "12.5%"),
        "answers of M_t cut": ("75.0%", "75.0%"),
        "answers of M_0 cut": ("—", "—"),
        "verifiable instructions": ("9", "9"),
        "instructions followed by M_t": ("50.0%", "50.0%"),
        "instructions followed by M_0": ("37.5%", "37.5%"),
        "instructions followed, M_t less M_0, 95 % interval": ("+12.5 points (-1.0 to +25.0)",) * 2,
        "log-likelihood of gold, M_t less M_0, 95 % interval": ("+0.500 (+0.250 to +0.750)",) * 2,
        "likeness to gold, M_t less M_0, 95 % interval": ("—", "—"),
        "constraints met by M_t": ("60.0%", "60.0%"),
        "constraints met by M_0": ("—", "—"),
        "log-likelihood of gold under M_t, per token": ("-2.500", "-2.500"),
        "log-likelihood of gold under M_0, per token": ("-3.000", "-3.000"),
        "likeness of M_t's answers to gold": ("0.700", "0.700"),
        "likeness of M_0's answers to gold": ("—", "—"),
        "M_t promoted to the next iteration": ("yes", "yes"),
        "M_t": tuple(sha[:16] for sha in shas),
        "policy that answered": ("0123456789abcdef",) * 2,
        "model that wrote the chosen side": ("0123456789abcdef",) * 2,
        "scorer": ("feedfacefeedface",) * 2,
        "tokens generated": ("501", "501"),
        "tokens trained on": ("3,000", "3,000"),
        "tokens scored": ("21", "21"),
        "seconds": cells["seconds"],
    }


def test_what_a_judge_names_has_rows_where_there_is_such_a_judge(instance, home):
    make_iteration(instance, home, 1)
    make_iteration(instance, home, 2, prompt_diversity={"topics synthetic": 21, "intentions seed": 7})
    iterations = [read_iteration(instance, stores(home)["tables"], key) for key in ("0001", "0002")]
    named = {row.label: row.cells for row in report_rows(iterations) if "named by a judge" in row.label}
    assert named == {
        "topics of synthetic prompts, named by a judge": ("—", "21"),
        "intentions of seed prompts, named by a judge": ("—", "7"),
    }


def test_the_ui_shows_table_plots_and_sources(instance, home):
    sha = make_iteration(instance, home, 1)
    metadata, _, page = report(instance, home)
    records = {record.data["figure"]: record.data["0001"] for record in metadata["table"].records}
    assert records["M_t"] == sha[:16]
    assert metadata["iterations"] == "0001"
    assert metadata["notes"] == "none"
    assert "/assets/model_checkpoint?view=partitions&partition=0001" in metadata["made_from"]
    assert metadata["path"] == str(home / "reports" / "boosting_report.html")
    for text in (sha[:16], "37.5%", "independent judge; scorer (took part in training)", "no independent\njudgement"):
        assert text in page


def test_the_plots_are_small_pictures_with_something_on_them(instance, home):
    from PIL import Image

    for iteration in (1, 2):
        make_iteration(instance, home, iteration)
    metadata, _, page = report(instance, home)
    assert metadata.keys() >= PLOTS
    for name in PLOTS:
        encoded = re.fullmatch(r"!\[[^\]]+\]\(data:image/png;base64,(.+)\)", metadata[name]).group(1)
        assert encoded in page
        content = base64.b64decode(encoded)
        picture = Image.open(io.BytesIO(content))
        assert picture.size == (640, 360)
        assert len(picture.convert("RGB").getcolors(100_000)) > 50, f"{name} is blank"
        assert len(content) < 60_000


def test_generated_text_is_shown_as_text(instance, home):
    make_iteration(instance, home, 1, text=NASTY)
    _, _, page = report(instance, home)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;⟨U+001B⟩[31m⟨U+0000⟩" in page
    assert "| a | b |" in page
    assert "&lt;b&gt;c&lt;/b&gt; | ⟨U+202E⟩d" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert not re.search(r"<(link|iframe|object|a)\b|\shref=|\ssrc=\"(?!data:image/png;base64,)|url\(|@import", page)


def test_an_unfinished_iteration_is_named_and_left_out(instance, home):
    make_iteration(instance, home, 1)
    make_iteration(instance, home, 2, without=("evaluation",))
    metadata, _, page = report(instance, home)
    assert metadata["iterations"] == "0001"
    assert metadata["notes"] == "Not finished, and therefore left out: iteration 0002."
    assert metadata["notes"] in page


def test_an_iteration_whose_evaluation_judged_an_older_checkpoint_is_not_finished(instance, home):
    make_iteration(instance, home, 1)
    make_iteration(instance, home, 2, evaluation={"checkpoint_sha": "that of a checkpoint made before"})
    assert iterations_of(instance) == (["0001"], ["0002"])


def test_a_checkpoint_that_was_not_promoted_is_named_with_the_reason(instance, home):
    verdict = "model_checkpoint[0002] was not promoted to policy[0003]: mean_repetition is 0.4, more than 0.2."
    make_iteration(instance, home, 1)
    make_iteration(instance, home, 2, promotion={"promoted": False, "verdict": verdict})
    make_iteration(instance, home, 3, promotion={"checkpoint_sha": "that of a checkpoint made before"})
    metadata, _, page = report(instance, home)
    records = {record.data["figure"]: record.data for record in metadata["table"].records}
    promoted = records["M_t promoted to the next iteration"]
    assert [promoted[key] for key in ("0001", "0002", "0003")] == ["yes", "no", "—"]
    assert metadata["notes"] == verdict
    assert verdict in page


def test_without_a_finished_iteration_it_says_what_to_do(instance, home):
    make_iteration(instance, home, 1, without=("evaluation",))
    with pytest.raises(FinalError, match="materialize an iteration up to its evaluation first"):
        report(instance, home)
    assert not (home / "reports").exists()


@pytest.mark.parametrize("what", ["emptied", "deleted"])
def test_a_checkpoint_that_is_gone_costs_the_report_nothing(instance, home, what):
    shas = [make_iteration(instance, home, iteration) for iteration in (1, 2)]
    before = report(instance, home)
    directory = home / "checkpoints" / "model_checkpoint" / "0001" / shas[0][:16]
    shutil.rmtree(directory)
    if what == "emptied":
        directory.mkdir()
    assert report(instance, home)[1:] == before[1:]


def test_an_iteration_without_recorded_rewards_has_a_dash_and_a_note(instance, home):
    without_rewards = dg.MetadataValue.table([dg.TableRecord({"step": 1, "loss": 0.5})])
    make_iteration(instance, home, 1, model_checkpoint={"training_log": without_rewards})
    note = "model_checkpoint[0001] recorded no rewards: its curves are missing."
    metadata, _, page = report(instance, home)
    assert metadata["notes"] == note
    assert note in page
    assert PLOTS - metadata.keys() == {"rewards"}
    make_iteration(instance, home, 2)
    metadata, _, _ = report(instance, home)
    records = {record.data["figure"]: record.data for record in metadata["table"].records}
    margins = records["reward margin at the last logged training step"]
    assert (margins["0001"], margins["0002"]) == ("—", "1.000")
    assert metadata["notes"] == note
    assert metadata.keys() >= PLOTS


def test_figures_that_were_never_recorded_are_dashes(instance, home):
    make_iteration(instance, home, 1, without=("seed_responses", "synthetic_prompts", "keyword_sets"))
    metadata, _, _ = report(instance, home)
    records = {record.data["figure"]: record.data["0001"] for record in metadata["table"].records}
    assert records["keyword sets drawn"] == records["valid prompts per keyword set used"] == "—"


def test_an_iteration_that_was_judged_before_there_were_several_judges_has_dashes(instance, home):
    old = dg.MetadataValue.null()
    make_iteration(instance, home, 1, evaluation={"win_rates": old})
    make_iteration(instance, home, 2)
    make_iteration(instance, home, 3, evaluation={"win_rates": win_rates(3, ["independent judge", "m (on a server)"])})
    metadata, _, page = report(instance, home)
    records = {record.data["figure"]: record.data for record in metadata["table"].records}
    judged = [records[f"{judge}, over M_0: win rate, 95 % interval"] for judge in
              ("independent judge", "scorer (took part in training)", "m (on a server)")]  # fmt: skip
    assert [[line[key] == "—" for key in ("0001", "0002", "0003")] for line in judged] == [
        [True, False, False], [True, False, True], [True, True, False]
    ]  # fmt: skip
    assert "independent judge; scorer (took part in training); m (on a server)" in page
    assert metadata.keys() >= PLOTS


def test_equal_content_gives_an_equal_version_and_other_content_another(instance, home):
    make_iteration(instance, home, 1)
    _, first, page = report(instance, home)
    assert report(instance, home)[1:] == (first, page)
    # The same again from finished shards: nothing is generated, and it takes another time.
    make_iteration(instance, home, 1, base_responses={"generated_tokens": 0})
    assert report(instance, home)[1] == first
    make_iteration(instance, home, 1, text="y")
    assert report(instance, home)[1] != first


def test_it_runs_in_the_run_of_one_iteration_and_covers_all(instance, home):
    make_iteration(instance, home, 1)
    sha = make_iteration(instance, home, 2, without=("promotion",))
    promoted = stand_in("promotion", {"promoted": True, "checkpoint_sha": sha})
    assets = [promoted, boosting_report]
    result = dg.materialize(assets, instance=instance, resources=stores(home), partition_key="0002")
    made = result.asset_materializations_for_node("boosting_report")[0]
    assert made.metadata["iterations"].value == "0001, 0002"
    records = {record.data["figure"]: record.data for record in made.metadata["table"].value.records}
    assert records["M_t promoted to the next iteration"]["0002"] == "yes"
    assert made.partition is None


def test_it_reports_two_real_iterations(nano_run, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(nano_run.home, home)
    monkeypatch.setenv("SYNPO_HOME", str(home))
    with dg.DagsterInstance.from_config(str(home)) as instance:
        metadata, _, page = report(instance, home)
        shas = [stores(home)["checkpoints"].current("model_checkpoint", key).sha[:16] for key in ("0001", "0002")]
    assert (metadata["iterations"], metadata["notes"]) == ("0001, 0002", "none")
    assert metadata.keys() >= PLOTS
    records = {(record.data["section"], record.data["figure"]): record.data for record in metadata["table"].records}
    for record in records.values():
        assert "—" not in record.values(), record
    kept = [pl.read_parquet(home / "tables" / "preference_pairs" / f"{key}.parquet") for key in ("0001", "0002")]
    trained_on = records["Rows", "pairs that M_t was trained on"]
    assert [trained_on["0001"], trained_on["0002"]] == [str(kept[0].height), str(kept[0].height + kept[1].height)]
    assert [records["Checkpoints", "M_t"][key] for key in ("0001", "0002")] == shas
    assert records["Checkpoints", "policy that answered"]["0002"] == shas[0]
    for pairs_of_iteration in kept:
        assert pairs_of_iteration.sort("margin")["pair_id"][-1] in page
