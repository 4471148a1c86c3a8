"""The lineage of one row: every kind of id, on tables written by hand and on a real home."""

import dataclasses
import io
import json

import dagster as dg
import polars as pl
import pytest
from dagster import DagsterInstance
from rich.console import Console

from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import ParquetTables
from synpo_assets.graph.lineage import TraceError, median_pair, trace
from synpo_assets.graph.presentation import table_version
from synpo_assets.method.ids import content_id
from synpo_assets.method.pairs import as_preferences, join_sides, select_pairs
from synpo_assets.method.responses import response_table
from synpo_assets.method.rules import CONSTRAINTS
from synpo_assets.reports.trace import as_tree
from tests.conftest import synpo_here
from tests.stand_ins import scored, services_in

ASKED = {"keywords-aa11": "What is a tide?", "keywords-aa22": "Why is the sky blue?"}
DROPPED = "Why is the sky blue?"


class Home:
    """Tables and manifests as the assets write them, without a model."""

    def __init__(self, path):
        self.path = path
        self.services = services_in(path)
        self.tables, self.checkpoints = self.services.tables, self.services.checkpoints
        self.instance = DagsterInstance.ephemeral()
        self.rules = []

    def once(self, asset, rows):
        frame = pl.DataFrame(rows)
        self.tables.write(asset, None, frame)
        self.told(asset, None, frame)
        return frame

    def write(self, asset, key, frame):
        """A table, and what the history says of it."""
        self.tables.write(asset, key, frame)
        self.told(asset, key, frame)

    def told(self, asset, key, frame):
        tags = {"dagster/data_version": table_version(frame)}
        self.instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=key, tags=tags))

    def iteration(self, number, until="preference_pairs", chosen="The moon pulls the sea."):
        """Writes the tables of an iteration up to one of them; the sky prompt has equal sides and gives no pair."""
        at, key = {"iteration": number}, f"{number:04d}"
        sets = [{"keyword_set_id": name, "keywords": [name[-4:], "moon", "sea"], "paragraph": f"About {name}."} | at
                for name in (*ASKED, "keywords-bb33")]  # fmt: skip
        prompts = pl.DataFrame(
            [{"prompt_id": content_id("prompt", prompt), "keyword_set_id": name, "prompt": prompt, **at,
              "checkpoint_sha": "generator", "input_tokens": 5, "output_tokens": 6} for name, prompt in ASKED.items()]
        ).with_columns(constraints=pl.Series([self.rules] * len(ASKED), dtype=CONSTRAINTS))  # fmt: skip
        answers = {name: self.answers(prompts, texts, sha, number) for name, texts, sha in (
            ("rejected_responses", ["It is water.", "Air."], "start"),
            ("base_responses", ["It is water.", "Air."], "start" if number == 1 else "first"),
            ("refined_responses", [chosen, "Air."], f"improver{number}"),
        )}  # fmt: skip
        base = answers["base_responses"]
        refined = answers["refined_responses"].with_columns(base_response_id=base["response_id"])
        sides = join_sides(refined, answers["rejected_responses"])
        asked = scored(sides, 1.5, 0.25).with_columns(constraints=pl.Series([self.rules] * 2, dtype=CONSTRAINTS))
        pairs = as_preferences(select_pairs(asked, 0.0, 1.0, 3, 10, 42)[0]).with_columns(
            iteration=pl.lit(number), scorer_sha=pl.lit("scorer")
        )
        written = {"keyword_sets": pl.DataFrame(sets), "synthetic_prompts": prompts, "base_responses": base,
                   "rejected_responses": answers["rejected_responses"], "refined_responses": refined,
                   "preference_pairs": pairs}  # fmt: skip
        for asset, frame in written.items():
            self.write(asset, key, frame)
            if asset == until:
                return written
        raise AssertionError(until)

    def answers(self, prompts, texts, sha, number):
        rows = [{"text": text, "input_tokens": 3, "output_tokens": 4, "finish_reason": "stop"} for text in texts]
        return response_table(prompts.select("prompt_id", "prompt"), pl.DataFrame(rows), sha, number)

    def checkpoint(self, asset, number, sha, trained_on=None):
        """A checkpoint without weights."""
        name = f"{number:04d}" if number else "once"
        directory = self.path / "checkpoints" / asset / name / sha
        directory.mkdir(parents=True)
        manifest = {"asset": asset, "partition": name if number else None, "sha": sha, "run_id": f"run of {sha}",
                    "trained_on": trained_on or {}, "weights": "merged", "parents": {}, "settings": {},
                    "files": {"model.safetensors": {"bytes": 1, "sha256": "0"}}}  # fmt: skip
        (directory / "manifest.json").write_text(json.dumps(manifest))
        made = Checkpoint(asset, manifest["partition"], sha, str(directory / "merged"), str(directory))
        self.checkpoints.point_to(asset, manifest["partition"], made)

    def trace(self, identifier):
        return trace(self.services, self.instance, identifier)

    def shown(self, identifier):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(as_tree(self.trace(identifier)))
        return console.export_text()


def below(node, *path):
    """The node that a path of kinds leads to, and None if there is none."""
    for kind in path:
        node = next((made for made in node.made_from + node.trained if made.kind == kind), None)
        if node is None:
            return None
    return node


def notes(nodes):
    return [(node.id, node.note) for node in nodes]


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def test_every_id_of_a_chain_leads_to_the_same_pair(home):
    tables = home.iteration(1)
    row = tables["preference_pairs"].row(0, named=True)
    (pair,) = home.trace(row["pair_id"])
    assert (pair.id, pair.table) == (row["pair_id"], "preference_pairs[0001]")
    assert pair.facts.items() >= {"iteration": 1, "chosen_score": 1.5, "rejected_score": 0.25, "margin": 1.25}.items()
    assert below(pair, "chosen").facts["response"] == "The moon pulls the sea."
    assert below(pair, "chosen", "base").facts["response"] == "It is water."
    told = {"output_tokens": 4, "finish_reason": "stop", "response": "It is water."}
    assert below(pair, "rejected").facts.items() >= told.items()
    assert "prompt" not in below(pair, "rejected").facts
    assert below(pair, "prompt").facts["prompt"] == "What is a tide?"
    keywords = {"keywords": ["aa11", "moon", "sea"], "paragraph": "About keywords-aa11."}
    assert below(pair, "prompt", "keyword set").facts.items() >= keywords.items()
    base_id = tables["base_responses"]["response_id"][0]
    for other in ("keywords-aa11", row["prompt_id"], row["chosen_response_id"], base_id):
        assert home.trace(other) == [pair]


def test_a_prefix_is_enough_with_and_without_its_kind(home):
    pair_id = home.iteration(1)["preference_pairs"]["pair_id"][0]
    for prefix in (pair_id[:9], pair_id[5:11], f" {pair_id.upper()} "):
        assert home.trace(prefix)[0].id == pair_id
    with pytest.raises(TraceError, match="No id begins"):
        home.trace(pair_id[6:])


def test_an_ambiguous_prefix_lists_what_it_could_be(home):
    home.iteration(1)
    with pytest.raises(TraceError, match=r"2 ids begin with 'aa' \(keywords-aa11, keywords-aa22\): give more of it"):
        home.trace("aa")
    with pytest.raises(TraceError, match=r"^\d+ ids begin with ''.*, …\)"):
        home.trace("")


def test_an_unknown_id_says_what_was_searched(home):
    home.iteration(1)
    with pytest.raises(
        TraceError, match=r"No id begins with 'pair-xyz': searched preference_pairs; ids look like `pair-"
    ):
        home.trace("pair-xyz")
    with pytest.raises(TraceError, match=r"searched base_responses, keyword_pool, .*synthetic_prompts"):
        home.trace("xyz")
    with pytest.raises(TraceError, match="'cat-12' is no id: ids begin with keywords, prompt, response, pair"):
        home.trace("cat-12")


def test_a_home_without_tables(home):
    with pytest.raises(TraceError, match="no table of preference_pairs in this home yet: `synpo run` makes them"):
        home.trace("pair-3f9a")


def test_a_pair_that_was_dropped(home):
    home.iteration(1)
    (pair,) = home.trace(content_id("prompt", DROPPED))
    assert notes([pair]) == [(None, "dropped by a filter, or not sampled")]
    assert [node.kind for node in pair.made_from] == ["refined", "rejected", "prompt"]
    assert below(pair, "refined", "base").facts["response"] == "Air."
    assert "pair (none): dropped by a filter, or not sampled" in home.shown("keywords-aa22")


def test_keywords_that_gave_no_prompt_and_keywords_that_were_never_drawn(home):
    home.iteration(1)
    home.once("keyword_pool", [{"keyword_set_id": "keywords-cc44", "keywords": ["a"], "paragraph": "Never read."}])
    (unused,), (pool,) = home.trace("bb33"), home.trace("cc44")
    assert (unused.table, unused.facts["paragraph"]) == ("keyword_sets[0001]", "About keywords-bb33.")
    assert "none that is valid" in unused.note
    assert (pool.table, pool.note) == ("keyword_pool", "no iteration has drawn it")


@pytest.mark.parametrize(("until", "words"), [
    ("keyword_sets", "no prompt was written from it yet"),
    ("synthetic_prompts", "this iteration has no pairs yet"),
    ("refined_responses", "this iteration has no pairs yet"),
])  # fmt: skip
def test_a_home_that_is_half_finished(home, until, words):
    home.iteration(1, until)
    assert words in home.shown("keywords-aa11")


def test_a_prompt_that_returns_has_a_pair_in_each_iteration(home):
    first, second = home.iteration(1), home.iteration(2, chosen="Gravity.")
    both = home.trace(content_id("prompt", "What is a tide?"))
    assert [(pair.facts["iteration"], below(pair, "chosen").facts["response"]) for pair in both] == [
        (1, "The moon pulls the sea."), (2, "Gravity."),
    ]  # fmt: skip
    for tables, pair in zip((first, second), both, strict=True):
        assert home.trace(tables["preference_pairs"]["pair_id"][0]) == [pair]
    assert home.trace(first["rejected_responses"]["response_id"][0]) == both


def test_rows_that_are_gone_are_named_and_rows_of_a_new_table_do_not_join_an_old_pair(home):
    old = home.iteration(1)["preference_pairs"].row(0, named=True)
    new = home.iteration(1, until="refined_responses", chosen="Another answer.")["refined_responses"]["response_id"][0]
    (of_pair,), (of_response,) = home.trace(old["pair_id"]), home.trace(new)
    gone = "no longer in refined_responses[0001], which was deleted or made again"
    assert notes([below(of_pair, "chosen")]) == [(old["chosen_response_id"], gone)]
    assert below(of_pair, "chosen").facts == {"text": "The moon pulls the sea."}
    assert below(of_pair, "rejected").facts["response"] == "It is water."
    assert notes([of_response]) == [(None, f"{old['pair_id']} was made from other answers to this prompt")]
    assert below(of_response, "refined").facts["response"] == "Another answer."


def test_checkpoints_are_named_by_the_sha_that_rows_record(home):
    home.checkpoint("initial_policy", None, "start")
    home.checkpoint("response_improver", 1, "improver1")
    home.checkpoint("reward_model", None, "scorer")
    (pair,) = home.trace(home.iteration(1)["preference_pairs"]["pair_id"][0])
    for path, checkpoint, sha in (
        (("rejected", "written by"), "initial_policy", "start"),
        (("chosen", "written by"), "response_improver[0001]", "improver1"),
        (("scored by",), "reward_model", "scorer"),
    ):
        model = below(pair, *path)
        assert (model.id, model.facts, model.run_id, model.note) == (checkpoint, {"sha": sha}, f"run of {sha}", None)
    unknown = below(pair, "prompt", "written by")
    assert (unknown.id, unknown.facts) == ("unknown checkpoint", {"sha": "generator"})


def test_a_checkpoint_that_was_replaced_is_named_by_its_own_manifest(home):
    home.iteration(2)
    home.checkpoint("model_checkpoint", 1, "first")
    home.checkpoint("model_checkpoint", 1, "second")
    model = below(home.trace("keywords-aa11")[0], "chosen", "base", "written by")
    assert (model.id, model.facts, model.run_id) == ("model_checkpoint[0001]", {"sha": "first"}, "run of first")
    assert "model_checkpoint[0001]: not a current checkpoint any more, sha=first" in home.shown("keywords-aa11")


def test_a_checkpoint_whose_manifest_was_altered_stops_nothing_that_tells_of_a_pair(home):
    """The pairs may be made again while the checkpoint is."""
    home.checkpoint("response_improver", 1, "improver1")
    pairs = home.iteration(1)["preference_pairs"]
    (manifest,) = home.path.glob("checkpoints/response_improver/0001/*/manifest.json")
    manifest.write_bytes(b'{"sha": "impr')
    context = dg.build_asset_context(instance=home.instance, partition_key="0001")
    told = median_pair(context, home.services, pairs).value
    assert "- **written by** unknown checkpoint: not a current checkpoint any more, sha improver1" in told


def test_forward_to_the_checkpoints_that_were_trained_on_it(home):
    pairs = home.iteration(1)["preference_pairs"]
    home.iteration(2)
    home.iteration(3)
    home.checkpoint("model_checkpoint", 1, "first", {"preference_pairs[0001]": table_version(pairs)})
    home.checkpoint("model_checkpoint", 2, "second", {"preference_pairs[0001]": "before"})
    home.checkpoint("model_checkpoint", 3, "third", {"preference_pairs[0003]": "other"})
    (pair,) = home.trace(pairs["pair_id"][0])
    assert notes(pair.trained) == [
        ("model_checkpoint[0001]", None),
        ("model_checkpoint[0002]", "on an earlier version of preference_pairs[0001]"),
    ]
    assert "trained model_checkpoint[0001]: sha=first, run=run of" in home.shown(pair.id)


def test_a_seed_prompt_and_what_policies_answered(home):
    seed = [{"prompt_id": content_id("prompt", name), "prompt": name, "answer": "Gold.", "split": split, "line": 7}
            for name, split in (("Seed?", "train"), ("Held?", "test"), ("Judged?", "judge"), ("Scored?", "scorer"))
            ]  # fmt: skip
    version = table_version(home.once("seed_pairs", seed))
    home.iteration(1)
    home.iteration(2)
    scores = {"answer_score": pl.lit(2.0), "response_score": pl.lit(0.5), "scorer_sha": pl.lit("scorer")}
    for number, text in ((1, "Mine."), (2, "Mine, later.")):
        answers = home.answers(pl.DataFrame(seed[:1]), [text], "start", number).with_columns(**scores)
        home.write("seed_responses", f"{number:04d}", answers)
        home.checkpoint("response_improver", number, f"improver{number}", {"seed_responses": table_version(answers)})
    home.checkpoint("prompt_generator", None, "generator", {"seed_pairs": version})
    home.checkpoint("judge_model", None, "judge", {"seed_pairs": version})
    home.checkpoint("reward_model", None, "scorer", {"seed_pairs": version})

    pair, first, second = home.trace(seed[0]["prompt_id"])
    assert pair.facts == {"split": "train", "line": 7, "prompt": "Seed?", "answer": "Gold."}
    assert notes(pair.trained) == [("prompt_generator", None)]
    told = {"iteration": 1, "answer_score": 2.0, "response_score": 0.5, "response": "Mine."}
    assert first.facts.items() >= told.items()
    assert second.facts["response"] == "Mine, later."
    assert notes(first.trained + second.trained) == [
        ("response_improver[0001]", None),
        ("response_improver[0002]", None),
    ]
    assert home.trace(first.id) == [pair, first]
    (held_out,) = home.trace(seed[1]["prompt_id"])
    assert (held_out.facts["split"], held_out.trained) == ("test", [])
    (judged,) = home.trace(seed[2]["prompt_id"])
    assert notes(judged.trained) == [("judge_model", None)]
    (scored,) = home.trace(seed[3]["prompt_id"])
    assert notes(scored.trained) == [("reward_model", None)]


def test_an_instruction_of_an_evaluation_is_shown_alone(home):
    row = {"prompt_id": content_id("prompt", "Name a fruit."), "prompt": "Name a fruit.", "split": "test"}
    home.once("verifiable_instructions", [row])
    (node,) = home.trace(row["prompt_id"])
    assert (node.table, node.facts["prompt"]) == ("verifiable_instructions", "Name a fruit.")


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_never_tears_name_and_value_apart(home, width):
    home.checkpoint("reward_model", None, "scorer")
    (pair,) = home.trace(home.iteration(1)["preference_pairs"]["pair_id"][0])
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(as_tree([pair]))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    for name, value in (("margin", "1.250"), ("chosen_score", "1.500"), ("rejected_score", "0.250"), ("sha", "scorer")):
        assert any(f"{name}={value}" in line for line in lines), name


def test_the_median_pair_is_told_with_links_before_it_is_stored(home):
    home.checkpoint("response_improver", 1, "improver1")
    text = "The `moon`\n![pulls](http://elsewhere) **the** sea."
    pairs = home.iteration(1, chosen=text)["preference_pairs"]
    (home.path / "tables" / "preference_pairs" / "0001.parquet").unlink()
    context = dg.build_asset_context(instance=home.instance, partition_key="0001")
    lines = median_pair(context, home.services, pairs).value.splitlines()
    told = "[preference_pairs[0001]](/assets/preference_pairs?view=partitions&partition=0001)"
    assert lines[0] == (
        f"- **pair** {pairs['pair_id'][0]}: chosen_score 1.500, rejected_score 0.250, margin 1.250, score_convention "
        f"reward_difference, chosen_finish_reason stop, rejected_finish_reason stop, iteration 1, {told}"
    )
    improver = "[response_improver[0001]](/assets/response_improver?view=partitions&partition=0001)"
    assert f"    - **written by** {improver}: sha improver1, run [run of i](/runs/run of improver1)" in lines
    # Between quotes that it does not hold, a text is shown and does nothing.
    assert "    - response: `` The `moon` ![pulls](http://elsewhere) **the** sea. ``" in lines
    assert "    - **keyword set** keywords-aa11: keywords aa11, moon, sea, iteration 1, " in "\n".join(lines)


def test_text_is_shown_and_never_obeyed(home):
    home.iteration(1, chosen="[red]a[/red] \x1b[31mb\x9b\u202e\r" + "long " * 200)
    shown = home.shown("keywords-aa11")
    assert "[red]a[/red] ⟨U+001B⟩[31mb⟨U+009B⟩⟨U+202E⟩⟨U+000D⟩" in shown
    assert not {"\x1b", "\x9b", "\u202e", "\r"} & set(shown)
    assert shown.count("long") < 100
    assert "…" in shown
    whole = json.loads(json.dumps([dataclasses.asdict(node) for node in home.trace("keywords-aa11")]))
    assert (
        next(made for made in whole[0]["made_from"] if made["kind"] == "chosen")["facts"]["response"].count("long")
        == 200
    )


def test_every_pair_of_a_real_home_traces(nano_run):
    services = services_in(nano_run.home)
    tables = services.tables
    both = [("model_checkpoint[0001]", None), ("model_checkpoint[0002]", None)]
    with DagsterInstance.from_config(str(nano_run.home)) as instance:
        for key, policy, trained in (
            ("0001", "initial_policy", both),
            ("0002", "model_checkpoint[0001]", both[1:]),
        ):
            for pair_id in tables.read("preference_pairs", key)["pair_id"]:
                (pair,) = trace(services, instance, pair_id)
                assert notes(pair.trained) == trained
                makers = {("scored by",): "reward_model", ("chosen", "written by"): f"response_improver[{key}]",
                          ("chosen", "base", "written by"): policy, ("rejected", "written by"): "initial_policy",
                          ("prompt", "written by"): "prompt_generator"}  # fmt: skip
                assert {path: below(pair, *path).id for path in makers} == makers
                rows = [pair, below(pair, "chosen", "base"), below(pair, "prompt", "keyword set"), *pair.made_from]
                assert all(instance.get_run_by_id(node.run_id) for node in [*rows, *pair.trained])


def test_the_command_line(nano_run, tmp_path):
    pair_id = ParquetTables(str(nano_run.home / "tables")).read("preference_pairs", "0001")["pair_id"][0]
    printed = synpo_here("trace", pair_id, "--home", nano_run.home)
    assert printed.returncode == 0, printed.stderr
    assert "trained model_checkpoint[0001]" in printed.stdout
    assert "trained model_checkpoint[0002]" in printed.stdout
    as_json = synpo_here("trace", pair_id[:12], "--json", "--home", nano_run.home)
    assert [pair["id"] for pair in json.loads(as_json.stdout)] == [pair_id]
    for refused, words in (
        (synpo_here("trace", "pair-nothing", "--home", nano_run.home), "No id begins with 'pair-nothing'"),
        (synpo_here("trace", pair_id, "--home", tmp_path / "nowhere"), "is not the home of an experiment"),
    ):
        assert refused.returncode == 2
        assert words in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()
