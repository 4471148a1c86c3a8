"""The whole graph through `synpo run`, on the taught nano model or on SmolLM2 with the preset laptop.

python tests/benchmarks/gpu/pipeline.py nano 2
python tests/benchmarks/gpu/pipeline.py nano 1 vllm
python tests/benchmarks/gpu/pipeline.py laptop 2
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.gpu.common import DEVICE, WORK, say, taught
from tests.nano import EMBEDDING_MODEL, make_nano_embedding_model, nano_settings, write_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["nano", "laptop"])
    parser.add_argument("iterations", type=int)
    parser.add_argument("engine", nargs="?", choices=["auto", "transformers", "vllm"], default="auto")
    arguments = parser.parse_args()
    name = f"{arguments.which}-{arguments.engine}"
    embedding_model = WORK / "models" / EMBEDDING_MODEL
    if not embedding_model.exists():
        make_nano_embedding_model(embedding_model)
    if arguments.which == "nano":
        settings = nano_settings(Path(taught().weights))
    else:
        # The preset's own embedding model would have to be downloaded.
        embeddings = {"source": "directory", "name": str(embedding_model)}
        settings = {"preset": "laptop", "diversity": {"embedding_model": embeddings}, "engine": {"shard_rows": 64}}
    settings["engine"] |= {"kind": arguments.engine, "device": DEVICE, "threads": None}
    shutil.rmtree(WORK / name, ignore_errors=True)
    command = [
        Path(sys.executable).with_name("synpo"), "run", "--iterations", str(arguments.iterations), "--home", WORK / name,
        "--settings", write_settings(WORK / f"{name}.yaml", settings),
    ]  # fmt: skip
    started = time.monotonic()
    status = subprocess.run(command, stdout=sys.stderr).returncode
    seconds = round(time.monotonic() - started, 1)
    say("pipeline", ok=not status, seconds=seconds, **vars(arguments))


if __name__ == "__main__":
    main()
