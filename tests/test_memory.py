"""What a training takes of a GPU's memory, worked out without one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from resources.models import device
from resources.settings.files import load_settings, preset_path
from resources.settings.machine import Engine
from resources.training import memory
from resources.training.job import TrainingError
from resources.training.processes import _checked_accelerate_config, least_share
from tests.nano import nano_settings, write_settings

DEPLOYMENT = Path(memory.__file__).parents[1] / "deployment"
LLAMA_3, VOCABULARY = 8_030_000_000, 128_256


def training(**changes):
    settings = load_settings(preset_path("paper_llama3")).response_improver.training
    return settings.model_copy(update={"micro_batch_size": 1, "max_length": 1000} | changes)


@pytest.mark.parametrize(("changes", "share", "gigabytes"), [
    ({}, 1, 128.48), ({}, 1 / 8, 16.06), ({}, 0, 0), ({"lora": {}}, 1, 16.06), ({"lora": {"load_in_4bit": True}}, 1, 4.015),
])  # fmt: skip
def test_the_weights_take_what_their_formats_take(changes, share, gigabytes):
    if "lora" in changes:
        lora = load_settings(preset_path("single_gpu")).response_improver.training.lora
        changes = {"lora": lora.model_copy(update=changes["lora"])}
    assert memory.least_bytes(training(**changes), LLAMA_3, 0, share) / 1e9 == pytest.approx(gigabytes)


def test_the_logits_of_a_micro_batch_come_on_top_and_pairs_have_two_sides():
    pairs = load_settings(preset_path("paper_llama3")).preference_optimization.training
    assert memory.least_bytes(training(), 0, VOCABULARY, 1 / 8) == 1000 * VOCABULARY * 4
    assert memory.least_bytes(training(micro_batch_size=3), 0, VOCABULARY, 1 / 8) == 3 * 1000 * VOCABULARY * 4
    assert (
        memory.least_bytes(pairs, 0, VOCABULARY, 1 / 8)
        == 2 * pairs.micro_batch_size * pairs.max_length * VOCABULARY * 4
    )


@pytest.fixture
def on_gpus(monkeypatch):
    """Settings are looked at as on a machine whose smallest GPU has so many bytes."""

    def pretend(available):
        monkeypatch.setattr(memory, "_gpu_bytes", lambda gpus: available)
        monkeypatch.setattr(memory, "processes_to_start", lambda *arguments: (1, False))

    return pretend


def test_what_does_not_fit_is_refused_by_name_with_the_remedy(on_gpus, tmp_path, nano_model, monkeypatch):
    settings = load_settings(write_settings(tmp_path / "settings.yaml", nano_settings(nano_model)))
    on_gpus(1_000_000)
    with pytest.raises(
        TrainingError, match=r"training of prompt_generator takes at least .* has 1.0 MB: split .*fsdp_8"
    ):
        memory.refuse_too_little_memory(settings, nano_model)
    on_gpus(80_000_000_000)
    memory.refuse_too_little_memory(settings, nano_model)
    full = settings.judge.training.model_copy(update={"lora": None})
    judged = settings.model_copy(update={"judge": settings.judge.model_copy(update={"training": full})})
    on_gpus(memory.parameter_count(nano_model) * 15)
    monkeypatch.setattr(memory, "text_config", lambda *arguments: SimpleNamespace(vocab_size=0))
    memory.refuse_too_little_memory(settings, nano_model)
    with pytest.raises(TrainingError, match="training of judge takes at least"):
        memory.refuse_too_little_memory(judged, nano_model)
    # A driver that says nothing refuses nothing, and neither does a CPU.
    on_gpus(None)
    memory.refuse_too_little_memory(settings, nano_model)


def test_activations_are_kept_where_they_certainly_fit(on_gpus, nano_model):
    engine, full = Engine(), training(lora=None)
    weights, config = memory.parameter_count(nano_model), AutoConfig.from_pretrained(nano_model)
    needed = 16 * weights + 1000 * (4 * config.vocab_size + 34 * config.hidden_size * config.num_hidden_layers)
    assert not memory.keeps_activations(engine, full, nano_model, 1)
    on_gpus(int(needed / 0.7) + 1000)
    assert memory.keeps_activations(engine, full, nano_model, 1)
    on_gpus(int(needed / 0.7) - 1000)
    assert not memory.keeps_activations(engine, full, nano_model, 1)
    assert memory.keeps_activations(engine, full, nano_model, 1 / 8)
    on_gpus(None)
    assert not memory.keeps_activations(engine, full, nano_model, 1 / 8)


def options(file):
    return load_settings(preset_path("paper_mistral")).training_processes.model_copy(
        update={"accelerate_config": file and str(file)}
    )


@pytest.mark.parametrize(("name", "processes", "share"), [("fsdp_8_gpus", 8, 1 / 8), ("fsdp_1_gpu", 1, 0)])
def test_the_shipped_files_are_accelerates_and_share_the_weights_or_keep_them_elsewhere(name, processes, share):
    file = DEPLOYMENT / f"{name}.yaml"
    config = _checked_accelerate_config(str(file), processes)
    assert (config["num_processes"], config["distributed_type"]) == (processes, "FSDP")
    assert least_share(options(file), processes) == share


@pytest.mark.parametrize(("text", "share"), [
    (None, 1),
    ("distributed_type: MULTI_GPU", 1),
    ("distributed_type: FSDP\nfsdp_config: {fsdp_offload_params: false}", 1 / 4),
    ("distributed_type: FSDP\nfsdp_config: {fsdp_offload_params: 'true'}", 0),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2, offload_optimizer_device: none}", 1 / 4),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_param_device: cpu}", 0),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: mine.json}", 0),
])  # fmt: skip
def test_what_is_split_or_kept_elsewhere_is_not_asked_of_one_gpu(tmp_path, text, share):
    file = text and tmp_path / "accelerate.yaml"
    if file:
        head = "compute_environment: LOCAL_MACHINE\nmixed_precision: 'no'\nuse_cpu: false\nnum_machines: 1\nnum_processes: 4\n"
        file.write_text(head + text)
    assert least_share(options(file), 4) == share


@pytest.mark.parametrize("preset", ["paper_mistral", "paper_llama3"])
def test_the_papers_models_fit_eight_gpus_of_80_gb_and_not_one(preset):
    settings = load_settings(preset_path(preset))
    assert Path(settings.training_processes.accelerate_config).name == "fsdp_8_gpus.yaml"
    for _, each in settings.trainings:
        assert each.batch_size % (8 * each.micro_batch_size) == 0
        assert memory.least_bytes(each, LLAMA_3, VOCABULARY, 1 / 8) < 40e9
        assert memory.least_bytes(each, LLAMA_3, VOCABULARY, 1) > 80e9


def test_the_driver_is_asked_about_visible_gpus(tmp_path, monkeypatch):
    def told(*gpus):
        device.told_by_driver.cache_clear()
        return device.told_by_driver("memory.total", gpus)

    driver = tmp_path / "nvidia-smi"
    driver.write_text('#!/bin/sh\ncase "$*" in *--id=1,GPU-2*) ;; *) echo 4096;; esac\necho 81559\necho 40960\n')
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert told("1", "GPU-2") == [81559, 40960]
    driver.write_text('#!/bin/sh\ncase "$*" in *--id=*) exit 6;; esac\necho 81559\n')
    assert told("MIG-1") == [81559]
    driver.write_text("#!/bin/sh\necho no devices were found; exit 6\n")
    assert told("1", "GPU-2") is None
    assert told() is None
