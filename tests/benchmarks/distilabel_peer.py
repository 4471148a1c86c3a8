"""distilabel's TransformersLLM on the prompts of `tests.benchmarks.generation`, run by the Python of its own environment.

    python -m venv peer && peer/bin/pip install torch requests 'distilabel[hf-transformers]==1.5.3'
    python -m tests.benchmarks.generation transformers --peer peer/bin/python

It imports nothing of this project. The job comes as JSON on standard input; tokens and seconds go to standard output.
"""

import json
import sys
import time


def main() -> None:
    import torch
    from distilabel.models.llms import TransformersLLM

    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    model = TransformersLLM(model=job["model"], torch_dtype="float32", device="cpu")
    model.load()
    options = {"max_new_tokens": job["tokens"], "temperature": job["temperature"], "top_k": job["top_k"]}
    started, tokens = time.monotonic(), 0
    # A distilabel step hands its model one batch of rows (input_batch_size) at a time.
    for start in range(0, len(job["prompts"]), job["rows_at_a_time"]):
        rows = job["prompts"][start : start + job["rows_at_a_time"]]
        for output in model.generate_outputs(inputs=rows, repetition_penalty=1.0, **options):
            tokens += sum(output["statistics"]["output_tokens"])
    print(json.dumps([tokens, time.monotonic() - started]))  # noqa: T201


if __name__ == "__main__":
    main()
