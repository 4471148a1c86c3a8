"""Training goes on after it was stopped, and is divided among processes; what cannot work is refused before it starts."""

import dataclasses
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import dagster as dg
import pytest

from resources.common.errors import FinalError
from resources.settings.machine import Engine
from resources.settings.training import Lora, PreferenceTraining, SimPO, Training, TrainingProcesses
from resources.storage.checkpoint_store import Checkpoint
from resources.training.processes import refuse_pieces
from resources.training.trainer import Trainer, TrainingError
from synpo_assets.graph.changes import run_resources
from synpo_assets.graph.services import Services
from tests.conftest import heard_by
from tests.nano import seed_rows
from tests.stand_ins import services_in

ROWS = seed_rows()[:32]
EXAMPLES = [([{"role": "user", "content": row["prompt"]}], row["answer"]) for row in ROWS]
LORA = Lora(rank=4, alpha=8, dropout=0.1)
SFT = Training(learning_rate=1e-3, batch_size=4, micro_batch_size=2, max_length=400)
PAIRED = PreferenceTraining(
    **SFT.model_copy(update={"lora": LORA}).model_dump(), max_prompt_length=200, max_completion_length=150
)
SIMPO = SimPO(beta=2.5, gamma=1.25)
STEPS = len(ROWS) // SFT.batch_size


def pairs():
    finished = {"chosen_finish_reason": "stop", "rejected_finish_reason": "stop"}
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": "I do not know that."}],
        }
        | finished
        for row in ROWS
    ]


def trainer(states, **processes):
    return Trainer(
        engine=Engine(threads=1, dtype="float32"),
        random_seed=1,
        processes=TrainingProcesses(**processes),
        states=str(states),
    )


def sft(trainer, start, directory, **changes):
    directory.mkdir(parents=True)
    return trainer.train("supervised", start, EXAMPLES, SFT.model_copy(update=changes), directory)


def simpo(trainer, start, directory, **changes):
    directory.mkdir(parents=True)
    return trainer.train("preference", start, pairs(), PAIRED.model_copy(update=changes), directory, SIMPO)


def reward(trainer, start, directory, **changes):
    directory.mkdir(parents=True)
    rows = [(row["prompt"], row["answer"], "zz qq zz qq") for row in ROWS]
    return trainer.train("reward", start, rows, SFT.model_copy(update={"lora": LORA} | changes), directory)


def weights(directory):
    return (directory / "merged" / "model.safetensors").read_bytes()


def largest_difference(one, other):
    from safetensors.torch import load_file

    one, other = (load_file(directory / "merged" / "model.safetensors") for directory in (one, other))
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


class Stopped(Exception):
    """Stands for whatever stops a step in the middle."""


@pytest.fixture
def stop_after(monkeypatch):
    """Stops the training after a step, which is a `Stopped`."""
    monkeypatch.setattr("resources.common.progress.LOG_EVERY_SECONDS", -1)

    @contextmanager
    def stopped(step):
        def stop(line):
            if line.startswith(f"Step {step} "):
                raise Stopped

        with pytest.raises(Stopped), heard_by(stop):
            yield

    return stopped


# One of three kinds in each plain run: they take seconds, and share most of their code.
SLOW_BUT_ONE = [sft, pytest.param(simpo, marks=pytest.mark.slow), pytest.param(reward, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("train", SLOW_BUT_ONE)
def test_a_stopped_training_goes_on_and_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path, nano_checkpoint, stop_after, said, train
):
    undisturbed = train(trainer(tmp_path / "others"), nano_checkpoint, tmp_path / "undisturbed")
    saving = trainer(tmp_path / "states", save_every_steps=3)
    with stop_after(5):
        train(saving, nano_checkpoint, tmp_path / "stopped")
    (state,) = (tmp_path / "states").iterdir()
    description = json.loads((state / "description.json").read_text())
    assert description.keys() == {"asset", "kind", "start", "created"}
    assert description["start"] == "initial_policy"
    # A kill in the middle of saving leaves a folder with any of the trainer's files in it.
    shutil.copytree(state / "checkpoint-3", state / "checkpoint-6", ignore=shutil.ignore_patterns("complete.json"))
    said.clear()
    resumed = train(saving, nano_checkpoint, tmp_path / "resumed")
    assert "Training goes on after step 3, from the state that an earlier run saved." in said
    assert weights(tmp_path / "resumed") == weights(tmp_path / "undisturbed")
    assert [entry["step"] for entry in resumed.history] == list(range(1, STEPS + 1))
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in undisturbed.history]
    logged = (tmp_path / "resumed" / "trainer_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_training_whose_result_was_lost_is_not_done_again(tmp_path, nano_checkpoint, said):
    saving = trainer(tmp_path / "states", save_every_steps=3)
    sft(saving, nano_checkpoint, tmp_path / "lost")
    said.clear()
    again = sft(saving, nano_checkpoint, tmp_path / "again")
    assert said == [f"Training goes on after step {STEPS}, from the state that an earlier run saved."]
    assert weights(tmp_path / "again") == weights(tmp_path / "lost")
    assert again.steps == STEPS


@pytest.mark.slow
def test_two_states_are_kept_the_older_of_which_stands_in_for_a_damaged_one(
    tmp_path, nano_checkpoint, stop_after, said
):
    with stop_after(7):
        sft(trainer(tmp_path / "states", save_every_steps=2), nano_checkpoint, tmp_path / "a")
    states = sorted(tmp_path.glob("states/*/checkpoint-*"))
    assert [state.name for state in states] == ["checkpoint-4", "checkpoint-6"]
    with (states[1] / "optimizer.pt").open("r+b") as file:
        file.write(b"damage")
    sft(trainer(tmp_path / "states", save_every_steps=2), nano_checkpoint, tmp_path / "resumed")
    assert "Training goes on after step 4, from the state that an earlier run saved." in said
    assert list(tmp_path.glob("states/*/step-6.damaged"))
    sft(trainer(tmp_path / "short", save_every_steps=STEPS + 1), nano_checkpoint, tmp_path / "b")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "b")
    assert list(tmp_path.glob("short/*/checkpoint-*")) == []


@pytest.mark.slow
def test_a_state_is_never_used_for_another_training(tmp_path, nano_checkpoint, stop_after, said):
    saving = trainer(tmp_path / "states", save_every_steps=3)
    with stop_after(5):
        sft(saving, nano_checkpoint, tmp_path / "stopped")
    other_start = Checkpoint("policy", "0002", "other", nano_checkpoint.weights, nano_checkpoint.directory)
    other_seed = saving.model_copy(update={"random_seed": 2})
    sft(saving, nano_checkpoint, tmp_path / "a", learning_rate=2e-3)
    sft(saving, other_start, tmp_path / "b")
    sft(other_seed, nano_checkpoint, tmp_path / "c")
    assert not [message for message in said if "goes on" in message]


@pytest.mark.parametrize("fails", [False, True])
def test_states_are_removed_when_the_result_is_in_its_place(tmp_path, nano_checkpoint, fails):
    """The result is moved, as the checkpoint store does, or the step fails before that."""
    seen = {}

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["0001"]))
    def some_model(services: dg.ResourceParam[Services]) -> None:
        sft(services.trainer, nano_checkpoint, tmp_path / "built")
        (description,) = (tmp_path / "states").glob("*/description.json")
        seen.update(json.loads(description.read_text()))
        if fails:
            shutil.rmtree(tmp_path / "built")
            raise RuntimeError("The disk is full.")
        (tmp_path / "built").rename(tmp_path / "final")

    services = dataclasses.replace(services_in(tmp_path), trainer=trainer(tmp_path / "states", save_every_steps=3))
    resources = run_resources(services, lambda *_: services)
    result = dg.materialize([some_model], resources=resources, partition_key="0001", raise_on_error=False)
    assert result.success != fails
    assert seen["asset"] == "some_model[0001]"
    left = sorted(state.name for state in tmp_path.glob("states/*/checkpoint-*"))
    assert left == (["checkpoint-6", "checkpoint-8"] if fails else [])
    assert bool(list((tmp_path / "states").iterdir())) == fails


@pytest.fixture
def no_weights(tmp_path, nano_model):
    """A start without weights: whoever loads the model fails in another way than the test expects."""
    folder = tmp_path / "no weights"
    shutil.copytree(nano_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return Checkpoint("initial_policy", None, "nano", str(folder), str(folder))


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, no_weights):
    with pytest.raises(
        TrainingError, match=r"batch_size \(4\).*micro_batch_size \(2\).*training_processes\.processes \(3\)"
    ):
        sft(trainer(tmp_path, processes=3), no_weights, tmp_path / "out")


@pytest.mark.parametrize(("content", "reason"), [
    (None, "does not exist"),
    ("- a list", "no valid configuration of accelerate"),
    ('num_processes: !!int ""', "no valid configuration of accelerate"),
    ("[" * 5000, "no valid configuration of accelerate"),
    ("distributed_type: MULTI_GPU\nprocesses: 2", r"unknown keys \(\['processes'\]\)"),
    ("num_processes: 2", "distributed_type"),
    ("distributed_type: FSDP\nnum_processes: 2", "FSDP, which needs GPUs"),
    ("distributed_type: XLA\nnum_processes: 2", "distributed_type XLA: choose"),
    ("distributed_type: MULTI_GPU\nnum_processes: 4\nnum_machines: 2", "num_machines 2"),
    (
        "distributed_type: DEEPSPEED\nnum_processes: 1\ndeepspeed_config: {deepspeed_config_file: absent.json}",
        "DEEPSPEED, which needs GPUs",
    ),
    # The number in the file counts where the settings name none.
    ("distributed_type: MULTI_GPU\nnum_processes: 3", r"training_processes\.processes \(3\)"),
])  # fmt: skip
def test_a_configuration_of_accelerate_that_cannot_work_is_refused(tmp_path, no_weights, content, reason):
    file = tmp_path / "accelerate.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TrainingError, match=reason):
        sft(trainer(tmp_path, accelerate_config=str(file)), no_weights, tmp_path / "out")


@pytest.mark.parametrize(("content", "reason"), [
    (None, "cannot be read"),
    ("[]", "cannot be read"),
    ('{"zero_optimization": {"stage": 3}}', "in pieces: set zero_optimization.stage3_gather_16bit_weights_on_model_save"),
])  # fmt: skip
def test_a_file_of_deepspeed_that_would_leave_the_weights_in_pieces_is_refused(tmp_path, content, reason):
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TrainingError, match=reason):
        refuse_pieces("training_processes.accelerate_config (a.yaml)", file)


def test_a_file_of_deepspeed_that_gathers_the_weights_will_do(tmp_path):
    for zero in ({"stage": 2}, {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}):
        (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero}))
        refuse_pieces("training_processes.accelerate_config (a.yaml)", tmp_path / "deepspeed.json")


@pytest.mark.parametrize(("package", "options", "changes"), [
    ("trackio", {"report_to": "trackio"}, {}),
    ("bitsandbytes", {}, {"lora": LORA.model_copy(update={"load_in_4bit": True})}),
])  # fmt: skip
def test_a_missing_package_is_named_with_the_way_to_install_it(
    tmp_path, no_weights, monkeypatch, package, options, changes
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TrainingError, match=rf"{package} is not installed: pip install 'synpo\["):
        sft(trainer(tmp_path, **options), no_weights, tmp_path / "out", **changes)


def test_progress_reaches_the_tracker_under_the_name_of_the_run(tmp_path, nano_checkpoint):
    summary = sft(trainer(tmp_path / "states", report_to="trackio"), nano_checkpoint, tmp_path / "out")
    assert summary.tracked == "trackio show --project synpo"
    with closing(sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "synpo.db")) as connection:
        logged = connection.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in logged} == {"supervised from initial_policy"}
    assert "train/loss" in str(logged[0][1])


def test_too_little_gpu_memory_is_explained(tmp_path, nano_checkpoint, monkeypatch):
    import torch
    from trl.experimental.cpo import CPOTrainer

    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(CPOTrainer, "compute_loss", full)
    with pytest.raises(FinalError, match=r"micro_batch_size = 2.*gradient_checkpointing.*lower.*load_in_4bit.*FSDP"):
        simpo(trainer(tmp_path), nano_checkpoint, tmp_path / "out")


@pytest.mark.parametrize("train", SLOW_BUT_ONE)
def test_adapters_on_4_bit_weights_are_merged_into_the_start_weights(tmp_path, nano_checkpoint, train):
    import torch
    from safetensors.torch import load_file

    lora = LORA.model_copy(update={"dropout": 0.0})
    quantized = train(
        trainer(tmp_path / "a"), nano_checkpoint, tmp_path / "4", lora=lora.model_copy(update={"load_in_4bit": True})
    )
    plain = train(trainer(tmp_path / "b"), nano_checkpoint, tmp_path / "32", lora=lora)
    # The first loss is that of the start weights: rounded ones have another, but not by much.
    first = (quantized.history[0]["loss"], plain.history[0]["loss"])
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.15)
    start = load_file(Path(nano_checkpoint.weights) / "model.safetensors")
    merged = load_file(tmp_path / "4" / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "4" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    down, up = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    assert down.dtype == torch.float32
    assert up.abs().max() > 0
    expected = start[f"{name}.weight"] + up @ down * lora.alpha / lora.rank
    assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-6)


# From here on, every training starts two processes, which takes half a minute on two cores.

TRAIN_IN_PROCESSES = """
import sys
from pathlib import Path
from resources.storage.checkpoint_store import Checkpoint
from tests import test_accelerate as tests

states, directory, model, train, processes = sys.argv[1:]
start = Checkpoint("initial_policy", None, "nano", model, model)
trainer = tests.trainer(states, processes=int(processes), save_every_steps=2)
getattr(tests, train)(trainer, start, Path(directory), epochs=tests.EPOCHS)
"""
EPOCHS = 6.0


def training_in_a_process(tmp_path, start, train, processes, directory):
    command = [sys.executable, "-c", TRAIN_IN_PROCESSES, tmp_path / "states", tmp_path / directory, start.weights]
    return subprocess.Popen([*map(str, command), train, str(processes)], cwd=Path(__file__).parents[1])


def complete_states(tmp_path):
    return list(tmp_path.glob("states/*/checkpoint-*/complete.json"))


def processes_of(tmp_path):
    """Ids of the processes whose command line names a folder in here: those of a training name its states."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.fsencode(tmp_path) in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("train", [sft, simpo, reward])
def test_two_processes_learn_what_one_learns(tmp_path, nano_checkpoint, said, train, monkeypatch):
    observed = []
    monkeypatch.setattr("resources.training.trainer.observe_asset", lambda: observed.append)
    alone = train(trainer(tmp_path / "a", processes=1), nano_checkpoint, tmp_path / "1", lora=None)
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    together = train(trainer(tmp_path / "b", accelerate_config=str(config)), nano_checkpoint, tmp_path / "2", lora=None)
    assert "Training starts in processes of its own: 2." in said
    # On a busy machine, a sign of life may follow.
    assert [line for line in said if line.startswith("Step ")][-1].startswith(f"Step {STEPS} of {STEPS}, loss ")
    assert not [line for line in said if "observed" in line], (
        "it is for the process of the step, and for nobody to read"
    )
    assert [values["step"] for values in observed] == 2 * list(range(1, STEPS + 1))
    for one, other in zip(alone.history, together.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 1e-4
    assert sorted(file.name for file in (tmp_path / "1" / "merged").iterdir()) == sorted(
        file.name for file in (tmp_path / "2" / "merged").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("train", "processes", "kills"), [("simpo", 1, 3), ("sft", 2, 1)])
def test_a_training_killed_at_any_moment_ends_whole_and_goes_on(
    tmp_path, nano_checkpoint, said, train, processes, kills
):
    options = {"processes": processes, "save_every_steps": 2}
    undisturbed = globals()[train](
        trainer(tmp_path / "others", **options), nano_checkpoint, tmp_path / "undisturbed", epochs=EPOCHS
    )
    for number in range(kills):
        before = set(complete_states(tmp_path))
        killed = training_in_a_process(tmp_path, nano_checkpoint, train, processes, f"killed {number}")
        wait_for(lambda: set(complete_states(tmp_path)) - before or killed.poll() is not None, 200)  # noqa: B023
        assert killed.poll() is None, "it was done before it could be killed"
        time.sleep(random.Random(number).uniform(0, 0.5))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        wait_for(lambda: not processes_of(tmp_path), 15)
    said.clear()
    resumed = globals()[train](
        trainer(tmp_path / "states", **options), nano_checkpoint, tmp_path / "resumed", epochs=EPOCHS
    )
    assert "Training goes on after step" in said[0]
    assert weights(tmp_path / "resumed") == weights(tmp_path / "undisturbed")
    # TRL counts tokens from the start of the process.
    assert [entry | {"num_tokens": 0} for entry in resumed.history] == [
        entry | {"num_tokens": 0} for entry in undisturbed.history
    ]


@pytest.mark.slow
def test_a_reason_to_fail_comes_back_from_the_processes_as_it_is(tmp_path, nano_model):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(nano_model, broken)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(broken / "model.safetensors")
    save_file(tensors | {name: tensors[name] * float("nan")}, broken / "model.safetensors", metadata={"format": "pt"})
    start = Checkpoint("initial_policy", None, "broken", str(broken), str(broken))
    with pytest.raises(TrainingError, match=r"^The training loss became nan at step 1"):
        simpo(trainer(tmp_path / "states", processes=2), start, tmp_path / "out")
    assert processes_of(tmp_path) == set()


@pytest.mark.slow
def test_a_cancelled_step_ends_its_training_processes(tmp_path, nano_checkpoint):
    def cancel(message):
        if message.startswith("Step"):
            assert len(processes_of(tmp_path)) >= 3
            raise KeyboardInterrupt

    started = trainer(tmp_path / "states", processes=2)
    with pytest.raises(KeyboardInterrupt), heard_by(cancel):
        sft(started, nano_checkpoint, tmp_path / "out", epochs=400.0)
    wait_for(lambda: not processes_of(tmp_path), 10)


@pytest.mark.slow
def test_what_else_went_wrong_in_a_process_is_quoted(tmp_path, no_weights):
    with pytest.raises(RuntimeError, match=r"Training failed: OSError.*no weights.*output\.log"):
        sft(trainer(tmp_path / "states", processes=2), no_weights, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
