"""What can be said of M_t without any judge: instructions that a program checks, and the gold answers.

Paper (section 3): GPT-4 as judge, and benchmarks with one right answer; no measure that asks no model.
Here: beside the judges (evaluation.py), three figures that cannot be pleased by style. How many instructions with
checkable constraints M_t follows, as in IFEval (https://arxiv.org/abs/2311.07911) with rules and prompts of our own; how
likely it finds the held-out gold answers; and how close its own answers are to them in meaning, by the cosine of
sentence embeddings. M_0 stands beside it in each. Held-out answers are those of `evaluation`.
"""

import dagster as dg
import polars as pl

from resources.common.errors import FinalError
from resources.generation.language_model import LanguageModel, Usage
from resources.models.embeddings import SentenceEmbedder
from resources.models.likelihood import AnswerLikelihood
from resources.models.model_source import fetch_embedding_model
from resources.settings.settings import Settings
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.tables import table_metadata
from synpo_assets.cli.preflight import verifiable_table
from synpo_assets.graph.partitions import GPU_POOL, ITERATIONS, iteration_of, table
from synpo_assets.graph.presentation import made_by, table_output
from synpo_assets.graph.schemas import GoldComparison, InstructionFollowing, VerifiableInstructions
from synpo_assets.method import verifiable as verifiable_method
from synpo_assets.method.evaluation import gain_figures
from synpo_assets.method.templates import user_message
from synpo_assets.method.verifiable import SAMPLES, followed, followed_figures, rates_by_rule

# An empty answer has no embedding; this says as little.
NOTHING_SAID = "."


@dg.asset(**table(VerifiableInstructions, "seed_data", verifiable_method), kinds={"polars"})
def verifiable_instructions(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings]
) -> dg.Output[pl.DataFrame]:
    """Instructions with constraints that a program can check; no training reads them."""
    frame = verifiable_table(settings)
    rules = frame.explode("constraints").unnest("constraints").group_by("rule").len().sort("len", descending=True)
    return table_output(context, frame, constraints=table_metadata(rules))


@dg.asset(
    partitions_def=ITERATIONS,
    **table(InstructionFollowing, "responses", "engine.dtype", "engine.kind", verifiable_method),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def instruction_following(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    initial_policy: Checkpoint,
    verifiable_instructions: pl.DataFrame,
    language_model: LanguageModel,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """Which of the verifiable instructions M_t follows, beside M_0."""
    models = {"policy": model_checkpoint, "initial": initial_policy}
    samples = pl.DataFrame({"sample": range(1, SAMPLES + 1)}, schema={"sample": pl.Int64})
    frame, usages = verifiable_instructions.join(samples, how="cross"), list[Usage]()
    asked = [
        (f"{prompt_id} sample {sample}", user_message(prompt))
        for prompt_id, prompt, sample in frame.select("prompt_id", "prompt", "sample").rows()
    ]
    for name, model in models.items():
        written, usage = language_model.answer(model, asked, settings.responses.sampling, context.log.info)
        met = [followed(each, text) for each, text in zip(frame["constraints"].to_list(), written["text"], strict=True)]
        frame = frame.with_columns(
            written["text"].alias(f"{name}_response"), pl.Series(f"{name}_met", met, dtype=pl.List(pl.Boolean))
        )
        usages.append(usage)
    shas = {f"{name}_checkpoint_sha": pl.lit(model.sha) for name, model in models.items()}
    frame = frame.with_columns(**shas, iteration=pl.lit(iteration_of(context), pl.Int64))
    return table_output(
        context,
        frame.select(*InstructionFollowing.to_schema().columns),
        instructions=verifiable_instructions.height,
        samples_each=SAMPLES,
        **followed_figures(frame, settings.random_seed),
        by_rule=table_metadata(rates_by_rule(frame)),
        **sum(usages[1:], usages[0]).metadata(),
        **made_by(model_checkpoint),
    )


@dg.asset(
    partitions_def=ITERATIONS,
    **table(GoldComparison, "diversity.embedding_model", "engine.dtype"),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def gold_comparison(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    initial_policy: Checkpoint,
    evaluation: pl.DataFrame,
    likelihood: AnswerLikelihood,
    embedder: SentenceEmbedder,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """How likely M_t finds the held-out gold answers, and how close its own are to them, beside M_0."""
    refuse_answers_of_another(model_checkpoint, evaluation)
    models = {"policy": model_checkpoint, "initial": initial_policy}
    gold = evaluation.select("prompt", "answer").rows()
    measured = {name: likelihood.measure(model, gold, context.log.info) for name, model in models.items()}
    weights, origin = fetch_embedding_model(settings.diversity.embedding_model, settings.engine.trust_remote_code)
    columns = ("answer", *(f"{name}_response" for name in models))
    texts = [text.strip() or NOTHING_SAID for column in columns for text in evaluation[column]]
    embedded = embedder.embed(weights, texts, context.log.info)
    vectors = embedded.vectors.reshape(len(columns), evaluation.height, -1)
    similarities = dict(zip(models, (vectors[1:] * vectors[0]).sum(axis=2), strict=True))
    tokens = embedded.tokens + sum(each.tokens for each in measured.values())
    seconds = embedded.seconds + sum(each.seconds for each in measured.values())
    frame = evaluation.select("prompt_id", "prompt", "answer").with_columns(
        *(pl.Series(f"{name}_log_likelihood", measured[name].per_token) for name in models),
        *(pl.Series(f"{name}_similarity", similarities[name], dtype=pl.Float64) for name in models),
        *(pl.lit(model.sha).alias(f"{name}_checkpoint_sha") for name, model in models.items()),
        iteration=pl.lit(iteration_of(context), pl.Int64),
    )
    return table_output(
        context,
        frame,
        **{f"gold_log_likelihood {name}": frame[f"{name}_log_likelihood"].mean() for name in models},
        **{f"gold_similarity {name}": frame[f"{name}_similarity"].mean() for name in models},
        **gold_gains(frame, settings.random_seed),
        embedding_model=origin["name"],
        texts_cut=embedded.texts_cut,
        tokens=tokens,
        seconds=round(seconds, 1),
        tokens_per_second=round(tokens / seconds, 1),
        **made_by(model_checkpoint),
    )


def gold_gains(compared: pl.DataFrame, random_seed: int) -> dict[str, float | None]:
    """How much more likely M_t finds gold than M_0 does, and how much closer its answers are, with intervals over prompts."""
    return {
        name: value
        for measure in ("log_likelihood", "similarity")
        for name, value in gain_figures(
            f"gold_{measure}_gain", compared[f"policy_{measure}"] - compared[f"initial_{measure}"], random_seed
        ).items()
    }


def refuse_answers_of_another(model_checkpoint: Checkpoint, evaluation: pl.DataFrame) -> None:
    """Raises a sentence if the answers in `evaluation` are not those of this M_t.

    Raises:
        FinalError: It says what to materialize.
    """
    answered = evaluation["policy_checkpoint_sha"].first()
    if answered != model_checkpoint.sha:
        raise FinalError(
            f"The answers in `evaluation` are those of {str(answered)[:16]}, not of {model_checkpoint.label}, which is "
            f"{model_checkpoint.sha[:16]}: materialize `evaluation` of this iteration again first."
        )
