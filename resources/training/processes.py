"""How many processes train side by side, and how they are started and ended."""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from resources.common.processes import GRACE_SECONDS, end_with_this_parent
from resources.common.progress import tell
from resources.common.text import one_line
from resources.models.device import release_gpu_memory, visible_gpus
from resources.settings.machine import Engine
from resources.settings.training import Training, TrainingProcesses
from resources.training.job import TrainingError, TrainingJob
from resources.training.live import MARK, Observe

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("synpo.training")

JOB, ROWS, OUTPUT, FAILURE = "job.json", "rows", "output.log", "failure.json"
SHOWN_LINES = 15
# What DeepSpeed may keep in host memory or on disk, and how its and FSDP's files say that nothing is kept there.
OFFLOADED, NOT_OFFLOADED = ("optimizer", "param"), ("none", "false")


def processes_to_start(options: TrainingProcesses, training: Training, engine: Engine) -> tuple[int, bool]:
    """The number of processes that train, and whether accelerate starts them, decided before a model is loaded.

    If it does not, the step's own process trains alone, which spares the seconds that a start takes.
    """
    gpus = len(visible_gpus(engine))
    stated = options.processes
    if options.accelerate_config is not None:
        of_file = _checked_accelerate_config(options.accelerate_config, gpus)["num_processes"]
        stated = stated or (of_file if of_file > 0 else None)
    processes = stated or max(1, gpus)
    if gpus and processes > gpus:
        raise TrainingError(
            f"training_processes.processes is {processes} and {gpus} GPUs are visible: lower it, or leave it out to use all "
            "there are."
        )
    if training.batch_size % (training.micro_batch_size * processes):
        raise TrainingError(
            f"training.batch_size ({training.batch_size}) counts the examples of all processes, and micro_batch_size "
            f"({training.micro_batch_size}) times training_processes.processes ({processes}) does not divide it: change one "
            "of the three."
        )
    # Left alone with several GPUs, the trainer would use them all, in threads of one process.
    return processes, processes > 1 or gpus > 1 or options.accelerate_config is not None


def least_share(options: TrainingProcesses, processes: int) -> float:
    """The share of weights, gradients and moments that each GPU holds at least.

    All of them where each process has its own, a piece where FSDP or DeepSpeed may split them, nothing where they may wait in
    host memory. The file is one that `processes_to_start` took.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    if options.accelerate_config is None:
        return 1.0
    config = load_config_from_file(options.accelerate_config).to_dict()
    fsdp, deepspeed = config.get("fsdp_config") or {}, config.get("deepspeed_config") or {}
    offloaded = [fsdp.get("fsdp_offload_params", False), *(deepspeed.get(f"offload_{of}_device") for of in OFFLOADED)]
    # A file of DeepSpeed's own may say anything.
    if "deepspeed_config_file" in deepspeed or any(str(each).lower() not in NOT_OFFLOADED for each in offloaded):
        return 0.0
    return 1 / processes if config["distributed_type"] in ("FSDP", "DEEPSPEED") else 1.0


def refuse_missing_packages(options: TrainingProcesses, training: Training) -> None:
    """Checks that what the settings ask for is installed."""
    wanted: dict[str, tuple[str, str]] = {}
    if options.report_to != "none":
        wanted[options.report_to] = (f"training_processes.report_to is `{options.report_to}`", options.report_to)
    if training.lora is not None and training.lora.load_in_4bit:
        wanted["bitsandbytes"] = ("training.lora.load_in_4bit is on", "qlora")
    for package, (reason, extra) in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise TrainingError(
                f"{reason}, and the package {package} is not installed: pip install 'synpo[{extra}]', or change the setting."
            )


def run_in_processes(job: TrainingJob, dataset: "Dataset", accelerate_config: str | None, observe: Observe) -> None:
    """Trains in processes that accelerate starts, DDP without its file, and ends them all if this call ends early."""
    (job.state / JOB).write_text(job.model_dump_json())
    dataset.save_to_disk(str(job.state / ROWS))
    failure, output = job.state / FAILURE, job.state / OUTPUT
    failure.unlink(missing_ok=True)
    if accelerate_config is None:
        accelerate_config = str(job.state / "accelerate.yaml")
        Path(accelerate_config).write_text(yaml.safe_dump(_data_parallel(job.processes)))
    # fmt: off
    command = [
        sys.executable, "-m", "resources.training.processes", str(os.getpid()),
        "--config_file", accelerate_config,
        "--num_processes", str(job.processes),
        # Port 0 is any that is free: another training may be under way on this machine.
        "--main_process_port", "0",
        # For DeepSpeed, which would else compare the number in its own file with ours.
        "--gradient_accumulation_steps", str(job.accumulation_steps),
        "--module", "resources.training.process", str(job.state),
    ]
    # fmt: on
    logger.info(f"Training starts in processes of its own: {job.processes}.")
    gpus = visible_gpus(job.engine)
    release_gpu_memory()
    # All GPUs but one are hidden from a process that trains alone.
    own = gpus[0] if gpus and job.processes == 1 else None
    own = own if job.own_gpu is None else job.own_gpu
    environment = os.environ | ({} if own is None else {"CUDA_VISIBLE_DEVICES": own})
    with (
        output.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        ) as launcher,
    ):
        try:
            for line in launcher.stdout or ():
                if line.startswith(MARK):
                    observe(json.loads(line.removeprefix(MARK)))
                else:
                    tell(logger, line.rstrip())
            launcher.wait()
        finally:
            _end(launcher)
    if failure.exists():
        told = json.loads(failure.read_text())
        if told["is_final"]:
            raise TrainingError(told["reason"])
        raise RuntimeError(f"Training failed: {told['reason']} All that its processes said is in {output}.")
    if launcher.returncode:
        last = "\n".join(output.read_text().splitlines()[-SHOWN_LINES:])
        raise RuntimeError(
            "A training process ended without a reason; if it was killed (SIGKILL), the memory of the machine may not suffice. "
            f"All that the processes said is in {output}; the last lines:\n{last}"
        )


def _end(launcher: "subprocess.Popen[str]") -> None:
    """Ends the launcher, which ends the training processes, each of which leads a session of its own."""
    if launcher.poll() is not None:
        return
    os.killpg(launcher.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(GRACE_SECONDS / 2)
    # Training processes that did not listen end with the launcher.
    with suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)


def _data_parallel(processes: int) -> dict[str, Any]:
    """What `accelerate config` writes for DDP on one machine; the processes choose gloo by themselves on a CPU."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if processes > 1 else "NO",
        "num_processes": processes,
        "num_machines": 1,
        "machine_rank": 0,
        "mixed_precision": "no",
        "use_cpu": False,
    }


def _checked_accelerate_config(path: str, gpus: int) -> dict[str, Any]:
    """The content of `training_processes.accelerate_config`."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    named = f"training_processes.accelerate_config ({path})"
    if not Path(path).is_file():
        raise TrainingError(f"{named} does not exist: make it with `accelerate config --config_file {path}`.")
    try:
        config = load_config_from_file(path)
        if not isinstance(config, ClusterConfig):
            raise ValueError("it is for SageMaker")
    # A file that holds no mapping, or a value of another type, fails in accelerate wherever it is first used.
    except Exception as error:
        reason = one_line(str(error))
        raise TrainingError(
            f"{named} is no valid configuration of accelerate: {reason}. Make it anew with `accelerate config --config_file "
            f"{path}`."
        ) from None
    values = config.to_dict()
    kind = values["distributed_type"]
    if kind not in ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED"):
        raise TrainingError(f"{named} has distributed_type {kind}: choose MULTI_GPU, FSDP or DEEPSPEED.")
    if kind in ("FSDP", "DEEPSPEED") and not gpus:
        raise TrainingError(f"{named} chooses {kind}, which needs GPUs, and none is used here: choose MULTI_GPU.")
    if values["num_machines"] != 1:
        raise TrainingError(
            f"{named} has num_machines {values['num_machines']}: training uses one machine, so make it 1."
        )
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise TrainingError(f"{named} chooses DeepSpeed, which is not installed: pip install deepspeed.")
    deepspeed = values.get("deepspeed_config") or {}
    if deepspeed.get("zero_stage") == 3 and not deepspeed.get("zero3_save_16bit_model"):
        raise TrainingError(
            f"{named} would leave the weights in pieces: set deepspeed_config.zero3_save_16bit_model to true."
        )
    if file := deepspeed.get("deepspeed_config_file"):
        refuse_pieces(named, Path(file))
    return values


def refuse_pieces(named: str, file: Path) -> None:
    """Checks that DeepSpeed's own file, which accelerate's may name, has the weights gathered when they are saved."""
    try:
        zero = json.loads(file.read_text()).get("zero_optimization", {})
        stage, is_gathered = zero.get("stage"), zero.get("stage3_gather_16bit_weights_on_model_save")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TrainingError(f"{named} names {file} as deepspeed_config_file, which cannot be read: {error}") from None
    if stage == 3 and not is_gathered:
        raise TrainingError(
            f"{file}, which {named} names, would leave the weights in pieces: set "
            "zero_optimization.stage3_gather_16bit_weights_on_model_save to true."
        )


def _launch(parent: int, arguments: list[str]) -> None:
    """What the launcher does: accelerate's command, in a process that ends with the step that started it."""
    end_with_this_parent(parent)
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args(arguments))


if __name__ == "__main__":
    _launch(int(sys.argv[1]), sys.argv[2:])
