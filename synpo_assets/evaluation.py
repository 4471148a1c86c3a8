"""How M_t compares with M_0 on held-out prompts.

Paper (section 3): AlpacaEval 2, Arena-Hard and MT-Bench with a GPT-4 judge, and the Open LLM leaderboard.
Here: both models answer the held-out seed prompts, and the scorer compares the answers. The scorer also filtered the
training pairs, so this shows whether training moved the model where it was meant to go; it is not an independent
judgement.
"""

import dagster as dg
import polars as pl

from resources.checkpoint_store import Checkpoint
from resources.language_model import LanguageModel
from resources.scorer import RewardScorer
from resources.settings import Settings
from synpo_assets.method import evaluation as evaluation_method
from synpo_assets.method.evaluation import win_rate
from synpo_assets.method.templates import user_message
from synpo_assets.partitions import GPU_POOL, ITERATIONS, iteration_of, table
from synpo_assets.presentation import made_by, table_output
from synpo_assets.schemas import Evaluation


@dg.asset(
    partitions_def=ITERATIONS,
    **table(Evaluation, "responses", "scorer.max_length", "engine.dtype", "engine.kind", evaluation_method),
    pool=GPU_POOL,
    kinds={"huggingface"},
)
def evaluation(
    context: dg.AssetExecutionContext,
    model_checkpoint: Checkpoint,
    initial_policy: Checkpoint,
    reward_model: Checkpoint,
    seed_pairs: pl.DataFrame,
    language_model: LanguageModel,
    scorer: RewardScorer,
    settings: dg.ResourceParam[Settings],
) -> dg.Output[pl.DataFrame]:
    """Held-out rewards of M_t beside M_0, judged by the scorer that also filtered the training pairs."""
    held_out = seed_pairs.filter(split="held_out").select("prompt_id", "prompt", "answer")
    asked = [(prompt_id, user_message(prompt)) for prompt_id, prompt in held_out.select("prompt_id", "prompt").rows()]
    sampling = settings.responses.sampling
    policy_side, usage = language_model.answer(model_checkpoint, asked, sampling, context.log.info)
    initial_side, initial_usage = language_model.answer(initial_policy, asked, sampling, context.log.info)
    texts = {"answer": held_out["answer"], "policy": policy_side["text"], "initial": initial_side["text"]}
    rows = [(prompt, text) for side in texts.values() for prompt, text in zip(held_out["prompt"], side, strict=True)]
    scores = scorer.score(reward_model, rows, context.log.info)
    columns = {
        f"{name}_score": scores.values[i * held_out.height : (i + 1) * held_out.height] for i, name in enumerate(texts)
    }
    frame = held_out.with_columns(
        policy_response=texts["policy"],
        initial_response=texts["initial"],
        **{name: pl.Series(values, dtype=pl.Float64) for name, values in columns.items()},
        policy_checkpoint_sha=pl.lit(model_checkpoint.sha),
        initial_checkpoint_sha=pl.lit(initial_policy.sha),
        iteration=pl.lit(iteration_of(context), pl.Int64),
    )
    rewards = {f"held_out_reward {name}": frame[f"{name}_score"].mean() for name in texts}
    win = win_rate(frame["policy_score"].to_list(), frame["initial_score"].to_list())
    figures = {
        "win_rate_over_initial": win,
        "judge": "the scorer that filtered the pairs",
        "held_out_prompts": frame.height,
    }
    usage_figures = (usage + initial_usage).metadata()
    return table_output(
        context, frame, **rewards, **figures, **usage_figures, **scores.metadata(), **made_by(model_checkpoint)
    )
