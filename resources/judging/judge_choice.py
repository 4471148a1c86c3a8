"""Which judges the settings mean."""

from resources.judging.judge import Judge, RewardJudge
from resources.judging.server_judge import ServerJudge
from resources.judging.topic_labeler import TopicLabeler
from resources.scoring.scorer import RewardScorer
from resources.settings.evaluation import Judge as JudgeSettings
from resources.storage.checkpoint_store import Checkpoint

INDEPENDENT = "independent judge"
TOOK_PART = "scorer (took part in training)"


def open_judges(
    judge: JudgeSettings, scorer: RewardScorer, judge_model: Checkpoint, reward_model: Checkpoint
) -> list[Judge]:
    """The independent judge, the scorer that filtered the training pairs, and the server's model if one is stated."""
    judges: list[Judge] = [
        RewardJudge("judge", INDEPENDENT, judge_scorer(judge, scorer), judge_model),
        RewardJudge("scorer", TOOK_PART, scorer, reward_model),
    ]
    return [*judges, server_judge(judge, scorer)] if judge.server else judges


def judge_scorer(judge: JudgeSettings, scorer: RewardScorer) -> RewardScorer:
    """How the independent judge is asked: it is always a reward model, whatever the scorer is."""
    return RewardScorer(shards=scorer.shards, engine=scorer.engine, scorer=judge.scorer)


def server_judge(judge: JudgeSettings, scorer: RewardScorer) -> ServerJudge:
    """The model of `judge.server`, which must be stated."""
    assert judge.server is not None
    return ServerJudge(judge.server, scorer.shards, scorer.engine.shard_rows)


def topic_labeler(judge: JudgeSettings, scorer: RewardScorer) -> TopicLabeler:
    """The model of `judge.server`, which must be stated, asked for topics."""
    assert judge.server is not None
    return TopicLabeler(judge.server, scorer.shards, scorer.engine.shard_rows)
