"""A home and a nano model for all tests; SYNPO_HOME is set before anything reads the settings."""

import contextlib
import dataclasses
import gc
import io
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml
from filelock import FileLock
from hypothesis import HealthCheck, settings
from typer.testing import CliRunner

from tests.nano import EMBEDDING_MODEL, make_nano_embedding_model, make_nano_model, nano_settings, write_settings

# How long an example takes says nothing where tests run side by side.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
# The first process sets it; those that test side by side share what is made in `SHARED`.
SHARED = Path(os.environ.get("SYNPO_TESTS_SHARED") or tempfile.mkdtemp(prefix="synpo-tests-"))
os.environ["SYNPO_TESTS_SHARED"] = str(SHARED)
WORK = Path(tempfile.mkdtemp(prefix="process-", dir=SHARED))
HOME = WORK / "home"
MODEL = SHARED / "nano"
HOME.mkdir()
write_settings(HOME / "settings.yaml", nano_settings(MODEL))
os.environ |= {"SYNPO_HOME": str(HOME), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
# It is read when trackio is imported, which any training may be the first to do.
os.environ["TRACKIO_DIR"] = str(WORK / "trackio")
os.environ.pop("DAGSTER_HOME", None)
# The files that take longest, each on one worker, in the order in which they are begun.
LONGEST = ("test_daemon.py", "test_storage.py", "test_smollm2.py")


def pytest_collection_finish() -> None:
    """What was imported is no garbage, and is not searched for any."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the whole run is slow; it goes to one process, so that it is made once, and so does what a file makes once."""
    for item in items:
        if "nano_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("nano_run"))
        elif item.get_closest_marker("slow") or _shares(item):
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    # Begun last, they would go on alone at the end.
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def _shares(item: pytest.Item) -> bool:
    """Whether a test uses something that its file makes once for all its tests."""
    made = getattr(item, "_fixtureinfo", None)
    return made is not None and any(each[-1].scope == "module" for each in made.name2fixturedefs.values())


@contextlib.contextmanager
def heard_by(listener: Callable[[str], object]) -> Iterator[None]:
    """Hands what the resources say to a function, line by line; what that raises ends the work."""
    logger, handler = logging.getLogger("synpo"), logging.Handler()
    handler.emit = lambda record: listener(record.getMessage())  # type: ignore[assignment,method-assign,return-value]
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the resources say during the test, line by line."""
    lines: list[str] = []
    with heard_by(lines.append):
        yield lines


@pytest.fixture(scope="session")
def nano_embedding_model() -> Path:
    """Beside the nano model, where its settings look for it."""
    with FileLock(SHARED / "embedding.lock"):
        place = SHARED / EMBEDDING_MODEL
        return place if place.exists() else make_nano_embedding_model(place)


@pytest.fixture(scope="session")
def nano_model(nano_embedding_model: Path) -> Path:
    with FileLock(SHARED / "nano.lock"):
        return MODEL if MODEL.exists() else make_nano_model(MODEL)


@pytest.fixture(scope="session")
def classifier(nano_model: Path) -> Path:
    """A reward model with random weights that tell answers apart."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from resources.models.chat import load_tokenizer

    torch.manual_seed(0)
    directory = WORK / "classifier"
    AutoModelForSequenceClassification.from_pretrained(nano_model, num_labels=1).save_pretrained(directory)
    load_tokenizer(str(nano_model)).save_pretrained(directory)
    return directory


@pytest.fixture
def nano_checkpoint(nano_model: Path):
    from resources.storage.checkpoint_store import Checkpoint

    return Checkpoint("initial_policy", None, "nano", str(nano_model), str(nano_model))


@pytest.fixture(scope="session")
def adapted_checkpoint(nano_model: Path):
    """A model_checkpoint[0001] with a random LoRA adapter on M_0 and its merged weights, made by the real store."""
    import dagster as dg
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from resources.storage.checkpoint_store import CheckpointStore

    store = CheckpointStore(str(WORK / "adapted"))

    def build(directory: Path) -> None:
        config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(nano_model), config)
        adapted.save_pretrained(directory / "adapter")
        adapted.merge_and_unload().save_pretrained(directory / "merged")
        AutoTokenizer.from_pretrained(nano_model).save_pretrained(directory / "merged")

    @dg.asset(io_manager_key="checkpoints")
    def initial_policy(context: dg.AssetExecutionContext):
        return store.adopt(context, nano_model, {"source": "directory"})

    @dg.asset(io_manager_key="checkpoints", partitions_def=dg.StaticPartitionsDefinition(["0001"]))
    def model_checkpoint(context: dg.AssetExecutionContext, initial_policy):
        parents = {"start": initial_policy}
        return store.create(context, build, parents=parents, trained_on={}, settings={}, random_seed=1)[0]

    dg.materialize([initial_policy, model_checkpoint], resources={"checkpoints": store}, partition_key="0001")
    return store.current("model_checkpoint", "0001")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a server does not say how long to wait, its client asks again after a moment."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)


def synpo(*arguments: object, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does; SYNPO_HOME does not apply, so every call names its home."""
    environment = {name: value for name, value in os.environ.items() if name not in ("SYNPO_HOME", "DAGSTER_HOME")}
    return subprocess.run(
        [str(Path(sys.executable).with_name("synpo")), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=environment,
    )  # fmt: skip


def synpo_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, for what starts no run: a process of its own takes seconds to load."""
    from synpo_assets.cli.commands import app

    # A command puts its home into the environment. What steps would be forked from would go on importing beside the tests.
    nothing = mock.patch("synpo_assets.cli.executor.start_preloading", return_value=io.BytesIO())
    with mock.patch.dict(os.environ), nothing:
        for name in ("SYNPO_HOME", "DAGSTER_HOME"):
            os.environ.pop(name, None)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


@dataclasses.dataclass(frozen=True)
class NanoRun:
    """Two whole iterations on the nano model through `synpo run`, the first of which failed once on the way."""

    home: Path
    failed: subprocess.CompletedProcess[str]
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def nano_run(nano_model: Path) -> NanoRun:
    home = WORK / "two iterations"
    settings = nano_settings(nano_model)
    settings["response_improver"]["margin_threshold"] = 1e9
    failed = synpo("run", "--settings", write_settings(WORK / "nano.yaml", settings), "--home", home)
    stored = yaml.safe_load((home / "settings.yaml").read_text())
    stored["response_improver"]["margin_threshold"] = -100
    write_settings(home / "settings.yaml", stored)
    return NanoRun(home, failed, synpo("run", "--home", home, "--iterations", 2))
