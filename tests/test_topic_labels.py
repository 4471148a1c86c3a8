"""Topics and intentions that a server names: what it is asked, what counts, what is kept, and what the asset shows."""

import json
import re
import threading
from types import SimpleNamespace

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.common.errors import FinalError
from resources.judging.topic_labeler import LABELS, TopicLabeler
from resources.settings.evaluation import JudgeServer
from synpo_assets.graph.evaluation_schemas import PromptDiversity
from synpo_assets.graph.tables import check
from synpo_assets.method.diversity import label_counts, label_coverage
from synpo_assets.method.word_order import answerable_shares
from tests.stand_ins import instance as instance
from tests.test_diversity import PROMPTS, diversity
from tests.test_server_engine import FaultyServer

pytestmark = pytest.mark.usefixtures("short_pauses")

LISTS = yaml.safe_load(LABELS.read_text())
ASKED = ["How do I tune a guitar?", "Is this contract valid?", "Hm."]


def labels(topic, intention="get advice", answerable=True):
    return json.dumps({"topic": topic, "intention": intention, "answerable": answerable})


def by_word(prompt):
    topic = "music" if "guitar" in prompt else "law and regulation"
    return labels(topic, answerable="guitar" in prompt) if prompt != "Hm." else "I do not know."


class LabelServer(FaultyServer):
    """Answers as `judge` does, a function of the prompt shown."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge

    def reply(self, body):
        shown = re.search(r"<request>\n(.*)\n</request>", body["messages"][0]["content"], re.DOTALL).group(1)
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        return {"choices": [{"index": 0, "message": {"content": self.judge(shown)}}], "usage": usage}


@pytest.fixture
def serve():
    servers = []

    def serve(judge=by_word):
        servers.append(LabelServer(judge))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def labeler(server, folder, shard_rows=256, **options):
    return TopicLabeler(JudgeServer(url=server.url, model="judge", **options), str(folder), shard_rows)


def test_the_lists_have_as_many_entries_as_the_papers_and_none_twice():
    assert {kind: len(set(entries)) for kind, entries in LISTS.items()} == {"topics": 30, "intentions": 40}
    assert [len(entries) for entries in LISTS.values()] == [30, 40]


def test_each_different_prompt_is_asked_once_with_a_schema_of_both_lists(serve, tmp_path):
    server = serve()
    named, usage = labeler(server, tmp_path).label_prompts([*ASKED[:2], ASKED[0]])
    assert [label["topic"] for label in named] == ["music", "law and regulation", "music"]
    assert (usage.readings, usage.reused, usage.tokens) == (2, 0, 200)
    assert len(server.bodies) == 2
    for body in server.bodies:
        schema = body["response_format"]["json_schema"]
        assert (schema["name"], schema["strict"], body["temperature"]) == ("label", True, 0)
        properties = schema["schema"]["properties"]
        assert properties.pop("answerable")["type"] == "boolean"
        allowed = {name: field["enum"] for name, field in properties.items()}
        assert allowed == {"topic": LISTS["topics"], "intention": LISTS["intentions"]}
        assert schema["schema"]["additionalProperties"] is False
        text = body["messages"][0]["content"]
        assert all(f"- {entry}\n" in text for entries in LISTS.values() for entry in entries)


@pytest.mark.parametrize("nonsense", [
    "It is about music.", "", None, labels("jazz"), labels("music", "hum along"), '{"topic": "music"}', "[1",
    '{"topic": "music", "intention": "get advice", "answerable": true, "sure": true}',
    '{"topic": "music", "intention": "get advice"}', labels("music", answerable="true"), labels("music", answerable=1),
])  # fmt: skip
def test_nonsense_is_counted_and_left_out(serve, tmp_path, said, nonsense):
    named, _ = labeler(serve(lambda prompt: nonsense), tmp_path).label_prompts(ASKED)
    assert named == [None] * 3
    assert any("3 of 3 replies of judge (on a server) are no label and are left out" in line for line in said)


def test_nonsense_is_asked_for_again_by_the_next_run(serve, tmp_path):
    labeler(serve(lambda prompt: "Hm." if "guitar" in prompt else labels("music")), tmp_path).label_prompts(ASKED)
    mended = serve(lambda prompt: labels("music"))
    named, usage = labeler(mended, tmp_path).label_prompts(ASKED)
    assert named == [json.loads(labels("music"))] * 3
    assert len(mended.bodies) == usage.readings - usage.reused == sum("guitar" in prompt for prompt in ASKED) > 0


def test_finished_labels_are_read_again_even_while_the_server_is_down(serve, tmp_path):
    server = serve()
    server.faults = [None, None, (401, {}, "enough")]
    with pytest.raises(FinalError, match="enough"):
        labeler(server, tmp_path, shard_rows=1, concurrency=1).label_prompts(ASKED)
    named, usage = labeler(server, tmp_path).label_prompts(ASKED)
    assert (usage.reused, usage.readings) == (2, 3)
    gone = SimpleNamespace(url="http://127.0.0.1:1/v1")
    assert labeler(gone, tmp_path).label_prompts(ASKED[:2])[0] == named[:2]


LABEL = st.fixed_dictionaries(
    {"topic": st.sampled_from("abc"), "intention": st.sampled_from("xy"), "answerable": st.booleans()}
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["seed", "synthetic"]), st.lists(st.none() | LABEL, max_size=9), min_size=1))
def test_coverage_and_counts_agree(labelled):
    rows, counts = label_coverage(labelled), label_counts(labelled)
    for row in answerable_shares(labelled):
        known = [label["answerable"] for label in labelled[row["source"]] if label is not None]
        assert row["answerable_share"] == (sum(known) / len(known) if known else None)
        assert not known or row["answerable_low"] <= row["answerable_share"] <= row["answerable_high"]
    for row in rows:
        own = labelled[row["source"]]
        assert row["labelled"] + row["not_labelled"] == len(own)
        for kind in ("topic", "intention"):
            found = [count[row["source"]] for count in counts if count["kind"] == kind]
            assert sum(found) == row["labelled"] == sum(label is not None for label in own)
            assert sum(count > 0 for count in found) == row[f"{kind}s"]
            most = pl.Series([max(row[f"{kind}s"], 1)]).log().item()
            assert 0 <= row[f"{kind}_entropy"] <= most + 1e-9


def test_the_asset_shows_what_each_source_covers(serve, instance, tmp_path, nano_model):
    judge = JudgeServer(url=serve().url, model="judge")
    frame, measured, about = diversity(instance, tmp_path, [ASKED[0], *ASKED], PROMPTS[:8], judge=judge, sample_size=4)
    assert check(PromptDiversity, frame) is None
    names = ("topics", "intentions", "not_labelled", "intention_entropy")
    assert [measured.value(name, "synthetic") for name in names] == [2, 1, 1, 0.0]
    assert measured.value("topic_entropy", "synthetic") == pytest.approx(0.6365, abs=1e-4)
    answerable = measured.find("answerable_share", "synthetic")
    assert (answerable.value, answerable.n) == (pytest.approx(2 / 3), 3)
    assert frame.filter(source="synthetic")["answerable_share"].item() == pytest.approx(2 / 3, abs=1e-4)
    assert about["labelled_by"] == "judge (on a server)"
    assert {row.data["source"]: row.data["labelled"] for row in about["label_coverage"].records} == {
        "synthetic": 3, "seed": 4, "self_instruct": 4,
    }  # fmt: skip
    counts = {row.data["label"]: row.data["synthetic"] for row in about["label_counts"].records}
    assert counts == {"law and regulation": 1, "music": 2, "get advice": 3}
    assert measured.value("readings") == 3 + 8
