"""First of all: what is installed, whether it fits the project's requirements, whether it imports, and which device there is."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import tomllib
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import resources
from resources.models.device import device_name
from resources.settings.machine import Engine
from tests.benchmarks.gpu.common import DEVICE, say


def main() -> None:
    project = tomllib.loads((Path(resources.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["qlora"]]]
    versions = {
        canonicalize_name(package.metadata["Name"]): package.version for package in importlib.metadata.distributions()
    }
    names = {canonicalize_name(requirement.name) for requirement in needed}
    others = [
        str(requirement) for requirement in needed
        if not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"))
    ]  # fmt: skip
    extra = ("vllm", "triton", "tokenizers", "safetensors", "pandas", "pyarrow")
    found = {name: versions.get(name) for name in sorted(names.union(extra))}
    # Neither the machine's own PyTorch nor what goes with it has to be what the project pins: the imports decide.
    say(
        "versions", ok=names <= versions.keys(), python=platform.python_version(), found=found, other_than_stated=others
    )
    failed = {}
    for module, packages in importlib.metadata.packages_distributions().items():
        if names.intersection(map(canonicalize_name, packages)) and not module.startswith("_"):
            try:
                importlib.import_module(module)
            except Exception as error:
                failed[module] = f"{type(error).__name__}: {error}"[:200]
    say("imports", ok=not failed, failed=failed)
    say(
        "device", ok=DEVICE == "cpu" or torch.cuda.is_available(), cuda=torch.version.cuda, cores=os.cpu_count(),
        name=device_name(Engine()), disk_free_gb=round(shutil.disk_usage("/tmp").free / 1e9),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
    )  # fmt: skip


if __name__ == "__main__":
    main()
