"""Scorers: reward models and pair rankers made here with random weights, and what the assets make of their scores."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from resources.common.errors import FinalError, ModelSourceError
from resources.models.chat import load_tokenizer
from resources.scoring.pair_ranker import PairRanker
from resources.scoring.published import fetch_reward_model
from resources.scoring.scorer import RewardScorer
from resources.settings.machine import Engine
from resources.settings.method import PairRankerScorer, PretrainedScorer, TrainedScorer
from resources.settings.training import Training, TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint, CheckpointStore
from resources.training.trainer import Trainer
from synpo_assets.graph.metrics import recorded
from synpo_assets.graph.schemas import PreferencePairs
from synpo_assets.graph.tables import check
from synpo_assets.method.ids import content_id
from synpo_assets.stages.preferences import preference_pairs
from tests.nano import active_settings, seed_rows
from tests.stand_ins import ITERATIONS, run, services_in, shown, without_rules
from tests.stand_ins import instance as instance

ROWS = seed_rows()[:8]
NONSENSE = "zz qq zz qq"
AGAINST_NONSENSE = [(row["prompt"], row["answer"], NONSENSE) for row in ROWS]
TEXTS = [f"{row['prompt']} {row['answer']}" for row in seed_rows()]
# As the reward model gives them one after the other, and a pair ranker together.
PAIRS = [(row["prompt"], row["answer"], other["answer"]) for row, other in itertools.pairwise(ROWS)]


def as_checkpoint(directory, sha="x"):
    return Checkpoint("reward_model", None, sha, str(directory), str(directory))


TRAINING = Training(learning_rate=1e-2, epochs=6, batch_size=4, micro_batch_size=4, max_length=400,
                    lora={"rank": 4, "alpha": 8}, scheduler="constant", warmup_ratio=0)  # fmt: skip
SECTIONS = {
    "trained": lambda **options: TrainedScorer(training=TRAINING, **options),
    "pretrained": lambda **options: PretrainedScorer(name="some/model", **options),
    "pair_ranker": lambda **options: PairRankerScorer(name="some/ranker", **options),
}


def scorer(shards, kind="pretrained", max_length=400, options=None, **engine):
    section = SECTIONS[kind](max_length=max_length, **(options or {}))
    return RewardScorer(
        shards=str(shards),
        engine=Engine(**{"threads": 1, "device": "cpu", "dtype": "float32"} | engine),
        scorer=section,
    )


def pair_scorer(shards, pair_convention="mean_of_both_orders", **options):
    return scorer(shards, "pair_ranker", options={"pair_convention": pair_convention}, **options)


@pytest.fixture(scope="module")
def pairrm(tmp_path_factory):
    """A PairRM of two thin layers: DeBERTa v3's kind of attention, its kind of tokenizer, random weights."""
    import torch
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import DebertaV2Config, DebertaV2Tokenizer

    from resources.scoring.pairrm import PairRM

    pieces = Tokenizer(models.Unigram())
    pieces.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    pieces.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=500, special_tokens=specials, unk_token="[UNK]", show_progress=False)
    )
    vocabulary = [tuple(piece) for piece in json.loads(pieces.to_str())["model"]["vocab"]]
    tokenizer = DebertaV2Tokenizer(vocab=vocabulary, unk_id=3)
    tokenizer.add_tokens(["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"])
    torch.manual_seed(0)
    names = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
    ids = tokenizer.convert_tokens_to_ids(["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"])
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, position_biased_input=False, relative_attention=True, position_buckets=16,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0,
        initializer_range=0.5, n_tasks=1, drop_out=0.05, **dict(zip(names, ids, strict=True)),
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("models") / "pairrm"
    PairRM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def copy_of(model, place):
    return Path(shutil.copytree(model, place))


def test_the_reward_model_learns_to_tell_gold_from_nonsense(tmp_path, nano_checkpoint):
    trainer = Trainer(
        engine=Engine(threads=1, dtype="float32"),
        random_seed=1,
        processes=TrainingProcesses(),
        states=str(tmp_path / "training"),
    )
    summary = trainer.train("reward", nano_checkpoint, AGAINST_NONSENSE, TRAINING, tmp_path / "trained")
    assert summary.history[-1]["loss"] < 0.5 < summary.history[0]["loss"]
    compared = scorer(tmp_path / "shards", "trained").compare(
        as_checkpoint(tmp_path / "trained" / "merged"), AGAINST_NONSENSE
    )
    assert compared.usage.answers_cut == 0
    assert (compared.margins > 0).all()


def test_a_reward_model_scores_each_different_answer_once(tmp_path, classifier):
    rows = [("a", "yes", "no"), ("a", "no", "yes"), ("a", "yes", "yes"), ("b", "yes", "no")]
    compared = scorer(tmp_path).compare(as_checkpoint(classifier), rows)
    assert compared.usage.readings == 4
    assert compared.convention == "reward_difference"
    first, second = compared.first_scores.to_list(), compared.second_scores.to_list()
    assert first[0] == second[1] == first[2] == second[2] != first[3]
    assert second[0] == first[1]
    assert compared.margins.to_list() == [a - b for a, b in zip(first, second, strict=True)]


def test_a_reward_is_the_classifiers_logit_at_the_end_of_the_answer(tmp_path, classifier):
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokenizer = load_tokenizer(str(classifier))
    prompt, answer, _ = PAIRS[0]
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    with torch.no_grad():
        logit = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()
    compared = scorer(tmp_path).compare(as_checkpoint(classifier), PAIRS)
    assert compared.first_scores[0] == pytest.approx(logit, abs=1e-4)


@pytest.mark.parametrize("kind", ["pretrained", "pair_ranker"])
def test_a_score_does_not_depend_on_its_batch(tmp_path, classifier, pairrm, kind):
    model = as_checkpoint(pairrm if kind == "pair_ranker" else classifier)
    together = scorer(tmp_path / "a", kind).compare(model, PAIRS)
    alone = scorer(tmp_path / "b", kind, batch_tokens=64).compare(model, PAIRS)
    assert together.margins.n_unique() == len(PAIRS)
    assert alone.first_scores.to_list() == pytest.approx(together.first_scores.to_list(), abs=1e-4)
    assert alone.second_scores.to_list() == pytest.approx(together.second_scores.to_list(), abs=1e-4)


@pytest.mark.parametrize("kind", ["pretrained", "pair_ranker"])
def test_long_texts_are_cut_and_counted(tmp_path, classifier, pairrm, kind):
    model = as_checkpoint(pairrm if kind == "pair_ranker" else classifier)
    long = "word " * 400
    rows = [("short", "yes", "no"), ("short", "yes", long), (long, "yes", "no")]
    usage = scorer(tmp_path, kind).compare(model, rows).usage
    # A reward model that sees a part of the prompt only sees nothing of the answers.
    assert (usage.prompts_cut, usage.answers_cut) == (1, 1 if kind == "pair_ranker" else 3)
    assert usage.tokens < usage.readings * 400
    longer = scorer(tmp_path, kind, max_length=4000).compare(model, rows).usage
    assert (longer.prompts_cut, longer.answers_cut) == (0, 0)
    assert longer.tokens > usage.tokens


def test_the_head_reads_the_tokens_that_open_prompt_and_answers(tmp_path, pairrm):
    """The published definition, step by step: encoder, the three opening tokens, linear, tanh, linear."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer, DebertaV2Model

    weights = load_file(pairrm / "model.safetensors")
    config = AutoConfig.from_pretrained(pairrm)
    encoder = DebertaV2Model(config).eval()
    prefix = "pretrained_model."
    encoder.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
    tokenizer = AutoTokenizer.from_pretrained(pairrm)
    prompt, first, second = PAIRS[0]
    ids = tokenizer.encode("<|source|>" + prompt) + tokenizer.encode("<|candidate1|>" + first)
    ids = torch.tensor([ids + tokenizer.encode("<|candidate2|>" + second)])
    with torch.no_grad():
        encoded = encoder(ids).last_hidden_state[0]
    opening = [encoded[ids[0].tolist().index(mark)]
               for mark in (config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id)]  # fmt: skip

    def head(answer):
        hidden = torch.tanh(
            weights["head_layer.1.weight"] @ torch.cat([opening[0], answer]) + weights["head_layer.1.bias"]
        )
        return (weights["head_layer.4.weight"] @ hidden + weights["head_layer.4.bias"]).item()

    compared = pair_scorer(tmp_path, "one_order").compare(as_checkpoint(pairrm), PAIRS[:1])
    assert compared.first_scores[0] == pytest.approx(head(opening[1]), abs=1e-4)
    assert compared.second_scores[0] == pytest.approx(head(opening[2]), abs=1e-4)


def test_scores_of_a_pair_ranker_in_half_precision_are_not_rounded_to_it(tmp_path, pairrm):
    import torch

    compared = pair_scorer(tmp_path, dtype="bfloat16").compare(as_checkpoint(pairrm), PAIRS)
    scores = torch.tensor(compared.first_scores.to_list())
    assert (scores.bfloat16().float() != scores).any()
    exact = pair_scorer(tmp_path).compare(as_checkpoint(pairrm), PAIRS)
    assert compared.margins.to_list() == pytest.approx(exact.margins.to_list(), abs=0.2)


def test_the_conventions_of_a_pair_ranker(tmp_path, pairrm):
    model = as_checkpoint(pairrm)
    exchanged = [(prompt, second, first) for prompt, first, second in PAIRS]
    found = {}
    for convention in ("mean_of_both_orders", "sum_of_both_orders", "one_order"):
        one, other = (pair_scorer(tmp_path, convention).compare(model, rows) for rows in (PAIRS, exchanged))
        assert one.convention == convention
        assert one.usage.readings == (len(PAIRS) if convention == "one_order" else 2 * len(PAIRS))
        found[convention] = one.margins.to_list(), other.margins.to_list()
        mirrored = one.first_scores.to_list() == pytest.approx(other.second_scores.to_list(), abs=1e-6)
        assert mirrored == (convention != "one_order")
    (mean, mean_exchanged), (total, _), (once, once_exchanged) = found.values()
    assert mean == pytest.approx([-margin for margin in mean_exchanged], abs=1e-6)
    assert total == pytest.approx([2 * margin for margin in mean], abs=1e-6)
    assert mean == pytest.approx([(a - b) / 2 for a, b in zip(once, once_exchanged, strict=True)], abs=1e-6)


def test_equal_answers_tie_in_both_orders_only(tmp_path, pairrm):
    same = [("Which one?", "This one.", "This one.")]
    assert pair_scorer(tmp_path).compare(as_checkpoint(pairrm), same).margins[0] == 0
    assert pair_scorer(tmp_path, "one_order").compare(as_checkpoint(pairrm), same).margins[0] != 0


def test_a_text_that_quotes_the_opening_tokens_changes_nothing_else(tmp_path, pairrm):
    reading = PairRanker(str(pairrm), Engine(threads=1, device="cpu", dtype="float32"), 400).read(
        "k", "Explain <|candidate1|>.", ["<|source|> opens the prompt.", "No <|candidate2|> idea."]
    )
    opening = load_tokens(pairrm, ["<|source|>", "<|candidate1|>", "<|candidate2|>"])
    assert [reading.token_ids[mark] for mark in reading.marks] == opening
    closings = [place for place, token in enumerate(reading.token_ids) if token == load_tokens(pairrm, ["[SEP]"])[0]]
    assert reading.marks[1] > closings[0] > reading.marks[0]
    assert reading.marks[2] > closings[1] > reading.marks[1]


def load_tokens(directory, tokens):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids(tokens)


def test_a_pair_ranker_is_fetched_without_a_chat_template(pairrm):
    directory, origin = fetch_reward_model(PairRankerScorer(name=str(pairrm)), trust_remote_code=False)
    assert directory == pairrm
    assert origin["source"] == "directory"


def test_what_is_no_pair_ranker_is_refused(tmp_path, pairrm, nano_model):
    with pytest.raises(FinalError, match=r"holds no PairRM: it is no DeBERTa.*scorer\.name"):
        fetch_reward_model(PairRankerScorer(name=str(nano_model)), trust_remote_code=False)
    other_ids = copy_of(pairrm, tmp_path / "other_ids")
    config = json.loads((other_ids / "config.json").read_text())
    (other_ids / "config.json").write_text(json.dumps(config | {"cand2_prefix_id": 7}))
    with pytest.raises(FinalError, match=r"<\|candidate2\|> is not one token with the id that its config states"):
        fetch_reward_model(PairRankerScorer(name=str(other_ids)), trust_remote_code=False)
    pickled = copy_of(pairrm, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match=r"no \.safetensors file"):
        fetch_reward_model(PairRankerScorer(name=str(pickled)), trust_remote_code=False)
    damaged = copy_of(pairrm, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    with pytest.raises(ModelSourceError, match="cannot be loaded"):
        fetch_reward_model(PairRankerScorer(name=str(damaged)), trust_remote_code=False)
    with pytest.raises(ModelSourceError, match=r"holds no config\.json.*scorer\.name"):
        fetch_reward_model(PairRankerScorer(name=str(tmp_path)), trust_remote_code=False)
    with pytest.raises(FinalError, match=r"scorer\.max_length is 16.*at least 32"):
        pair_scorer(tmp_path / "shards", max_length=16).compare(as_checkpoint(pairrm), PAIRS)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_weights_that_are_not_exactly_those_of_pairrm_are_refused(tmp_path, pairrm, fault):
    from safetensors.torch import load_file, save_file

    other = copy_of(pairrm, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    if fault == "missing":
        del weights["head_layer.4.bias"]
    elif fault == "unexpected":
        weights["head_layer.7.bias"] = weights["head_layer.4.bias"].clone()
    else:
        weights["head_layer.1.bias"] = weights["head_layer.1.bias"][:3].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FinalError, match=rf"not those of PairRM: 1 {fault}, such as .*head_layer.*scorer\.name"):
        pair_scorer(tmp_path / "shards").compare(as_checkpoint(other), PAIRS)


@pytest.mark.slow
def test_pairrm_gives_the_numbers_that_its_authors_print(tmp_path):
    """The example in LLM-Blender's README; runs where the model was downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = snapshot_download("llm-blender/PairRM-hf", local_files_only=True)
    except LocalEntryNotFoundError:
        pytest.skip("llm-blender/PairRM-hf is not on this machine")
    rows = [("hello!", "hi!", "f**k off!"), ("I love you!", "I hate you!", "I love you, too!")]
    once = pair_scorer(tmp_path, "one_order", max_length=2048).compare(as_checkpoint(directory), rows)
    assert once.margins.to_list() == pytest.approx([1.9003, -1.2547], abs=1e-2)


CUSTOM_CODE = """
import torch
from transformers import PreTrainedModel, LlamaConfig
from transformers.modeling_outputs import SequenceClassifierOutput
{extra}

class CountingRewardModel(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, input_ids, attention_mask):
        return SequenceClassifierOutput(logits=attention_mask.sum(-1) * self.weight)
"""


def custom_reward_model(directory, nano_model, extra=""):
    """A reward model that brings code of its own, as ArmoRM does: it counts tokens."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    load_tokenizer(str(nano_model)).save_pretrained(directory)
    name = f"counting_{directory.name}"
    (directory / f"{name}.py").write_text(CUSTOM_CODE.format(extra=extra))
    config = json.loads((nano_model / "config.json").read_text()) | {
        "architectures": ["CountingRewardModel"],
        "auto_map": {"AutoModelForSequenceClassification": f"{name}.CountingRewardModel"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.tensor([2.0])}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Transformers copies a model's code to this place before it imports it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])


@pytest.mark.usefixtures("modules_cache")
def test_a_reward_model_with_code_of_its_own_is_loaded_only_when_that_is_allowed(tmp_path, nano_model):
    directory = custom_reward_model(tmp_path / "own_code", nano_model)
    asked = PretrainedScorer(name=str(directory))
    with pytest.raises(ModelSourceError, match=r"brings Python code of its own.*engine\.trust_remote_code"):
        fetch_reward_model(asked, trust_remote_code=False)
    assert fetch_reward_model(asked, trust_remote_code=True)[0] == directory
    trusting = scorer(tmp_path / "shards", trust_remote_code=True)
    compared = trusting.compare(as_checkpoint(directory), [("a", "yes", "yes, of course it is")])
    assert compared.first_scores[0] + compared.second_scores[0] == 2 * compared.usage.tokens
    # Not allowed, transformers takes its own Llama in place of that code, with weights drawn at random.
    with pytest.raises(FinalError, match="no weights for model"):
        scorer(tmp_path / "other").compare(as_checkpoint(directory), [("a", "b", "c")])


@pytest.mark.usefixtures("modules_cache")
def test_code_that_does_not_run_here_is_found_before_anything_is_scored(tmp_path, nano_model):
    """ArmoRM's code imports a name that transformers 5 does not have any more."""
    gone = "from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING"
    directory = custom_reward_model(tmp_path / "outdated", nano_model, gone)
    with pytest.raises(ModelSourceError, match=r"does not run with transformers 5.*LLAMA_INPUTS_DOCSTRING"):
        fetch_reward_model(PretrainedScorer(name=str(directory)), trust_remote_code=True)


def test_a_published_reward_model_without_pad_token_scores_batches(tmp_path, classifier):
    published = copy_of(classifier, tmp_path / "published")
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    compared = scorer(tmp_path / "shards").compare(as_checkpoint(published), PAIRS)
    assert compared.first_scores.n_unique() == len(PAIRS)


def test_a_classifier_with_several_outputs_is_no_scorer(tmp_path, nano_model):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(nano_model, num_labels=3).save_pretrained(tmp_path)
    load_tokenizer(str(nano_model)).save_pretrained(tmp_path)
    with pytest.raises(FinalError, match=r"gives 3 numbers per answer.*scorer\.name"):
        scorer(tmp_path / "shards").compare(as_checkpoint(tmp_path), PAIRS)


def test_a_language_model_is_no_scorer(tmp_path, nano_model):
    """Its classifier head would be drawn at random."""
    with pytest.raises(FinalError, match=r"no weights for score\.weight, so it is no reward model"):
        scorer(tmp_path).compare(as_checkpoint(nano_model), PAIRS)


def test_finished_scores_are_found_again_and_only_the_rest_is_done(tmp_path, pairrm, said):
    part = pair_scorer(tmp_path, shard_rows=3).compare(as_checkpoint(pairrm), PAIRS[:3])
    assert part.usage.reused == 0
    assert len(list(tmp_path.glob("*/*.parquet"))) == 2
    assert said[-1].startswith("6 of 6 scores, ")
    assert said[-1].endswith("tokens/s, 0 s left.")
    whole = pair_scorer(tmp_path, shard_rows=3).compare(as_checkpoint(pairrm), PAIRS)
    assert whole.usage.reused == 6
    assert whole.first_scores.head(3).equals(part.first_scores)
    again = pair_scorer(tmp_path, "one_order").compare(as_checkpoint(pairrm), PAIRS)
    assert again.usage.reused == again.usage.readings, "the convention decides what is done with scores, not the scores"


def test_scores_of_other_settings_never_mix(tmp_path, classifier):
    variants = [
        (scorer(tmp_path), "x"),
        (scorer(tmp_path), "y"),
        (scorer(tmp_path, max_length=300), "x"),
        (scorer(tmp_path, dtype="bfloat16"), "x"),
        (scorer(tmp_path, attention="eager"), "x"),
        (scorer(tmp_path, "trained"), "x"),
    ]
    for variant, sha in variants:
        assert variant.compare(as_checkpoint(classifier, sha), PAIRS[:2]).usage.reused == 0
    folders = {variant.shards_of(as_checkpoint(classifier, sha)).folder for variant, sha in variants}
    assert {folder.name for folder in folders} == {folder.name for folder in tmp_path.iterdir()}
    assert len(folders) == len(variants)


KILLED = """
import sys, time
from resources.storage.checkpoint_store import Checkpoint
from resources.scoring.reward_model import RewardModel
from tests.test_scorer import PAIRS, scorer
score = RewardModel.score
def slow(self, readings):
    time.sleep(0.5)
    return score(self, readings)
RewardModel.score = slow
scorer(sys.argv[2], shard_rows=2, batch_tokens=64).compare(Checkpoint("reward_model", None, "x", sys.argv[1], ""), PAIRS)
"""


@pytest.mark.slow
def test_a_killed_scoring_goes_on_where_it_was(tmp_path, classifier):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(classifier), str(tmp_path)])
    end = time.monotonic() + 120
    while not list(tmp_path.glob("*/*.parquet")) and time.monotonic() < end:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = sum(pl.read_parquet(file).height for file in tmp_path.glob("*/*.parquet"))
    compared = scorer(tmp_path).compare(as_checkpoint(classifier), PAIRS)
    undisturbed = scorer(tmp_path / "new").compare(as_checkpoint(classifier), PAIRS)
    assert 0 < compared.usage.reused == finished < compared.usage.readings
    assert compared.margins.to_list() == pytest.approx(undisturbed.margins.to_list(), abs=1e-4)


@pytest.mark.parametrize("shard_rows", [2, 256])
def test_too_little_memory_is_said_with_the_settings_to_lower(tmp_path, classifier, monkeypatch, shard_rows):
    import torch
    from transformers import LlamaForSequenceClassification

    whole = LlamaForSequenceClassification.forward
    batches = []

    def full_at_the_third(self, *arguments, **options):
        batches.append(options["input_ids"].shape)
        if len(batches) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", full_at_the_third)
    small = scorer(tmp_path, shard_rows=shard_rows, batch_tokens=64)
    with pytest.raises(FinalError, match=r"Tried to allocate .* Lower engine\.batch_tokens or scorer\.max_length"):
        small.compare(as_checkpoint(classifier), PAIRS)
    assert small.compare(as_checkpoint(classifier), PAIRS).usage.reused == 2


def answers(prompts, sha, texts):
    ids = [content_id("response", prompt, sha, text) for prompt, text in zip(prompts, texts, strict=True)]
    return pl.DataFrame({
        "response_id": ids, "prompt_id": [content_id("prompt", prompt) for prompt in prompts], "prompt": prompts,
        "response": texts, "iteration": 1, "checkpoint_sha": sha, "input_tokens": 5, "output_tokens": 5,
        "finish_reason": "stop",
    })  # fmt: skip


def test_the_pairs_of_an_iteration_are_those_that_a_pair_ranker_prefers(instance, tmp_path, pairrm):
    prompts = [prompt for prompt, _, _ in PAIRS]
    texts = {"refined_responses": [row[1] for row in PAIRS], "rejected_responses": [row[2] for row in PAIRS]}

    def stand_in(name):
        @dg.asset(name=name, partitions_def=ITERATIONS, io_manager_key="tables")
        def made():
            return answers(prompts, name, texts[name])

        return made

    @dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
    def synthetic_prompts():
        return without_rules(pl.DataFrame({"prompt_id": [content_id("prompt", prompt) for prompt in prompts]}))

    @dg.asset(partitions_def=ITERATIONS, io_manager_key="tables")
    def preference_history():
        return pl.DataFrame(schema={name: c.dtype.type for name, c in PreferencePairs.to_schema().columns.items()})

    @dg.asset(io_manager_key="checkpoints")
    def reward_model(context: dg.AssetExecutionContext, checkpoints: dg.ResourceParam[CheckpointStore]):
        asked = PairRankerScorer(name=str(pairrm))
        return checkpoints.adopt(context, *fetch_reward_model(asked, trust_remote_code=False))

    settings = active_settings()
    preferences = settings.preferences.model_copy(update={"margin_threshold": 0.0})
    services = services_in(tmp_path, settings.model_copy(update={"preferences": preferences}))
    services = dataclasses.replace(services, scorer=pair_scorer(tmp_path / "shards", "sum_of_both_orders"))
    result = run(
        [*map(stand_in, texts), synthetic_prompts, preference_history, reward_model, preference_pairs],
        instance,
        services,
        "0001",
    )
    pairs = result.output_for_node("preference_pairs")
    assert check(PreferencePairs, pairs) is None
    direct = services.scorer.compare(result.output_for_node("reward_model"), PAIRS)
    wanted = dict(zip(texts["refined_responses"], direct.margins.to_list(), strict=True))
    found = {row["chosen"][0]["content"]: row["margin"] for row in pairs.to_dicts()}
    assert found == {text: margin for text, margin in wanted.items() if margin > 0}
    assert 0 < len(found) < len(PAIRS)
    assert pairs["score_convention"].unique().to_list() == ["sum_of_both_orders"]
    assert shown(instance, "preference_pairs", "0001")["score_convention"] == "sum_of_both_orders"
    measured = recorded(services.metrics, "0001")
    assert measured.value("readings", asset="preference_pairs") == 2 * len(PAIRS)
    assert measured.value("candidate_pairs") == len(PAIRS)
