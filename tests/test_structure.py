"""Rules about the code itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
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


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize(("folder", "forbidden"), [
    ("resources", ("synpo_assets",)),
    ("synpo_assets/method", ("dagster", "resources", "torch", "transformers")),
    ("synpo_assets", ("torch", "transformers", "trl", "peft", "vllm", "resources.generation")),
])  # fmt: skip
def test_layers_do_not_reach_over_each_other(folder, forbidden):
    for path in (ROOT / folder).rglob("*.py"):
        reached = [name for name in imported(path) if name.split(".")[0] in forbidden or (name.startswith("resources.generation")
                   and "resources.generation" in forbidden)]  # fmt: skip
        assert reached == [], path


def test_definitions_stay_short():
    assert len((ROOT / "definitions.py").read_text().splitlines()) <= 60


def test_the_root_holds_only_what_was_agreed():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert top <= {
        "pyproject.toml", "README.md", "synpo_assets", "resources", "definitions.py", "tests", "dagster.yaml", ".ci",
        ".gitignore", "LICENSE",
    }  # fmt: skip


def readme_command(name):
    found = re.findall(rf"<!-- {name} -->\n```bash\n(.+?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(found) == 1, f"{name} must stand alone in one code block"
    return found[0]


def test_the_readme_commands_can_be_extracted_and_ci_runs_the_test_command():
    assert "synpo run" in readme_command("quickstart:run")
    assert "pytest" in readme_command("quickstart:test")
    assert "quickstart:test" in (ROOT / ".ci" / "run").read_text()


def test_every_setting_named_in_the_readme_exists():
    from resources.settings.settings import Settings

    sections = {name: field.annotation.model_fields for name, field in Settings.model_fields.items()
                if hasattr(field.annotation, "model_fields")}  # fmt: skip
    for section, field in re.findall(r"`(\w+)\.(\w+)(?:\.\w+)*`", (ROOT / "README.md").read_text()):
        if section in sections:
            assert field in sections[section], f"{section}.{field}"


def test_one_iteration_at_a_time_is_configured():
    config = yaml.safe_load((ROOT / "dagster.yaml").read_text())["concurrency"]
    limit = config["runs"]["tag_concurrency_limits"][0]
    assert (limit["key"], limit["limit"]) == ("dagster/backfill", 1)
    assert config["pools"] == {"granularity": "op", "default_limit": 1}
