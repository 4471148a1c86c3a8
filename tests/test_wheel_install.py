"""The project out of a wheel, in an environment without a checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_checkout(tmp_path, nano_model):
    """What it depends on comes from this environment, after what the new one holds itself."""

    def run(*command, folder=tmp_path):
        told = {
            key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SYNPO_HOME", "DAGSTER_HOME")
        }
        # A long path is not broken at the end of a line.
        done = subprocess.run(command, cwd=folder, env=told | {"COLUMNS": "300"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    # A copy, so that no build folder stays in the checkout.
    run("git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", "checkout")
    run(*build, str(tmp_path / "checkout"))
    (wheel,) = tmp_path.glob("synpo-*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv/bin/python")
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", str(wheel))
    # The path alone: the editable project's own .pth file in that folder is not read, so it cannot stand in for the wheel.
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    assert str(packages) in run(
        python, "-c", "import definitions, resources, synpo_assets; print(definitions.__file__)"
    )
    (tmp_path / "mine.yaml").write_text(
        f"preset: laptop\ninitial_policy: {{source: directory, name: {nano_model}, wheel_sha256: null, wheel_member: null}}\n"
    )
    checked = run(str(tmp_path / "venv/bin/synpo"), "check", "--settings", "mine.yaml")
    assert f"home {tmp_path / '.synpo'}" in " ".join(checked.split())
    listed = run(
        python, "-c",
        "from resources.settings.files import load_settings, preset_path as path\n"
        "for name in ('single_gpu', 'paper_mistral', 'paper_llama3'): load_settings(path(name))\n"
        "from synpo_assets.cli.home import prepare_home; from resources.settings.files import home_directory, home_settings\n"
        "home = home_directory(); prepare_home(home, home_settings(home)); print(*sorted(each.name for each in home.iterdir()))",
    )  # fmt: skip
    assert listed.split() == ["dagster.yaml", "settings.yaml"]
    shipped = {str(file.relative_to(packages)) for file in packages.rglob("*")}
    tracked = run("git", "ls-files", "resources", "synpo_assets", folder=tmp_path / "checkout").splitlines()
    data = {name for name in tracked if not name.endswith((".py", ".md"))}
    assert data <= shipped
