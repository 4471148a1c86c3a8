import re
import time

import pytest
import yaml
from pydantic import BaseModel

from resources.settings.data import EmbeddingModel, InitialPolicy, ModelSource
from resources.settings.evaluation import PretrainedJudge
from resources.settings.files import PRESETS, load_settings, preset_path
from resources.settings.method import PretrainedScorer
from resources.settings.sections import SettingsError
from resources.settings.settings import Settings
from resources.settings.training import DPO, SimPO
from synpo_assets.stages.prompts import prompt_sampling
from tests.nano import write_settings


@pytest.mark.parametrize("name", ["laptop", "single_gpu", "paper_mistral", "paper_llama3"])
def test_presets_load(name):
    assert load_settings(preset_path(name)).preset == name


def test_every_setting_is_described():
    def undescribed(section, prefix=""):
        for name, field in section.model_fields.items():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
            for kind in nested:
                assert kind.__doc__
                yield from undescribed(kind, f"{prefix}{name}.")
            # Which variant of a section it is: the section's own text says that.
            if not (nested or field.description or name == "kind"):
                yield prefix + name

    assert list(undescribed(Settings)) == []


@pytest.mark.parametrize("name", ["paper_mistral", "paper_llama3"])
def test_paper_presets_hold_the_papers_numbers(name):
    settings = load_settings(preset_path(name))
    assert settings.max_iterations == 4
    assert settings.seed_data.train_limit == 18_000
    assert settings.keyword_pool.max_sets == 1_000_000
    assert settings.keyword_pool.keywords_per_set == 3
    generator = settings.prompt_generator
    assert (settings.keywords_from_seed_prompt, generator.noise_keywords) == (2, 1)
    assert 36_000 <= generator.prompts_per_iteration <= settings.keyword_sets_per_iteration <= 72_000
    for training, length in ((generator.training, 8000), (settings.response_improver.training, 6000)):
        assert (training.learning_rate, training.batch_size, training.epochs) == (1e-6, 32, 3)
        assert (training.warmup_ratio, training.max_length, training.lora) == (0.1, length, None)
    for sampling in (generator.sampling, settings.responses.sampling, settings.response_improver.sampling):
        assert sampling.temperature == 0.7
    assert settings.responses.sampling.max_new_tokens == 2048
    assert settings.preferences.pairs_per_iteration == 10_000
    assert settings.preferences.max_repetition == 0.5
    assert (settings.preferences.rejected_from, settings.preference_optimization.policy_init) == ("initial", "initial")
    loss, policy = settings.preference_optimization.loss, settings.preference_optimization.training
    assert (loss.kind, loss.gamma) == ("simpo", 1.6)
    assert loss.beta in {2, 4, 6, 8, 10, 12}
    assert (policy.batch_size, policy.epochs, policy.scheduler, policy.warmup_ratio) == (128, 1, "cosine", 0.1)


def test_the_two_paper_presets_differ_where_the_paper_does():
    mistral, llama = (load_settings(preset_path(name)) for name in ("paper_mistral", "paper_llama3"))
    assert mistral.initial_policy.name == "alignment-handbook/zephyr-7b-sft-full"
    assert llama.initial_policy.name == "princeton-nlp/Llama-3-Base-8B-SFT"
    rates = [preset.preference_optimization.training.learning_rate for preset in (mistral, llama)]
    assert rates == [3e-7, 6e-7]
    assert (mistral.scorer.name, llama.scorer.name) == ("llm-blender/PairRM-hf", "RLHFlow/ArmoRM-Llama3-8B-v0.1")
    assert (mistral.preferences.margin_threshold, llama.preferences.margin_threshold) == (0.20, 0.02)


def changed(tmp_path, **changes):
    return write_settings(tmp_path / "mine.yaml", {"preset": "laptop"} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefrences": {}}, "`prefrences` is not a setting; did you mean `preferences`?"),
        ({"preference_optimization": {"training": {"learnin_rate": 1}}},
         "`preference_optimization.training.learnin_rate` is not a setting; did you mean"),
        ({"engine": {"thread": 2}}, "`engine.thread` is not a setting; did you mean `threads`?"),
        ({"prompt_generator": {"sampling": {"temprature": 1}}}, "did you mean `temperature`?"),
        ({"preferences": {"pairs_per_iteration": 1000}}, "(1000) is more than prompt_generator.prompts_per_iteration (24)"),
        ({"seed_data": {"train": {"path": "a\0.jsonl"}}}, "`seed_data.train.path`"),
        ({"initial_policy": {"system_prompt": "Be \ud83d."}}, "line 2, column 18 found invalid Unicode"),
        ({"prompt_generator": {"noise_keywords": 3}}, "noise_keywords (3) leaves no keyword of the seed prompt itself"),
        ({"prompt_generator": {"min_words": 70}}, "min_words is larger than max_words"),
        ({"keyword_pool": {"max_sets": 10}}, "keyword_pool.max_sets (10) is less than"),
        ({"preference_optimization": {"training": {"max_prompt_length": 1000}}}, "do not fit into max_length"),
        ({"preference_optimization": {"training": {"micro_batch_size": 3}}}, "micro_batch_size (3) does not divide batch_size (4)"),
        ({"preferences": {"chosen_from": "ranked_samples", "rejected_from": "previous"}}, "Remove rejected_from"),
        ({"response_improver": {"own_answers": True}}, "raise samples, or remove own_answers"),
        (
            {"response_improver": {"own_answers": True, "samples": 2}, "preferences": {"rejected_from": "previous"}},
            "Remove one of the two",
        ),
        ({"response_improver": {"keep_right_answers": True}}, "set scorer.kind to `verifier`, or remove keep_right_answers"),
        ({"preferences": {"ranked_samples": 1}}, "`preferences.ranked_samples` is 1"),
        ({"scorer": {"kind": "pretrained"}}, "`scorer.name` is missing"),
        ({"scorer": {"kind": "pretrained", "name": "a/b", "training": {}}},
         "`scorer.training` is not a setting of `kind: pretrained`"),
        ({"scorer": {"kind": "trainde"}},
         "`scorer.kind` is 'trainde': input should be one of 'trained', 'verifier', 'pretrained', 'pair_ranker'"),
        ({"scorer": {"pair_convention": "one_order"}}, "`scorer.pair_convention` is not a setting of `kind: trained`"),
        ({"preference_optimization": {"loss": {"kind": "cpo_simpo", "beta": 2, "gamma": 1}}},
         "`preference_optimization.loss.alpha` is missing"),
        ({"preference_optimization": {"loss": {"kind": "dpo", "beta": 1, "gamma": 1}}},
         "`preference_optimization.loss.gamma` is not a setting of `kind: dpo`"),
        ({"preference_optimization": {"loss": {"beta": 0}}}, "`preference_optimization.loss.beta` is 0"),
        ({"policy": {"training": {"beta": 1}}}, "`policy` is now `preference_optimization`"),
        ({"preset": "none", "scorer": {}}, "`scorer.kind` is missing"),
        ({"scorer": {"training": None}}, "`scorer.training` is None"),
        ({"initial_policy": {"source": "hub", "name": "a/b"}}, "`initial_policy`: revision is missing"),
        ({"diversity": {"embedding_model": {"source": "hub"}}}, "`diversity.embedding_model`: revision is missing"),
        ({"diversity": {"self_instruct_shot": 1}}, "did you mean `self_instruct_shots`?"),
        ({"judge": {"server": {"model": "m"}}}, "`judge.server.url` is missing"),
        ({"judge": {"server": {"url": "http://u", "modle": "m"}}}, "did you mean `model`?"),
        ({"judge": 3}, "`judge` is 3"),
        ({"judge": {"kind": "pretrained"}}, "`judge.name` is missing"),
        ({"judge": {"kind": "pretrained", "name": "a/b", "training": {"epochs": 2}}},
         "`judge.training` is not a setting of `kind: pretrained`"),
        ({"judge": {"name": "a/b"}}, "`judge.name` is not a setting of `kind: trained`"),
        ({"judge": {"kind": "pair_ranker", "name": "a/b"}}, "`judge.kind` is 'pair_ranker': input should be one of"),
        ({"engine": {"device": "tpu"}}, "`engine.device` is 'tpu'"),
        ({"responses": {"sampling": {"stop": [""]}}}, "`responses.sampling.stop.0` is ''"),
        ({"responses": {"sampling": {"temperature": float("inf")}}}, "`responses.sampling.temperature` is inf"),
        ({"engine": {"kind": "server", "server": {"url": "localhost:8000"}}}, "`engine.server.url`: A server's URL starts"),
        ({"automation": {"minimum": {}}}, "`automation.minimum` is not a setting; did you mean `gate.minimum`?"),
        ({"gate": {"minimum": {"win_rate": 0.5}}}, "`gate.minimum.win_rate"),
        ({"gate": {"minimum": {"cut_share": 0.5}, "maximum": {"cut_share": 0.4}}}, "minimum.cut_share (0.5) is more than"),
        ({"gate": {"minimum": {"win_rate_over_initial": 50}}},
         "`gate`: minimum.win_rate_over_initial (50) is out of range: it is a share between 0 and 1. Was 0.5 meant?"),
        ({"gate": {"maximum": {"cut_share": -0.1}}}, "maximum.cut_share (-0.1) is out of range: it is a share between 0 and 1."),
        ({"gate": {"minimum": {"verifiable_rate_gain": -5}}}, "a difference of two shares, between -1 and 1. Was -0.05 meant?"),
        ({"gate": {"minimum": {"gold_similarity_gain": 3}}}, "a difference of two cosine similarities, between -2 and 2"),
        ({"gate": {"maximum": {"prompt_similarity": 1.5}}}, "it is a cosine similarity between -1 and 1"),
        ({"gate": {"minimum": {"win_rate_over_initial": True}}}, "`gate.minimum.win_rate_over_initial` is True"),
        ({"gate": {"minimum": {"verifiable_rate_gain": -0.05}}, "seed_data": {"verifiable": None}},
         "gate limits verifiable_rate_gain and seed_data.verifiable is not stated"),
        ({"preferences": {"chosen_from": "ranked_samples"}, "responses": {"sampling": {"temperature": 0}}},
         "all samples of a prompt would be equal: raise responses.sampling.temperature"),
        ({"preferences": {"chosen_from": "ranked_samples"}, "responses": {"sampling": {"top_k": 1}}}, "or top_k 1"),
        ({"max_iterations": "many"}, "`max_iterations` is 'many'"),
        ({"initial_policy": {"source": "directory", "name": None}}, "`initial_policy.name` is None"),
        ({"initial_policy": {"source": "directory", "name": {"a": 1}}}, "`initial_policy.name`"),
        ({"engine": {"server": {"url": "http://a/v1", "concurrency": 10**9}}}, "`engine.server.concurrency` is 1000000000"),
        ({"random_seed": 2**32 - 1}, "`random_seed` is 4294967295"),
        ({"prompt_generator": {"max_overdraw": 1.7e308}}, "`prompt_generator.max_overdraw` is 1.7e+308"),
        ({"engine": {"server": {"url": "http://a/v1", "timeout_seconds": 1e10}}}, "`engine.server.timeout_seconds` is 1"),
        ({"preset": "labtop"}, "There is no preset `labtop`; did you mean `laptop`?"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_a_sentence(tmp_path, changes, words):
    with pytest.raises(SettingsError) as error:
        load_settings(changed(tmp_path, **changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_limits_at_the_ends_of_their_range_and_greedy_answers_of_an_improver_are_possible(tmp_path):
    limits = {"minimum": {"win_rate_over_initial": 0, "mean_margin": -7}, "maximum": {"cut_share": 1, "pairs_kept": 40}}
    settings = load_settings(changed(tmp_path, gate=limits, responses={"sampling": {"temperature": 0}}))
    assert (settings.gate.minimum, settings.gate.maximum) == (limits["minimum"], limits["maximum"])


def test_the_judge_is_trained_like_the_scorer_unless_it_is_stated(tmp_path):
    settings = load_settings(changed(tmp_path, scorer={"max_length": 77, "training": {"epochs": 3}}))
    assert (settings.judge.max_length, settings.judge.training) == (77, settings.scorer.training)
    settings = load_settings(changed(tmp_path, judge={"training": {"epochs": 5}}))
    assert settings.judge.training == settings.scorer.training.model_copy(update={"epochs": 5})
    assert settings.judge.server is None


@pytest.mark.parametrize("preset", ["laptop", "paper_mistral"])
def test_a_published_judge_takes_only_its_length_from_the_scorer(tmp_path, preset):
    (tmp_path / "mine").mkdir()
    base = load_settings(preset_path(preset))
    for stated, name in (("a/b", "a/b"), ("mine", str(tmp_path / "mine"))):
        judge = {"kind": "pretrained", "name": stated}
        settings = load_settings(changed(tmp_path, preset=preset, judge=judge))
        assert settings.judge == PretrainedJudge(name=name, max_length=base.scorer.max_length)
        assert settings.judge.scorer == PretrainedScorer(name=name, max_length=base.scorer.max_length)
        assert len(settings.trainings) == len(base.trainings) - 1


def test_another_variant_of_a_section_takes_nothing_from_the_presets_variant(tmp_path):
    base = load_settings(preset_path("laptop"))
    same = load_settings(changed(tmp_path, preference_optimization={"loss": {"beta": 3}}))
    assert same.preference_optimization.loss == SimPO(beta=3, gamma=1.6)
    stated = load_settings(changed(tmp_path, preference_optimization={"loss": {"kind": "simpo", "beta": 3}}))
    assert stated == same
    other = load_settings(changed(tmp_path, preference_optimization={"loss": {"kind": "dpo", "beta": 0.1}}))
    assert other.preference_optimization.loss == DPO(beta=0.1)
    assert other.preference_optimization.training == base.preference_optimization.training
    scorer, judge = {"kind": "pretrained", "name": "a/b"}, {"training": base.scorer.training.model_dump()}
    assert load_settings(changed(tmp_path, scorer=scorer, judge=judge)).scorer == PretrainedScorer(name="a/b")


def test_another_kind_of_scorer_leaves_the_judge_as_the_preset_trains_it(tmp_path):
    laptop = load_settings(preset_path("laptop"))
    settings = load_settings(changed(tmp_path, scorer={"kind": "pretrained", "name": "a/b"}))
    assert settings.judge.training == laptop.scorer.training
    assert settings.scorer.kind == "pretrained"
    for name in ("paper_mistral", "paper_llama3"):
        assert load_settings(preset_path(name)).judge.training.learning_rate > 0


def test_what_the_sampling_of_evaluation_leaves_out_is_as_in_the_responses(tmp_path):
    responses = load_settings(preset_path("laptop")).responses.sampling
    settings = load_settings(changed(tmp_path, evaluation={"sampling": {"temperature": 0.2}}))
    assert settings.evaluation.sampling == responses.model_copy(update={"temperature": 0.2})


def test_stop_texts_of_the_prompt_generator_come_on_top_of_those_that_end_a_prompt(tmp_path):
    settings = load_settings(changed(tmp_path, prompt_generator={"sampling": {"stop": ["X"]}}))
    assert prompt_sampling(settings).stop == ["X", "</rules>", "<solution>"]


def test_the_template_of_a_judge_is_relative_to_the_file_that_states_it(tmp_path):
    server = {"url": "http://127.0.0.1:1/v1", "model": "m", "template": "mine.jinja"}
    settings = load_settings(changed(tmp_path, judge={"server": server}))
    assert settings.judge.server.template == str(tmp_path / "mine.jinja")


def test_the_same_data_cannot_be_train_and_held_out(tmp_path):
    source = {"path": "seed.jsonl"}
    with pytest.raises(SettingsError, match="held-out pairs must never be trained on"):
        load_settings(changed(tmp_path, seed_data={"train": source, "held_out": source}))


def test_paths_are_relative_to_the_file_that_states_them(tmp_path):
    model = {"embedding_model": {"source": "directory", "name": "my-model"}}
    settings = load_settings(changed(tmp_path, seed_data={"train": {"path": "data/mine.jsonl"}}, diversity=model))
    assert settings.diversity.embedding_model.name == str(tmp_path / "my-model")
    assert settings.seed_data.train.path == str(tmp_path / "data/mine.jsonl")
    assert settings.seed_data.held_out.path == str(PRESETS.parent / "seed/held_out.jsonl")


SECRET = "postgresql://u:SECRETPW@h/d"


@pytest.mark.parametrize("stated", [
    {"storage": {"dagster_database": [SECRET]}}, {"storage": SECRET}, {"storage": {"dagster_database": "mysql://u:SECRET PW@h"}},
    {"storage": {"dagster_database": "postgresql://u:SECRET/PW@h/d"}}, {"storage": ["SECRETPW"]},
    {"storage": {"artifacts": "s3x://key:SECRETPW@b"}}, {"storage": {"artifacts": "s3://AKIA:SECRETPW@bucket/d"}},
    {"storage": {"artifacts": "s3x://key:SECRET PW@b"}}, {"storage": {"artifacts": "s3://b/d?secret_access_key=SECRETPW"}},
    {"engine": {"kind": "server", "server": "http://u:SECRETPW@h/v1"}}, {"engine": {"ray": {"address": ["u:SECRETPW"]}}},
    {"engine": {"kind": "server", "server": {"url": ["http://u:SECRETPW@h/v1"]}}}, {"judge": {"server": {"url": "u:SECRETPW@h"}}},
    {"engine": {"device": "cpu", "ray": {"address": "ray://u:SECRETPW@h:10001"}}}, {"preset": "http://u:SECRETPW@h"},
    {"engine": {"vllm_arguments": {"hf_token": "SECRETPW"}}}, {"engine": {"vllm_arguments": {"a": {"api_key": "SECRETPW"}}}},
    {"engine": [{"api-key": "SECRETPW"}]}, {"scorer": {"kind": "http://u:SECRETPW@h"}}, {"storage": {SECRET: 1}},
    {"publishing": {"dataset_repository": "https://u:SECRETPW@huggingface.co/a/b"}},
    {"storage": {"dagster_database": SECRET}}, {"storage": {"dagster_database": "postgresql://h/d?pass%77ord=SECRETPW"}},
    *({"engine": {"vllm_arguments": stated}} for stated in (
        {"x": [{"api_key": "SECRETPW"}]}, {"extra_headers": {"Authorization": "SECRETPW"}}, {"auth": "SECRETPW"},
        {"accessKey": "SECRETPW"}, {"hfToken": "SECRETPW"}, {"api_key_1": "SECRETPW"}, {"api_keys": ["SECRETPW"]},
        {"extra_headers": ["Authorization: Bearer SECRETPW"]}, {"x": "--hf-token hf_SECRETPWSECRETPW"}, {"secret_id": "SECRETPW"},
        {"hf_token": {"id": "SECRETPW"}}, {"passwd": "SECRETPW"}, {"credentials": "SECRETPW"}, {"access_token_value": "SECRETPW"},
        {"x": "Bearer SECRETPW"},
        {"x": ["sk-SECRETPW"]}, {"loader": '{"s3_secret_access_key": "SECRETPW"}'}, {"x": "hf_SECRETPWSECRETPW"},
    )),
])  # fmt: skip
def test_what_may_be_a_password_is_refused_without_a_word_of_it(tmp_path, stated):
    with pytest.raises(SettingsError) as refused:
        load_settings(changed(tmp_path, **stated))
    assert not re.search("SECRET|PW", str(refused.value))


@pytest.mark.parametrize("url", [
    "postgresql://user@localhost/x", "postgresql://%40u@h:5432/d?sslmode=require", "postgresql://[::1]:5432/d",
    "postgresql://u@h1:5432,h2/d", "postgresql:///d?host=/var/run", "postgresql://h",
])  # fmt: skip
def test_urls_of_databases_are_taken(tmp_path, url):
    assert load_settings(changed(tmp_path, storage={"dagster_database": url})).storage.dagster_database == url


def test_fields_that_are_called_nearly_as_secrets_are_are_taken(tmp_path):
    stated = {
        "tokenizer_mode": "slow",
        "max_num_batched_tokens": 5,
        "stop_token_ids": ["1"],
        "hf_overrides": {"a": "hf_transfer", "b": "Basic English"},
    }
    assert load_settings(changed(tmp_path, engine={"vllm_arguments": stated})).engine.vllm_arguments == stated


def test_many_keys_are_read_in_a_moment(tmp_path):
    (tmp_path / "many.yaml").write_text("".join(f"k{number}: 1\n" for number in range(40_000)))
    began = time.process_time()
    with pytest.raises(SettingsError, match=r"`initial_policy` is missing\..* And \d{5} more like these\.$") as refused:
        load_settings(tmp_path / "many.yaml")
    assert len(str(refused.value)) < 5000
    assert time.process_time() - began < 8


def test_a_name_longer_than_any_files_is_taken_for_none(tmp_path):
    long = "x" * 5000
    settings = load_settings(changed(tmp_path, seed_data={"train": {"path": long}}))
    assert settings.seed_data.train.path == long


def test_settings_survive_writing_and_reading(tmp_path):
    settings = load_settings(preset_path("laptop"))
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump()))
    assert load_settings(file) == settings


@pytest.mark.parametrize(("text", "words"), [("a: [", "is not valid YAML"), ("- a", "must hold `key: value` lines")])
def test_files_that_are_not_settings(tmp_path, text, words):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=words):
        load_settings(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml does not exist"):
        load_settings(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "name", ["evil @ file:///elsewhere/package#x==1.0", "-r x==1", "a/../b==1.0", "git+https://h/x==1.0", "x>=1"]
)
def test_a_wheel_is_a_name_with_its_version_and_nothing_that_pip_would_run(name):
    with pytest.raises(ValueError, match="a name with an exact version and nothing else"):
        ModelSource(source="wheel", name=name, wheel_sha256="0" * 64, wheel_member="model")


@pytest.mark.parametrize("member", ["/etc/model", "../model", "package/../../model"])
def test_a_member_of_a_wheel_stays_inside(member):
    with pytest.raises(ValueError, match="wheel_member is a path inside the wheel"):
        ModelSource(source="wheel", name="x==1.0", wheel_sha256="0" * 64, wheel_member=member)


@pytest.mark.parametrize("section", [ModelSource, InitialPolicy, EmbeddingModel])
@pytest.mark.parametrize("stated", ["/../../../tmp", "0" * 63, "F" * 64, "0" * 64 + "\n", ""])
def test_a_sha256_is_one_and_no_part_of_a_path(section, stated):
    with pytest.raises(ValueError, match="wheel_sha256"):
        section(source="wheel", name="x==1.0", wheel_sha256=stated, wheel_member="model")
