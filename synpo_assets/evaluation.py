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
    **table(
        Evaluation,
        "responses",
        "scorer.max_length",
        "scorer.pair_convention",
        "engine.dtype",
        "engine.kind",
        evaluation_method,
    ),
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
    texts = held_out.with_columns(policy_response=policy_side["text"], initial_response=initial_side["text"])
    policy, gold = (
        scorer.compare(reward_model, texts.select("prompt", side, "initial_response").rows(), context.log.info)
        for side in ("policy_response", "answer")
    )
    frame = texts.with_columns(
        # Numbers of different comparisons have no common zero: all three are stated beside M_0's in the first one.
        answer_score=policy.second_scores + gold.margins,
        policy_score=policy.first_scores,
        initial_score=policy.second_scores,
        policy_checkpoint_sha=pl.lit(model_checkpoint.sha),
        initial_checkpoint_sha=pl.lit(initial_policy.sha),
        iteration=pl.lit(iteration_of(context), pl.Int64),
    )
    rewards = {f"held_out_reward {name}": frame[f"{name}_score"].mean() for name in ("answer", "policy", "initial")}
    win = win_rate(frame["policy_score"].to_list(), frame["initial_score"].to_list())
    figures = {
        "win_rate_over_initial": win,
        "judge": "the scorer that filtered the pairs",
        "held_out_prompts": frame.height,
        "score_convention": policy.convention,
    }
    cost = (usage + initial_usage).metadata() | (policy.usage + gold.usage).metadata()
    return table_output(context, frame, **rewards, **figures, **cost, **made_by(model_checkpoint))
