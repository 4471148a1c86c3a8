"""Rules about the code itself."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from resources.settings.files import load_settings, preset_path
from synpo_assets.algorithm import stages_of
from synpo_assets.graph import code_versions
from synpo_assets.graph.code_versions import Definition

ROOT = Path(__file__).parents[1]
READMES = ["README.md", "synpo_assets/README.md", "resources/README.md", "tests/results/README.md"]
HEAVY = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "vllm",
    "ray",
    "yake",
    "py3langid",
    "matplotlib",
    "lm_eval",
]


def test_the_code_location_loads_without_heavy_libraries():
    code = f"import sys, definitions; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_all_examples_lie_where_pytest_looks_for_them():
    paths = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    modules = [path for folder in ("resources", "synpo_assets") for path in (ROOT / folder).rglob("*.py")]
    passed_over = [path for path in modules if not any(path.is_relative_to(ROOT / place) for place in paths)]
    assert [path for path in passed_over if ">>> " in path.read_text()] == []


@pytest.mark.slow
def test_what_the_steps_of_a_run_are_forked_from_can_be_imported():
    """The forkserver passes over a name that it cannot import, and every step would load it for itself."""
    from synpo_assets.cli.executor import PRELOADED

    code = f"import importlib\nfor name in {PRELOADED}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


# What each folder may import of the others; `resources` in this order, each only from those before it.
RESOURCES = ("common", "settings", "storage", "models", "generation", "scoring", "training", "judging")
PIPELINE = {
    "method": {"method"},
    "graph": {"graph", "method"},
    "stages": {"stages", "graph", "method"},
    "evaluation": {"evaluation", "stages", "graph", "method"},
    "reports": {"reports", "stages", "graph", "method"},
    "publishing": {"publishing", "reports", "stages", "graph", "method"},
}
HEAVIEST = {"torch", "transformers", "trl", "peft", "vllm"}


@pytest.mark.parametrize("folder", RESOURCES)
def test_resources_know_no_asset_and_only_what_is_below_them(folder):
    below = {f"resources.{name}" for name in RESOURCES[: RESOURCES.index(folder) + 1]}
    for path in (ROOT / "resources" / folder).rglob("*.py"):
        ours = {name for name in imported(path) if name.split(".")[0] in ("resources", "synpo_assets", "definitions")}
        assert {name for name in ours if ".".join(name.split(".")[:2]) not in below} == set(), path


# Stages that look up what the iteration before left.
OF_OTHERS = ("policy", "preference_history")
READ_BY_NAME = re.compile(r'services\.(?:tables|checkpoints)\.\w+\(\s*"(\w+)"')


def read_by_name(function):
    """The assets that the code of a stage looks up by their names, wherever it does so."""
    start = Definition(function.__module__, function.__name__)
    waiting, seen, found = [start], {start}, set()
    while waiting:
        definition = waiting.pop()
        statement = code_versions._names(definition.module)[definition.name]
        lines = code_versions._file(definition.module).read_text().splitlines()
        found |= set(READ_BY_NAME.findall("\n".join(lines[statement.lineno - 1 : statement.end_lineno])))
        new = code_versions._read(definition.module, statement)[1] - seen
        seen |= new
        waiting += new
    return found


def test_what_a_stage_looks_up_is_made_before_it():
    """A run that makes both anew would else read what is not made yet, or is damaged; what other iterations left is there."""
    stages = stages_of(load_settings(preset_path("laptop")))
    once = {stage.name for stage in stages if stage.once}
    known = {stage.name: {*stage.inputs, *stage.deps, *stage.deps_where_made} for stage in stages}
    looked_up = {stage.name: read_by_name(stage.function) - once for stage in stages if stage.name not in OF_OTHERS}
    assert looked_up["promotion"] == {"model_checkpoint", "evaluation"}
    assert {name: names - known[name] for name, names in looked_up.items() if names - known[name]} == {}


@pytest.mark.parametrize("folder", PIPELINE)
def test_the_pipeline_imports_downwards_and_no_engine(folder):
    allowed = {f"synpo_assets.{name}" for name in PIPELINE[folder]}
    for path in (ROOT / "synpo_assets" / folder).rglob("*.py"):
        names = set(imported(path))
        own = {".".join(name.split(".")[:2]) for name in names if name.startswith("synpo_assets")}
        assert own <= allowed, path
        assert HEAVIEST.isdisjoint(name.split(".")[0] for name in names), path
        engines = {name for name in names if name.startswith("resources.generation")}
        assert engines <= {"resources.generation.language_model"}, path
        assert "definitions" not in names, path
        if folder == "method":
            assert not {"dagster", "resources"} & {name.split(".")[0] for name in names}, path


def test_no_file_is_longer_than_350_lines():
    files = [*(ROOT / "synpo_assets").rglob("*.py"), *(ROOT / "resources").rglob("*.py")]
    assert [file for file in files if len(file.read_text().splitlines()) > 350] == []


def test_definitions_stay_short():
    assert len((ROOT / "definitions.py").read_text().splitlines()) <= 60


def test_the_root_holds_only_what_was_agreed():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert top <= {
        "pyproject.toml", "README.md", "synpo_assets", "resources", "definitions.py", "tests", "constraints.txt", ".ci",
        ".gitignore", "LICENSE",
    }  # fmt: skip


def readme_command(name):
    found = re.findall(rf"<!-- {name} -->\n```bash\n(.+?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(found) == 1, f"{name} must mark one code block"
    return found[0]


def test_the_readme_commands_can_be_extracted_and_ci_runs_the_test_command():
    assert "synpo run" in readme_command("quickstart:run")
    assert "pytest" in readme_command("quickstart:test")
    assert "quickstart:test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("readme", READMES)
def test_every_setting_named_in_a_readme_exists(readme):
    from resources.settings.reference import sections
    from resources.settings.settings import Settings

    known = {f"{name}.{field}" for name, section in sections(Settings) for field in section.model_fields}
    named = re.findall(r"`(\w+(?:\.\w+)+)(?:`|: )", (ROOT / readme).read_text())
    assert [name for name in named if name.split(".")[0] in Settings.model_fields and name not in known] == []


@pytest.mark.parametrize("readme", READMES)
def test_the_settings_shown_in_a_readme_load(readme, tmp_path):
    from resources.settings.files import load_settings

    for block in re.findall(r"```yaml\n(.+?)```", (ROOT / readme).read_text(), re.DOTALL):
        (tmp_path / "shown.yaml").write_text(block if "preset:" in block else f"preset: laptop\n{block}")
        load_settings(tmp_path / "shown.yaml")


@pytest.mark.parametrize(
    "readme", [*READMES, "resources/deployment/README.md", "tests/results/four_iterations/README.md"]
)
def test_what_a_readme_links_to_exists(readme):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / readme).read_text())
    assert [link for link in links if not (ROOT / readme).parent.joinpath(link).exists()] == []


def test_the_table_of_the_algorithm_names_the_files_that_define_its_assets():
    rows = re.findall(r"^\|[^|]+\| (`.+`) \| (\[.+\.py\)) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 9
    for assets, files in rows:
        code = "".join((ROOT / file).read_text() for file in re.findall(r"\((.+?)\)", files))
        for asset in re.findall(r"\w+", assets):
            assert re.search(rf"^(def {asset}\(|{asset} = )", code, re.MULTILINE), f"{asset} is not defined in {files}"


def test_one_iteration_at_a_time_is_configured():
    config = yaml.safe_load((ROOT / "synpo_assets/cli/dagster.yaml").read_text())["concurrency"]
    limit = config["runs"]["tag_concurrency_limits"][0]
    assert (limit["key"], limit["limit"]) == ("dagster/backfill", 1)
    assert config["pools"] == {"granularity": "op", "default_limit": 1}
