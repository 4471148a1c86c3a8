"""The boosting report on real Dagster instances, over small stand-in iterations and over the nano run."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import dagster as dg
import polars as pl
import pytest
from rich.console import Console

from resources.common.errors import FinalError
from resources.judging.judge_choice import INDEPENDENT, TOOK_PART
from resources.settings.files import load_settings
from resources.storage.checkpoint_store import Checkpoint
from resources.training.history import last_quarter
from synpo_assets.cli.summary import _held_out
from synpo_assets.graph.metrics import ENDING_COUNTS, SCHEMA, Metric, MetricRows, Metrics, _rows
from synpo_assets.graph.metrics import recorded as stored
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.graph.services import USED_SETTINGS, Services
from synpo_assets.graph.texts import MISSING
from synpo_assets.method.evaluation import LENGTH_BANDS
from synpo_assets.method.judging import ANOTHER_GOLD, BOTH_ENDED, KINDS
from synpo_assets.reports.boosting_report import boosting_report, iterations_of, read_iteration
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.plots import draw_plots
from synpo_assets.reports.rows import report_rows
from synpo_assets.reports.verdict import cards, verdict
from tests.stand_ins import ITERATIONS, measured, run, services_in
from tests.stand_ins import instance as instance

# Plots that were drawn once are kept for the other tests.
pytestmark = pytest.mark.xdist_group("test_report.py")

TITLES = {
    "win_rates": "Win rate over M_0", "rewards": "Reward margin while training", "margins": "Margins of the pairs kept",
    "held_out": "Held-out reward, by the scorer", "judges": "By each judge",
}  # fmt: skip
PLOTS = TITLES.keys()
NASTY = "<script>alert(1)</script>\x1b[31m\x00\n| a | b |\n|---|---|\n| <b>c</b> | \u202ed |"
WRITER, SCORER = "0123456789abcdef-and-more", "feedfacefeedface-and-more"


@pytest.fixture
def services(tmp_path):
    return services_in(tmp_path)


def pairs(iteration, count=5, text="x"):
    """Pairs whose margins are spread evenly around `iteration`."""
    columns = PreferencePairs.to_schema().columns
    strings = [name for name, column in columns.items() if str(column.dtype) == "String"]

    def row(place):
        margin = iteration + place / count
        messages = {side: [{"role": "user", "content": f"{side} {text}"}] for side in ("prompt", "chosen", "rejected")}
        scores = {"chosen_score": margin, "rejected_score": 0.0, "margin": margin, "iteration": iteration, "rules": ""}
        shas = {"chosen_checkpoint_sha": WRITER, "rejected_checkpoint_sha": WRITER, "scorer_sha": SCORER}
        return {name: f"{name}-{iteration}-{place}" for name in strings} | messages | scores | shas

    return pl.DataFrame([row(place) for place in range(count)], schema=PreferencePairs.empty().schema)


@pytest.fixture(autouse=True)
def plots_drawn_once(monkeypatch, drawn={}):  # noqa: B006
    """Plots take a second each: those of the same iterations are drawn once, whatever was measured in them."""

    def draw(iterations):
        which = tuple((iteration.key, bool(iteration.rewards), iteration.pairs.height) for iteration in iterations)
        if which not in drawn:
            drawn[which] = draw_plots(iterations)
        return drawn[which]

    monkeypatch.setattr("synpo_assets.reports.boosting_report.draw_plots", draw)


def recorded(iteration, kept=5):
    """What the assets of an iteration measure, in short."""
    generated = [Metric("generated_tokens", 100), Metric("cut_share", 0.2, n=5)]

    def sides(metric, candidate, initial=None):
        values = {"candidate": candidate, "initial": initial}
        return [Metric(metric, value, of=side) for side, value in values.items() if value is not None]

    def gain(metric, value, low, high):
        return Metric(metric, value, of="candidate", over="initial", low=low, high=high, n=9)

    return {
        "keyword_sets": [Metric("rows", 40)],
        "synthetic_prompts": [
            Metric("rows", 12), Metric("keyword_sets_used", 32), Metric("dropped", 19, of="unparsable"),
            Metric("dropped", 1, of="near_duplicate"), *generated,
        ],
        "prompt_diversity": [
            Metric("prompts_compared", 12), Metric("mean_similarity", 0.1 * iteration, of="synthetic"),
            Metric("mean_similarity", 0.05, of="seed", low=0.04, high=0.06),
            Metric("ordered_share", 0.75, of="synthetic", low=0.5, high=0.9), Metric("answerable_share", 0.5, of="seed"),
            Metric("shuffled_ordered_share", 0.0625, of="synthetic"),
        ],
        "seed_responses": [*generated, Metric("scored_tokens", 7)],
        "response_improver": [
            Metric("passing_share", 0.75, of="gold", low=0.5, high=0.9, n=8),
            Metric("passing_share", 0.5, of=ANOTHER_GOLD, low=0.25, high=0.75, n=8), Metric("trained_tokens", 1000),
        ],
        "base_responses": [Metric("rows", 12), *generated],
        "rejected_responses": [Metric("rows", 12), Metric("generated_tokens", 0)],
        "refined_responses": [Metric("rows", 12), *generated],
        "preference_pairs": [
            Metric("rows", kept), Metric("candidate_pairs", 10), Metric("dropped", 5, of="margin"),
            Metric("mean_margin", iteration + 0.4), Metric("chosen_to_rejected_length", 1.25),
            Metric("scored_tokens", 7),
        ],
        "model_checkpoint": [
            Metric("examples", kept * iteration), Metric("training_steps", 24 * iteration), Metric("trained_tokens", 2000),
        ],
        "evaluation": [
            Metric("held_out_prompts", 8, split="test"), Metric("held_out_prompts", 6, split="dev"),
            *sides("mean_repetition", 0.25, 0.125), *sides("cut_share", 0.75),
            *sides("held_out_reward", 0.1 + iteration, 0.1), Metric("held_out_reward", 3.5, of="gold"),
            Metric("scored_tokens", 7), *generated, *judged(iteration),
        ],
        "instruction_following": [
            Metric("instructions", 9), *sides("verifiable_rate", 0.5, 0.375), *sides("constraint_rate", 0.6),
            Metric("verifiable_rate", 0.25, of="prompt_as_answer"),
            gain("verifiable_gain", 0.125, -0.01, 0.25),
            dataclasses.replace(gain("verifiable_gain", 0.25, 0.1, 0.4), over="prompt_as_answer"),
            dataclasses.replace(gain("verifiable_gain", 0.0625, -0.1, 0.2), over="first_sentence"),
            Metric("generated_tokens", 1),
        ],
        "gold_comparison": [
            *sides("gold_log_likelihood", -2.5, -3.0), *sides("gold_similarity", 0.7),
            gain("gold_log_likelihood_gain", 0.5, 0.25, 0.75), *sides("gold_end_log_likelihood", -1.5, -4.0),
            gain("gold_end_log_likelihood_gain", 2.5, 2.25, 2.75),
            gain("other_gold_log_likelihood_gain", 0.125, 0.0, 0.25),
            gain("gold_log_likelihood_gain_beyond_other", 0.375, 0.25, 0.5),
            Metric("gold_similarity", 0.6, of="candidate", by=LENGTH_BANDS[1], n=7),
            dataclasses.replace(gain("gold_similarity_gain", 0.1, -0.1, 0.2), by=LENGTH_BANDS[1], n=5),
        ],
        "equal_steps_evaluation": [
            Metric("win_rate", 0.45, of="equal_steps", over=opponent, by=INDEPENDENT, low=0.3, high=0.6, n=8)
            for opponent in ("initial", "candidate")
        ],
        "equal_steps_instructions": [
            Metric("verifiable_rate", 0.45, of="equal_steps"),
            dataclasses.replace(gain("verifiable_gain", 0.05, -0.1, 0.2), over="equal_steps"),
        ],
        "equal_steps_gold": [
            dataclasses.replace(found, over="equal_steps") for found in (
                gain("gold_log_likelihood_gain", 0.25, 0.125, 0.5), gain("other_gold_log_likelihood_gain", 0.5, 0.25, 0.75),
                gain("gold_log_likelihood_gain_beyond_other", -0.25, -0.5, -0.125),
            )
        ],
        "promotion": [Metric("promoted", 1, of="candidate")],
    }  # fmt: skip


def judged(iteration, judges=(INDEPENDENT, TOOK_PART), alike=10):
    """As they are recorded: for each judge and opponent the win rate and what it is made of."""
    metrics = []
    for place, judge in enumerate(judges):
        for opponent in ("initial", "previous"):
            who = {"of": "candidate", "over": opponent, "by": judge}
            rate = 0.5 + iteration / 10 - place / 10
            counts = {"wins": 5, "ties": 1, "losses": 2, "no_verdicts": place}
            metrics += [
                Metric("win_rate", rate, low=0.4, high=0.9, n=8, **who),
                Metric("length_controlled_win_rate", 0.55, low=0.3, high=0.75, n=8, **who),
                Metric("pairs_alike_in_length", alike, n=8, **who),
            ]
            if opponent == "initial":
                metrics.append(Metric("win_rate_both_ended", 0.75, low=0.3, high=0.95, n=4, **who))
                names = [name for names in ENDING_COUNTS.values() for name in names]
                metrics += [Metric(name, number, **who) for number, name in enumerate(names)]
            metrics += [Metric(name, value, **who) for name, value in counts.items()]
        for form, rate, controlled in (("trimmed", 0.45, 0.48), ("verbose", 0.55, 0.52)):
            who = {"of": form, "over": "initial", "by": judge, "n": 8}
            metrics += [Metric("win_rate", rate, **who), Metric("length_controlled_win_rate", controlled, **who)]
            metrics.append(Metric("pairs_alike_in_length", 1, **who))
    # What was measured on dev is not reported.
    return [*metrics, *(dataclasses.replace(each, value=0.125, split="dev") for each in metrics)]


def training_log(iteration, steps=5):
    """As the trainer writes it; its closing entry holds no rewards."""
    entries = [
        {"step": step, "loss": 1.0, "rewards/chosen": -2.0 + step * iteration / 10, "rewards/rejected": -2.0,
         "rewards/margins": step * iteration / 10, "rewards/accuracies": step / 8}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    return [*entries, {"step": steps, "loss": 1.0}]


def checkpoint_stand_in(iteration, log):
    def build(directory: Path):
        (directory / "merged").mkdir()
        (directory / "merged" / "model.safetensors").write_text(f"M_{iteration}")
        (directory / "trainer_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))

    @dg.asset(name="model_checkpoint", partitions_def=ITERATIONS, io_manager_key="checkpoints")
    def asset(context: dg.AssetExecutionContext, services: dg.ResourceParam[Services]) -> dg.Output[Checkpoint]:
        learned = {f"preference_pairs[{partition_key(1 + number)}]": "as then" for number in range(iteration)}
        made, _ = services.checkpoints.create(
            context, build, parents={}, trained_on=learned, settings={}, random_seed=0
        )  # fmt: skip
        return dg.Output(made, data_version=dg.DataVersion(made.sha[:16]))

    return asset


def make_iteration(instance, services, iteration, text="x", without=(), log=None, judged_sha=None, **changes):
    """Records what the assets of an iteration measure; `changes` are metrics that take the place of an asset's own."""
    key = partition_key(iteration)
    services.tables.write("preference_pairs", key, pairs(iteration, text=text))
    made = checkpoint_stand_in(iteration, training_log(iteration) if log is None else log)
    sha = run([made], instance, services, key).output_for_node("model_checkpoint").sha
    rows = {}
    for asset, metrics in recorded(iteration).items():
        if asset not in without:
            own = changes.get(asset, metrics)
            own = [dataclasses.replace(each, checkpoint_sha=each.checkpoint_sha or judged_sha or sha)
                   if each.of == "candidate" else each for each in own]  # fmt: skip
            rows[asset] = _rows(asset, key, own)
    # As `record` does, but looked at together: twenty looks take longer than all else here.
    MetricRows.validate(pl.concat(rows.values()))
    for asset, frame in rows.items():
        services.metrics.write(asset, key, frame)
    return sha


def report(instance, services):
    """Materializes the report and returns its metadata, its content version and its page."""
    result = run([boosting_report], instance, services, "0001")
    made = result.asset_materializations_for_node("boosting_report")[0]
    metadata = {name: entry.value for name, entry in made.metadata.items()}
    return metadata, made.tags["dagster/data_version"], Path(metadata["path"]).read_text()


def test_every_metric_is_in_its_place(instance, services):
    prompts = [each for each in recorded(2)["synthetic_prompts"] if each.metric != "dropped"]
    other_reasons = [*prompts, Metric("dropped", 20, of="unparsable")]
    shas = [
        make_iteration(instance, services, 1),
        make_iteration(instance, services, 2, synthetic_prompts=other_reasons),
    ]
    iterations = [read_iteration(instance, services, key) for key in ("0001", "0002")]
    cells = {row.label: row.cells for row in report_rows(iterations)}
    assert cells == {
        "keyword sets drawn": ("40", "40"),
        "synthetic prompts": ("12", "12"),
        "base responses": ("12", "12"),
        "rejected responses": ("12", "12"),
        "refined responses (chosen side)": ("12", "12"),
        "candidate pairs": ("10", "10"),
        "pairs kept": ("5", "5"),
        "pairs that M_t was trained on": ("5", "10"),
        "optimizer steps of M_t": ("24", "48"),
        "valid prompts per keyword set used": ("37.5%", "37.5%"),
        "pairs kept per candidate": ("50.0%", "50.0%"),
        "synthetic_prompts: near duplicate": ("1", "—"),
        "synthetic_prompts: unparsable": ("19", "20"),
        "preference_pairs: margin": ("5", "5"),
        "prompts compared, of each source": ("12", "12"),
        "mean similarity of synthetic prompts, 95 % interval": ("0.100", "0.200"),
        "mean similarity of seed prompts, 95 % interval": ("0.050 (0.040 to 0.060)",) * 2,
        "synthetic prompts likelier under M_0 than their words shuffled, 95 % interval": ("75.0% (50.0 to 90.0)",) * 2,
        "the same of synthetic prompts whose words were shuffled": ("6.2%", "6.2%"),
        "seed prompts that can be answered, by a judge's word, 95 % interval": ("50.0%", "50.0%"),
        "gold answers that pass the improver's filter, 95 % interval": ("75.0% (50.0 to 90.0)",) * 2,
        "gold answers of other prompts that pass the improver's filter, 95 % interval": ("50.0% (25.0 to 75.0)",) * 2,
        "mean margin of scores": ("1.400", "2.400"),
        "chosen length / rejected length": ("1.250", "1.250"),
        "base_responses": ("20.0%", "20.0%"),
        "refined_responses": ("20.0%", "20.0%"),
        "seed_responses": ("20.0%", "20.0%"),
        "synthetic_prompts": ("20.0%", "20.0%"),
        "evaluation": ("20.0%", "20.0%"),
        # Of five steps the last two.
        "reward margin, last quarter of training": ("0.450", "0.900"),
        "reward accuracy, last quarter of training": ("56.2%", "56.2%"),
        "prompts of the test split, which all of this is of": ("8", "8"),
        "prompts of the dev split, which the gate reads": ("6", "6"),
        "mean reward of M_0, by the scorer": ("0.100", "0.100"),
        "mean reward of M_t, by the scorer": ("1.100", "2.100"),
        "mean reward of the gold answers, by the scorer": ("3.500", "3.500"),
        **{
            f"{judge}, over {opponent}: {metric}": cells
            for place, judge in enumerate(("independent judge", "scorer (took part in training)"))
            for opponent in ("M_0", "M_t-1")
            for metric, cells in (
                ("win rate, 95 % interval", (f"{6 - place}0.0% (40.0 to 90.0)", f"{7 - place}0.0% (40.0 to 90.0)")),
                ("length-controlled win rate, 95 % interval", ("55.0% (30.0 to 75.0)",) * 2),
                ("pairs alike in length (ratio 0.8 to 1.25)", ("10", "10")),
                ("wins, ties, losses, no verdict", (f"5, 1, 2, {place}",) * 2),
            )
        },
        **{
            # Their length-controlled rates have no interval, as those of earlier versions that are extrapolated.
            f"{judge}, M_0 {form}, over M_0: win rate, 95 % interval": (rate,) * 2
            for judge in (INDEPENDENT, TOOK_PART)
            for form, rate in (("trimmed", "45.0%"), ("verbose", "55.0%"))
        },
        **{
            f"{judge}, over M_0: win rate where both answers ended, 95 % interval": ("75.0% (30.0 to 95.0), 4 prompts",)
            * 2
            for judge in (INDEPENDENT, TOOK_PART)
        },
        **{
            f"{judge}, over M_0, {ended}: wins, ties, losses": (counts,) * 2
            for judge in (INDEPENDENT, TOOK_PART)
            for ended, counts in (
                ("both ended", "0, 1, 2"),
                ("only M_t ended", "3, 4, 5"),
                ("only M_0 ended", "6, 7, 8"),
                ("neither ended", "9, 10, 11"),
            )
        },
        **{
            f"independent judge, the pairs of iteration 1 for as many steps over {opponent}: win rate, 95 % interval": (
                "45.0% (30.0 to 60.0)",
            )
            * 2
            for opponent in ("M_0", "M_t")
        },
        "instructions followed by the model of the pairs of iteration 1 for as many steps": ("45.0%", "45.0%"),
        "instructions followed, M_t less that model, 95 % interval": ("+5.0 points (-10.0 to +20.0)",) * 2,
        "log-likelihood of gold per token, M_t less that model, 95 % interval": ("+0.250 (+0.125 to +0.500)",) * 2,
        "null: log-likelihood of gold of another prompt per token, M_t less that model, 95 % interval": (
            "+0.500 (+0.250 to +0.750)",
        )
        * 2,
        "log-likelihood of gold, M_t less that model, less that null, 95 % interval": ("-0.250 (-0.500 to -0.125)",)
        * 2,
        "repeated 3-grams in M_t's answers": ("25.0%", "25.0%"),
        "repeated 3-grams in M_0's answers": ("12.5%", "12.5%"),
        "answers of M_t cut": ("75.0%", "75.0%"),
        "verifiable instructions": ("9", "9"),
        "instructions followed by M_t": ("50.0%", "50.0%"),
        "instructions followed by M_0": ("37.5%", "37.5%"),
        "null: instructions followed by their own prompts, given as answers": ("25.0%", "25.0%"),
        "instructions followed, M_t less M_0, 95 % interval": ("+12.5 points (-1.0 to +25.0)",) * 2,
        "instructions followed, M_t less their own prompts, given as answers, 95 % interval": (
            "+25.0 points (+10.0 to +40.0)",
        )
        * 2,
        "instructions followed, M_t less the first sentences of M_0's answers, 95 % interval": (
            "+6.2 points (-10.0 to +20.0)",
        )
        * 2,
        "log-likelihood of gold's text per token, M_t less M_0, 95 % interval": ("+0.500 (+0.250 to +0.750)",) * 2,
        "null: log-likelihood of gold of another prompt per token, M_t less M_0, 95 % interval": (
            "+0.125 (+0.000 to +0.250)",
        )
        * 2,
        "log-likelihood of gold, M_t less M_0, less that null, 95 % interval": ("+0.375 (+0.250 to +0.500)",) * 2,
        "constraints met by M_t": ("60.0%", "60.0%"),
        "log-likelihood of gold's text per token, M_t": ("-2.500", "-2.500"),
        "log-likelihood of gold's text per token, M_0": ("-3.000", "-3.000"),
        "log-likelihood of gold's end of turn, M_t": ("-1.500", "-1.500"),
        "log-likelihood of gold's end of turn, M_0": ("-4.000", "-4.000"),
        "log-likelihood of gold's end of turn, M_t less M_0, 95 % interval": ("+2.500 (+2.250 to +2.750)",) * 2,
        "similarity of the answers to gold, M_t": ("0.700", "0.700"),
        "similarity to gold, answers of half to twice gold's length, M_t": ("0.600, n = 7",) * 2,
        "similarity to gold, answers of half to twice gold's length by both, M_t less M_0, 95 % interval": (
            "+0.100 (-0.100 to +0.200), n = 5",
        )
        * 2,
        "M_t promoted to the next iteration": ("yes", "yes"),
        "M_t": tuple(sha[:16] for sha in shas),
        "model that wrote the chosen side": ("0123456789abcdef",) * 2,
        "model that wrote the rejected side": ("0123456789abcdef",) * 2,
        "scorer": ("feedfacefeedface",) * 2,
        "tokens generated": ("501", "501"),
        "tokens trained on": ("3,000", "3,000"),
        "tokens scored": ("21", "21"),
        "seconds": cells["seconds"],
    }


def test_what_a_judge_names_has_rows_where_there_is_such_a_judge(instance, services):
    make_iteration(instance, services, 1)
    make_iteration(
        instance,
        services,
        2,
        prompt_diversity=[Metric("topics", 21, of="synthetic"), Metric("intentions", 7, of="seed")],
    )
    iterations = [read_iteration(instance, services, key) for key in ("0001", "0002")]
    named = {row.label: row.cells for row in report_rows(iterations) if "named by a judge" in row.label}
    assert named == {
        "topics of synthetic prompts, named by a judge": ("—", "21"),
        "intentions of seed prompts, named by a judge": ("—", "7"),
    }


def test_the_ui_shows_table_plots_and_sources(instance, services):
    sha = make_iteration(instance, services, 1)
    metadata, _, page = report(instance, services)
    records = {record.data["metric"]: record.data["0001"] for record in metadata["table"].records}
    assert records["M_t"] == sha[:16]
    assert metadata["iterations"] == "0001"
    assert metadata["notes"] == "none"
    assert "/assets/model_checkpoint?view=partitions&partition=0001" in metadata["made_of"]
    assert metadata["path"] == str(services.home / "reports" / "boosting_report.html")
    for text in (sha[:16], "37.5%", "independent judge; scorer (took part in training)", "no independent\njudgement"):
        assert text in page


@pytest.mark.slow
def test_the_plots_are_small_drawings_in_the_colours_of_the_page(instance, services):
    for iteration in (1, 2):
        make_iteration(instance, services, iteration)
    metadata, _, page = report(instance, services)
    pictures = re.findall(r"!\[[^\]]+\]\(data:image/svg\+xml;base64,([^)]+)\)", metadata["plots"])
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == len(pictures) == len(PLOTS)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "currentColor" in drawing
        assert "<text" in drawing
        assert "#000000" not in drawing
        assert len(drawing) < 40_000
    # By name, so that no drawing takes what another one defines.
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    # In the UI, which has a theme of its own, they bring their colours along.
    assert {base64.b64decode(each).decode().partition(" xmlns")[0] for each in pictures} == {
        '<svg style="color: #333333; background: white"'
    }


def shown_plots(page):
    return {title for title in TITLES if f">{TITLES[title]}</text>" in page}


def test_generated_text_is_shown_as_text(instance, services):
    make_iteration(instance, services, 1, text=NASTY)
    _, _, page = report(instance, services)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;⟨U+001B⟩[31m⟨U+0000⟩" in page
    assert "| a | b |" in page
    assert "&lt;b&gt;c&lt;/b&gt; | ⟨U+202E⟩d" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert not re.search(r"<(link|iframe|object|a|img)\b|\shref=|\ssrc=|url\((?!#)|@import|xlink:href=\"(?!#)", page)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page


def test_a_length_controlled_rate_that_is_extrapolated_is_named(instance, services):
    def evaluated(alike):
        return [each for each in recorded(2)["evaluation"] if each not in judged(2)] + judged(2, alike=alike)

    make_iteration(instance, services, 1, evaluation=evaluated(4))
    make_iteration(instance, services, 2, evaluation=evaluated(3))
    metadata, _, page = report(instance, services)
    sentence = (
        "Iteration 0002, M_t over {}: 3 of 8 pairs of answers are alike in length (ratio 0.8 to 1.25), fewer than 10 and than "
        "half, so the length-controlled win rate would be extrapolated and is left out."
    )
    # Once for both judges.
    assert metadata["notes"] == " ".join(sentence.format(name) for name in ("M_0", "M_t-1"))
    assert sentence.format("M_0") in page


# Trimmed and verbose answers of M_0 win less often.
FORMS = {"trimmed": (0.2, 0.1, 0.3), "verbose": (0.2, 0.1, 0.3)}
NOTHING = (None, None, None)


def finished_iteration(
    rate=None,
    controlled=None,
    doubt=None,
    forms=FORMS,
    followed=None,
    over_null=(0.1, 0.05, 0.2),
    length=None,
):
    """M_3, judged so on 84 prompts; rates and gains as value, low and high."""
    who = {"of": "candidate", "over": "initial", "by": INDEPENDENT, "n": 84}
    rates = {"win_rate": rate, "length_controlled_win_rate": controlled}
    metrics = [
        Metric(name, value, low=low, high=high, **who)
        for name, found in rates.items()
        if found
        for value, low, high in [found]
    ]
    metrics += [
        Metric("win_rate_gain", value, "candidate", form, INDEPENDENT, low, high, 30 if value is not None else 0)
        for form, (value, low, high) in forms.items()
    ]
    if followed:
        gains = {"initial": followed, "as_brief": over_null, "first_sentence": (0.4, 0.3, 0.5)}
        metrics += [
            Metric("verifiable_gain", value, "candidate", over, None, low, high, 45, "sha")
            for over, (value, low, high) in gains.items()
        ]
    metrics.append(Metric("mean_repetition", 0.1, "candidate", checkpoint_sha="sha"))
    frame = Metrics(pl.DataFrame(schema=SCHEMA)).with_metrics_of("evaluation", "0003", metrics)
    return FinishedIteration("0003", frame, 1.0, pl.DataFrame(), [], "", {}, {}, None, doubt, length)


ABOVE, ACROSS, BELOW, MORE = (0.7, 0.6, 0.8), (0.55, 0.45, 0.65), (0.3, 0.2, 0.4), (0.2, 0.1, 0.3)


@pytest.mark.parametrize(("judged_so", "words"), [
    ({"rate": ABOVE, "controlled": ABOVE, "followed": MORE},
     "M_3 is better than M_0: the independent judge prefers its answers in 70.0% (60.0 to 80.0) of 84 test prompts, at equal "
     "length in 70.0% (60.0 to 80.0), and more often than M_0's own answers cut to half of their sentences and "
     "given when it is asked for long ones. Without a judge, instructions "
     "followed compared with M_0: +20.0 points (+10.0 to +30.0), and with M_0's answers, cut to as many words as M_t's, "
     "+10.0 points (+5.0 to +20.0)."),
    ({"rate": ABOVE, "controlled": ABOVE},
     "A judge prefers M_3 to M_0, and nothing else shows that it is better: the independent judge prefers its answers in 70.0% "
     "(60.0 to 80.0) of 84 test prompts, at equal length in 70.0% (60.0 to 80.0), and more often than M_0's own answers cut to "
     "half of their sentences and given when it is asked for long ones. "
     "No figure without a judge was"),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": MORE, "over_null": (0.1, -0.1, 0.3)},
     "A judge prefers M_3 to M_0, and nothing else shows that it is better: the independent judge prefers its answers"),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": (0.1, -0.1, 0.3)}, "(+5.0 to +20.0): no gain is shown."),
    # The other null, which follows fewer, is not shown to.
    ({"rate": ABOVE, "controlled": ABOVE, "followed": MORE, "over_null": (0.5, -0.1, 1.0)},
     "as many words as M_t's, +50.0 points (-10.0 to +100.0): no gain is shown."),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": MORE, "forms": {}},
     "form may be all of it: the independent judge prefers its answers in 70.0% (60.0 to 80.0) of 84 test prompts, at equal "
     "length in 70.0% (60.0 to 80.0), and it was not compared with M_0's own answers, cut to half of their sentences."),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": MORE, "forms": FORMS | {"trimmed": NOTHING}},
     "M_3 is better than M_0: the independent judge prefers its answers in 70.0% (60.0 to 80.0) of 84 test prompts, at equal "
     "length in 70.0% (60.0 to 80.0), and more often than M_0's own answers given when it is asked for long ones."),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": MORE, "forms": FORMS | {"verbose": NOTHING}},
     "it was not compared with M_0's own answers, given when it is asked for long ones."),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": (-0.2, -0.3, -0.1)}, "with M_0: -20.0 points (-30.0 to -10.0): fewer."),
    *(({"rate": ABOVE, "controlled": ABOVE, "followed": MORE, "forms": FORMS | {form: gain}},
       "form may be all of it: the independent judge prefers its answers in 70.0% (60.0 to 80.0) of 84 test prompts, at equal "
       f"length in 70.0% (60.0 to 80.0), and M_0's own answers, {what}, win so often that M_t has +10.0 points ")
      for form, what in (("trimmed", "cut to half of their sentences"), ("verbose", "given when it is asked for long ones"))
      for gain in ((0.1, -0.1, 0.3), (0.1, -0.1, 0.2))),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": MORE, "forms": FORMS | {"verbose": (0.1, None, None)}},
     "form may be all of it: the independent judge prefers its answers in 70.0% (60.0 to 80.0) of 84 test prompts, at equal "
     "length in 70.0% (60.0 to 80.0), and M_t has over M_0's own answers, given when it is asked for long ones, +10.0 points "
     "(no interval) more, over 30 prompts."),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": (1.0, None, None), "over_null": (0.4, 0.3, 0.5)},
     "+100.0 points (no interval), and with M_0's answers, cut to as many words as M_t's, +40.0 points (+30.0 to +50.0)."),
    ({"rate": ABOVE, "controlled": ABOVE, "followed": MORE, "length": "Length alone is right more often."},
     "length may be all of it: the independent judge prefers its answers in 70.0% (60.0 to 80.0) of 84 test prompts, at equal "
     "length in 70.0% (60.0 to 80.0). Length alone is right more often. Without a judge, instructions followed compared with "
     "M_0: +20.0"),
    ({"rate": ABOVE, "controlled": ACROSS}, "length may be all of it"),
    ({"rate": ABOVE, "controlled": BELOW}, "length may be all of it"),
    ({"rate": ABOVE, "controlled": (0.7, None, None)}, "length may be all of it"),
    ({"rate": ABOVE}, "length may be all of it"),
    ({"rate": ACROSS, "controlled": ABOVE}, "M_3 is not shown to be better than M_0"),
    ({"rate": (0.9, 0.5, 1.0), "controlled": ABOVE}, "M_3 is not shown to be better than M_0"),
    ({"rate": BELOW, "controlled": BELOW, "followed": (-0.2, -0.3, -0.1)}, "M_3 is worse than M_0: the independent judge prefers"),
    ({"rate": BELOW, "controlled": BELOW, "followed": MORE},
     "A judge prefers M_0 to M_3, and nothing else shows that it is worse: the independent judge prefers its answers in 30.0%"),
    ({"rate": BELOW, "controlled": ABOVE}, "less often than M_0, and length may be all of it"),
    ({"rate": BELOW, "controlled": ACROSS},
     "M_3 wins less often than M_0, and length may be all of it: the independent judge prefers its answers in 30.0% (20.0 to "
     "40.0) of 84 test prompts, at equal length in 55.0% (45.0 to 65.0), which does not lie below one half."),
    ({"rate": BELOW}, "less often than M_0, and length may be all of it"),
    ({"rate": BELOW, "controlled": BELOW, "length": "Length alone is right more often."},
     "less often than M_0, and length may be all of it"),
    ({"rate": (0.9, None, None), "controlled": ABOVE}, "is not known: no independent judge's win rate with an interval"),
    ({}, "is not known: no independent judge's win rate with an interval"),
    ({"rate": ABOVE, "controlled": ABOVE, "doubt": "The judge cannot judge."}, "is not known. The judge cannot judge."),
])  # fmt: skip
def test_the_verdict_claims_no_more_than_the_intervals_show(judged_so, words):
    newest = finished_iteration(**judged_so)
    assert words in " ".join(verdict(newest))
    assert ("is better than M_0:" in verdict(newest)[0]) == (words.startswith("M_3 is better than M_0:"))
    shown = [card.value for card in cards(newest)[:2]]
    assert (
        shown == [MISSING] * 2 if "doubt" in judged_so or not judged_so else shown[0] == f"{judged_so['rate'][0]:.1%}"
    )


def evaluated(iteration, verdicts, prompts=6):
    """The table `evaluation` of an iteration, as far as the report reads it."""
    return pl.DataFrame([
        {"iteration": iteration, "prompt_id": f"prompt-{number}", "split": split, "sample": sample,
         "prompt": f"{split} question {number}", "answer": f"gold {number}", "initial_response": f"M_0 on {number}",
         "candidate_response": f"M_{iteration} on {number}, {sample}", "judge_over_initial": verdicts[number % len(verdicts)]}
        for number in range(prompts) for split in ("dev", "test") for sample in (1, 2)
    ])  # fmt: skip


def test_the_same_test_prompts_are_shown_with_the_answers_of_all_models(instance, services):
    for iteration in (1, 2):
        make_iteration(instance, services, iteration)
        services.tables.write(
            "evaluation", partition_key(iteration), evaluated(iteration, ["win", "loss"][:: 3 - 2 * iteration])
        )
    _, first, page = report(instance, services)
    answers = page.partition("<h2>The same prompts")[2].partition("<h2>Sample pairs")[0]
    assert re.findall(r"<summary>(.*?)</summary>", answers) == [f"test question {number}" for number in range(4)]
    texts = re.findall(r"<h4>(.*?)</h4>\s*<pre>\s*(.*?)</pre>", answers)
    assert texts[:4] == [
        ("M_2: M_0&#39;s is preferred", "M_2 on 0, 1"), ("M_1: preferred to M_0&#39;s", "M_1 on 0, 1"),
        ("M_0", "M_0 on 0"), ("Gold", "gold 0"),
    ]  # fmt: skip
    judge_that_is_right(services, 0.5, 0.3)
    assert "preferred to M_0&#39;s" not in report(instance, services)[2]
    services.tables.write("evaluation", "0002", evaluated(2, ["tie"], prompts=3))
    assert report(instance, services)[1] != first


def test_the_newest_iteration_comes_first_and_the_first_screen_has_the_headlines(instance, services):
    for iteration in (1, 2):
        make_iteration(instance, services, iteration)
    metadata, _, page = report(instance, services)
    assert re.findall(r'<th scope="col">(M_\d)</th>', page)[:2] == ["M_2", "M_1"]
    first = page.partition("<h2>")[0]
    headline = re.search(r"<h1>(.*?)</h1>\n<p>(.*?)</p>", first.replace("&#39;", "'"))
    assert " ".join(headline.groups()) == metadata["verdict"]
    assert re.findall(r'<dd class="value">(.*?)</dd>', first) == ["70.0%", "55.0%", "+12.5 points", "yes"]
    assert "figures of the test split" in first
    assert list(metadata)[:3] == ["verdict", "boosting", "report"]
    assert metadata["report"].startswith("/reports/boosting_report.html?")
    gains = "+12.5 points (-1.0 to +25.0) | +6.2 points (-10.0 to +20.0)"
    assert metadata["boosting"].splitlines()[2:4] == [
        f"| 0001 | 60.0% (40.0 to 90.0) | 55.0% (30.0 to 75.0) | {gains} | yes |",
        f"| 0002 | 70.0% (40.0 to 90.0) | 55.0% (30.0 to 75.0) | {gains} | yes |",
    ]
    # Dagster's UI shows so much in place.
    assert len(metadata["boosting"]) < 1000


def test_the_report_has_the_settings_in_which_iterations_differ_and_says_which_experiment_it_is(instance, services):
    for iteration, beta in ((1, "2.0"), (2, "3.0")):
        make_iteration(instance, services, iteration)
        used = [
            ("model_checkpoint", "preference_optimization.loss.beta", beta),
            ("model_checkpoint", "random_seed", "42"),
        ]
        used += [("benchmark_scores", "benchmarks.tasks", "[]")] * (iteration - 1)
        frame = pl.DataFrame(used, schema=USED_SETTINGS, orient="row")
        services.used_settings.write("model_checkpoint", partition_key(iteration), frame)
    metadata, _, page = report(instance, services)
    rows = [
        tuple(each.data.values())
        for each in metadata["table"].records
        if each.data["section"] == "Settings that differ"
    ]
    assert rows == [("Settings that differ", "preference_optimization.loss.beta", "2.0", "3.0")]
    for text in ("nano", str(services.home), "laptop", "torch 2.", "UTC", "preference_optimization.loss.beta"):
        assert text in page.partition("<h2>Which experiment")[2].partition("<h2>Sample")[0]


def judge_that_is_right(services, accuracy, low):
    rates = [Metric("held_out_accuracy", accuracy, of=BOTH_ENDED, low=low, high=0.95, n=32),
             Metric("held_out_accuracy", 0.8, of=BOTH_ENDED, by="length alone", n=32)]  # fmt: skip
    measured(services, "judge_model", *rates, partition=None)


def test_in_place_of_the_win_rates_of_a_judge_at_chance_stands_why(instance, services):
    make_iteration(instance, services, 1)
    for accuracy, low, cell in ((0.625, 0.45, "judge at chance"), (0.9, 0.76, "60.0% (40.0 to 90.0)")):
        judge_that_is_right(services, accuracy, low)
        metadata, _, page = report(instance, services)
        records = {record.data["metric"]: record.data["0001"] for record in metadata["table"].records}
        assert records[f"{INDEPENDENT}, over M_0: win rate, 95 % interval"] == cell
        assert records[f"{INDEPENDENT}, over M_0: wins, ties, losses, no verdict"] == "5, 1, 2, 0"
        assert records[f"{TOOK_PART}, over M_0: win rate, 95 % interval"] == "50.0% (40.0 to 90.0)"
        console = Console(width=200, file=io.StringIO())
        console.print(_held_out(services, 1))
        printed = " ".join(console.file.getvalue().split())
        doubted, shown = low < 0.5, [metadata["notes"], page, printed]
        assert all(("that is not above chance, so its win rates say nothing" in text) == doubted for text in shown)
        assert ("60.0% (40.0 to 90.0)" in printed) != doubted
        row = page.partition(KINDS[BOTH_ENDED].replace("'", "&#39;"))[2].partition("</tr>")[0]
        assert re.findall(r"<td>(.*?)</td>", row) == [
            "32",
            f"{accuracy:.1%} ({100 * low:.1f} to 95.0)",
            "—",
            "80.0%",
            "—",
        ]


def test_the_summary_on_the_terminal_shows_each_win_rate_whole(instance, services):
    make_iteration(instance, services, 1)
    console = Console(width=80, file=io.StringIO())
    console.print(_held_out(services, 1))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    assert [line[2:] for line in lines if len(line) == 5 and line[3]] == [
        ["over M_0", "60.0% (40.0 to 90.0)", "8"], ["both answers ended", "75.0% (30.0 to 95.0)", "4"],
        ["length-controlled", "55.0% (30.0 to 75.0)", "8"], ["over M_t-1", "60.0% (40.0 to 90.0)", "8"],
        ["M_0 trimmed over M_0", "45.0%", "8"], ["M_0 verbose over M_0", "55.0%", "8"],
        ["over M_0", "50.0% (40.0 to 90.0)", "8"], ["both answers ended", "75.0% (30.0 to 95.0)", "4"],
        ["length-controlled", "55.0% (30.0 to 75.0)", "8"], ["over M_t-1", "50.0% (40.0 to 90.0)", "8"],
        ["M_0 trimmed over M_0", "45.0%", "8"], ["M_0 verbose over M_0", "55.0%", "8"],
    ]  # fmt: skip


def test_an_unfinished_iteration_is_named_and_left_out(instance, services):
    make_iteration(instance, services, 1)
    make_iteration(instance, services, 2, without=("evaluation",))
    metadata, _, page = report(instance, services)
    assert metadata["iterations"] == "0001"
    assert metadata["notes"] == "Not finished, and therefore left out: iteration 0002."
    assert metadata["notes"] in page


def test_an_iteration_whose_evaluation_judged_an_older_checkpoint_is_not_finished(instance, services):
    make_iteration(instance, services, 1)
    make_iteration(instance, services, 2, judged_sha="that of a checkpoint made before")
    assert iterations_of(instance, services) == (["0001"], ["0002"])


def test_a_checkpoint_that_was_not_promoted_is_named_with_the_reason(instance, services):
    verdict = "model_checkpoint[0002] was not promoted to policy[0003]: mean_repetition is 0.4, more than 0.2."
    row = {"metric": "mean_repetition", "passed": False, "reason": "mean_repetition is 0.4, more than 0.2"}
    services.tables.write("promotion", "0002", pl.DataFrame([row]))
    make_iteration(instance, services, 1)
    make_iteration(instance, services, 2, promotion=[Metric("promoted", 0, of="candidate")])
    make_iteration(instance, services, 3, promotion=[Metric("promoted", 1, of="candidate", checkpoint_sha="another")])
    metadata, _, page = report(instance, services)
    records = {record.data["metric"]: record.data for record in metadata["table"].records}
    promoted = records["M_t promoted to the next iteration"]
    assert [promoted[key] for key in ("0001", "0002", "0003")] == ["yes", "no", "—"]
    assert metadata["notes"] == verdict
    assert verdict in page


@pytest.mark.parametrize(("again", "finished"), [("0003", 2), ("0002", 1), ("0001", 0)])
def test_an_iteration_that_learned_from_pairs_which_were_made_again_is_not_finished(
    instance, services, again, finished
):
    keys = [partition_key(number) for number in (1, 2, 3)]
    for number in (1, 2, 3):
        make_iteration(instance, services, number)
    version = {"dagster/data_version": "made again"}
    instance.report_runless_asset_event(dg.AssetMaterialization("preference_pairs", partition=again, tags=version))
    assert iterations_of(instance, services) == (keys[:finished], keys[finished:])


def test_what_was_measured_of_an_earlier_m_t_is_left_out(instance, services):
    def gain(over):
        return Metric("verifiable_gain", 0.5, "candidate", over, checkpoint_sha="an earlier one")

    own = {"instruction_following": [gain("initial"), Metric("verifiable_rate", 0.2, "candidate")]}
    make_iteration(instance, services, 1, **own)
    found = read_iteration(instance, services, "0001").metrics
    assert found.find("verifiable_gain", "candidate", over="initial") is None
    assert found.value("verifiable_rate", "candidate") is None
    assert found.value("win_rate", "candidate", over="initial", by=INDEPENDENT) is not None
    assert found.value("win_rate", "equal_steps", over="candidate", by=INDEPENDENT) is not None
    make_iteration(instance, services, 1, **own, equal_steps_instructions=[gain("equal_steps")])
    found = read_iteration(instance, services, "0001").metrics
    assert found.value("win_rate", "equal_steps", over="candidate", by=INDEPENDENT) is None


def test_of_earlier_versions_a_rate_that_was_extrapolated_is_not_shown(instance, services):
    rates = {
        low: Metric("length_controlled_win_rate", 0.9, "candidate", "initial", INDEPENDENT, low=low, n=8)
        for low in (None, 0.6)
    }
    for low, rate in rates.items():
        measured(services, "evaluation", rate, partition="0001")
        shown = stored(services.metrics, "0001").value(
            "length_controlled_win_rate", "candidate", over="initial", by=INDEPENDENT
        )
        assert shown == (None if low is None else 0.9)


def test_without_a_finished_iteration_it_says_what_to_do(instance, services):
    make_iteration(instance, services, 1, without=("evaluation",))
    with pytest.raises(FinalError, match="materialize one up to its evaluation first"):
        report(instance, services)
    assert not (services.home / "reports").exists()


@pytest.mark.parametrize("what", ["emptied", "deleted"])
def test_a_checkpoint_that_is_gone_costs_the_report_its_curve_alone(instance, services, what):
    shas = [make_iteration(instance, services, iteration) for iteration in (1, 2)]
    before, _, _ = report(instance, services)
    directory = services.home / "checkpoints" / "model_checkpoint" / "0001" / shas[0][:16]
    shutil.rmtree(directory)
    if what == "emptied":
        directory.mkdir()
    after, _, _ = report(instance, services)
    assert after["notes"] == "model_checkpoint[0001] has no training log with rewards: its curves are missing."
    differing = [one.data["metric"] for one, other in zip(before["table"].records, after["table"].records, strict=True)
                 if one.data != other.data]  # fmt: skip
    assert differing == ["reward margin, last quarter of training", "reward accuracy, last quarter of training"]


def test_the_margin_is_that_of_the_last_quarter_however_long_the_training(instance, services):
    """The table of steps in the UI is thinned out; what the report says is not."""
    make_iteration(instance, services, 1, log=training_log(1, steps=312))
    (row,) = (row for row in report_rows([read_iteration(instance, services, "0001")]) if "reward margin" in row.label)
    # Steps 235 to 312.
    assert row.cells == ("27.350",)


@pytest.mark.parametrize(("values", "mean"), [
    ([7.0], 7.0), ([0.0, 0.0, 0.0, 4.0], 4.0), ([0.0, 0.0, 0.0, 4.0, 5.0], 4.5), ([1.0] * 6 + [3.0, 5.0], 4.0),
    ([100.0] * 12 + [0.25, -0.25, 1.0, 0.5], 0.375), ([], None),
])  # fmt: skip
def test_the_last_quarter_is_rounded_up_and_its_mean_worked_out_by_hand(values, mean):
    # The trainer's closing entry holds no rewards.
    assert last_quarter([*values, None]) == mean


def test_an_iteration_without_recorded_rewards_has_a_dash_and_a_note(instance, services):
    make_iteration(instance, services, 1, log=[{"step": 1, "loss": 0.5}])
    note = "model_checkpoint[0001] has no training log with rewards: its curves are missing."
    metadata, _, page = report(instance, services)
    assert metadata["notes"] == note
    assert note in page
    assert PLOTS - shown_plots(page) == {"rewards"}
    make_iteration(instance, services, 2)
    metadata, _, page = report(instance, services)
    records = {record.data["metric"]: record.data for record in metadata["table"].records}
    margins = records["reward margin, last quarter of training"]
    assert (margins["0001"], margins["0002"]) == ("—", "0.900")
    assert metadata["notes"] == note
    assert shown_plots(page) == PLOTS


def test_what_was_never_recorded_is_a_dash_where_another_iteration_has_it(instance, services):
    make_iteration(instance, services, 1, without=("seed_responses", "synthetic_prompts", "keyword_sets"))
    make_iteration(instance, services, 2)
    metadata, _, _ = report(instance, services)
    records = {record.data["metric"]: record.data["0001"] for record in metadata["table"].records}
    assert records["keyword sets drawn"] == records["valid prompts per keyword set used"] == "—"


def test_each_judge_has_rows_where_it_judged(instance, services):
    others = [each for each in recorded(1)["evaluation"] if each.by is None]
    make_iteration(instance, services, 1, evaluation=others)
    make_iteration(instance, services, 2)
    make_iteration(instance, services, 3, evaluation=[*others, *judged(3, [INDEPENDENT, "m (on a server)"])])
    metadata, _, page = report(instance, services)
    records = {record.data["metric"]: record.data for record in metadata["table"].records}
    rates = [records[f"{judge}, over M_0: win rate, 95 % interval"] for judge in
             (INDEPENDENT, TOOK_PART, "m (on a server)")]  # fmt: skip
    assert [[line[key] == "—" for key in ("0001", "0002", "0003")] for line in rates] == [
        [True, False, False], [True, False, True], [True, True, False]
    ]  # fmt: skip
    assert "independent judge; scorer (took part in training); m (on a server)" in page
    assert shown_plots(page) == PLOTS


def test_equal_content_gives_an_equal_version_and_other_content_another(instance, services):
    make_iteration(instance, services, 1)
    _, first, page = report(instance, services)
    assert report(instance, services)[1:] == (first, page)
    # The same again from finished shards: nothing is generated, and it takes another time.
    make_iteration(
        instance,
        services,
        1,
        base_responses=[Metric("rows", 12), Metric("generated_tokens", 0), Metric("cut_share", 0.2)],
    )
    assert report(instance, services)[1] == first
    make_iteration(instance, services, 1, text="y")
    assert report(instance, services)[1] != first


def test_it_runs_in_the_run_of_one_iteration_and_covers_all(instance, services):
    make_iteration(instance, services, 1)
    make_iteration(instance, services, 2)

    @dg.asset(partitions_def=ITERATIONS)
    def promotion() -> None: ...

    result = run([promotion, boosting_report], instance, services, "0002")
    made = result.asset_materializations_for_node("boosting_report")[0]
    assert made.metadata["iterations"].value == "0001, 0002"
    records = {record.data["metric"]: record.data for record in made.metadata["table"].value.records}
    assert records["M_t promoted to the next iteration"]["0002"] == "yes"
    assert made.partition == "0002"


def test_it_reports_two_real_iterations(nano_run, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(nano_run.home, home)
    services = services_in(home, load_settings(home / "settings.yaml"))
    with dg.DagsterInstance.from_config(str(home)) as instance:
        metadata, _, page = report(instance, services)
        shas = [services.checkpoints.current("model_checkpoint", key).sha[:16] for key in ("0001", "0002")]
    assert metadata["iterations"] == "0001, 0002"
    # Three prompts are too few for a length-controlled rate, unless answers are alike in length.
    alike = [each for key in ("0001", "0002") for each in stored(services.metrics, key).every("pairs_alike_in_length")]
    few = {(each.over, each.checkpoint_sha) for each in alike if each.of == "candidate" and 2 * each.value < each.n}
    notes = metadata["notes"]
    assert notes.count("would be extrapolated and is left out.") == notes.count("Iteration ") == len(few)
    # Where so few pairs leave the judge in doubt, there is no win rate to draw.
    doubted = "is not known. The judge is right about" in metadata["verdict"]
    assert PLOTS - shown_plots(page) == ({"win_rates"} if doubted else set())
    texts = [
        pl.read_parquet(home / "tables" / "evaluation" / f"{key}.parquet").filter(split="test")
        for key in ("0001", "0002")
    ]
    assert all(row["prompt"] in html.unescape(page) for row in texts[1].sort("prompt_id").head(3).to_dicts())
    records = {(record.data["section"], record.data["metric"]): record.data for record in metadata["table"].records}
    for (_, label), record in records.items():
        # A band of lengths may have answers in one iteration alone, and perhaps no two answers to a prompt both ended.
        may_lack = label.startswith("similarity to gold, answers of") or "both answers ended" in label
        assert "—" not in record.values() or may_lack, record
    kept = [pl.read_parquet(home / "tables" / "preference_pairs" / f"{key}.parquet") for key in ("0001", "0002")]
    trained_on = records["Rows", "pairs that M_t was trained on"]
    assert [trained_on["0001"], trained_on["0002"]] == [str(kept[0].height), str(kept[0].height + kept[1].height)]
    assert [records["Checkpoints", "M_t"][key] for key in ("0001", "0002")] == shas
    assert records["Checkpoints", "policy that answered"]["0002"] == shas[0]
    for pairs_of_iteration in kept:
        assert pairs_of_iteration.sort("margin")["pair_id"][-1] in page
