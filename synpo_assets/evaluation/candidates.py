"""Training and measuring the candidates of a search: what is finished is kept, and a budget is kept to."""

import contextvars
import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from resources.common.errors import DamageError, FinalError
from resources.generation.language_model import Usage
from resources.judging.judge import RewardJudge
from resources.judging.judge_choice import INDEPENDENT, judge_scorer
from resources.scoring.scorer import ScoringUsage
from resources.settings.method import PreferenceOptimization
from resources.settings.search import Search, combinations, tried_text
from resources.storage.checkpoint_store import Checkpoint
from resources.storage.files import json_sha256
from resources.training.job import TrainingSummary
from resources.training.losses import loss_module
from resources.training.trainer import Trainer
from synpo_assets.evaluation.gold_comparison import gain_metric
from synpo_assets.evaluation.instruction_following import instruction_answers
from synpo_assets.evaluation.win_rates import judged_by
from synpo_assets.graph.code_versions import code_version
from synpo_assets.graph.metrics import Metric, MetricName
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import ENGINE_READS
from synpo_assets.method.cut import whole_answers
from synpo_assets.method.evaluation import win_rates
from synpo_assets.method.length_control import TOO_FEW_ALIKE
from synpo_assets.method.ranking import repeated_prompts
from synpo_assets.method.templates import prompt_requests
from synpo_assets.method.verifiable import shares_followed
from synpo_assets.stages.optimization import TRAINING_READS, optimized, versions_of

# The folder of the checkpoint store that holds them, called like the asset.
CANDIDATES = "search_candidates"
# What `search.metric` is called among all metrics.
METRICS: Mapping[str, MetricName] = {
    "length_controlled": "length_controlled_win_rate", "win_rate": "win_rate", "instructions": "verifiable_gain",
}  # fmt: skip
COMPARED = (("candidate", "initial"),)
# Why a candidate has no value.
NOTHING_MEASURED = {
    "length_controlled": f"{TOO_FEW_ALIKE}: more held-out prompts are needed (seed_data.held_out, held_out_limit), or "
    "preference_optimization.search.metric: win_rate",
    "win_rate": "the judge gave no verdict on dev: more held-out prompts are needed (seed_data.held_out, held_out_limit)",
    "instructions": "no verifiable instruction is in dev: more are needed (seed_data.verifiable, verifiable_limit)",
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What became of the values that were tried."""

    name: str
    options: PreferenceOptimization
    tried: Mapping[str, Any]
    made: Checkpoint | None = None
    summary: TrainingSummary | None = None
    measured: Metric | None = None  # On dev.
    left_out: str | None = None
    earlier_seconds: float = 0.0  # Of a training that an earlier run finished.

    @property
    def text(self) -> str:
        """The values as people read them."""
        return tried_text(self.tried)


def best_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one with the best value, of equal ones the first; None if none has a value."""
    valued = [(each.measured.value, each) for each in candidates if each.measured and each.measured.value is not None]
    return max(valued, key=lambda pair: pair[0])[1] if valued else None


@dataclasses.dataclass(frozen=True)
class Searching:
    """A search under way. What it measures on is of the dev split alone: it is handed nothing else."""

    context: dg.AssetExecutionContext
    services: Services
    search: Search
    models: tuple[Checkpoint, Checkpoint]
    pairs: pl.DataFrame
    dev: pl.DataFrame
    instructions: pl.DataFrame
    generated: list[Usage] = dataclasses.field(default_factory=list)
    scored: list[ScoringUsage] = dataclasses.field(default_factory=list)

    def candidates(self) -> list[Candidate]:
        """All candidates in the order in which they are tried, with those that the budget left out."""
        trainers = self.services.trainer.side_by_side(self.search.parallel)
        found, started, longest = list[Candidate](), time.monotonic(), 0.0
        for turn in self.search.turns:
            best = best_of(found)
            start = best.tried if best else {}
            wanted = {each.name: each for each in (self._planned({**start, **new}) for new in combinations(turn))}
            waiting = [each for name, each in wanted.items() if name not in {before.name for before in found}]
            while waiting:
                begun = time.monotonic()
                earlier = sum(each.earlier_seconds for each in found) / len(trainers)
                if reason := self._end_of_budget(len(found), begun - started + earlier, longest):
                    found += [dataclasses.replace(each, left_out=reason) for each in waiting]
                    break
                room = len(waiting) if self.search.max_candidates is None else self.search.max_candidates - len(found)
                wave = waiting[: min(len(trainers), room)]
                waiting = waiting[len(wave) :]
                made = [self._measured(each) for each in self._side_by_side(wave, trainers)]
                found += made
                longest = max(longest, time.monotonic() - begun + max(each.earlier_seconds for each in made))
        return found

    def _planned(self, tried: Mapping[str, Any]) -> Candidate:
        """A candidate by the values that it is tried with; its name is that of the same training in any run."""
        options = self.services.settings.preference_optimization.with_values(tried)
        settings = self.services.settings.model_copy(update={"preference_optimization": options})
        code = [optimized, loss_module(options.loss.kind).trainer]
        version = code_version(code, None, [*TRAINING_READS, *ENGINE_READS["trains"], "random_seed"], settings)
        deciding = [version, [model.sha for model in self.models], versions_of(self.pairs)]
        name = f"{self.context.partition_key}-{json_sha256(deciding)[:8]}"
        return Candidate(name, options, {each: options.searchable[each] for each in self.search.space})

    def _end_of_budget(self, begun: int, seconds: float, longest: float) -> str | None:
        """Why no further candidate is begun; None while there is room. The first one always is."""
        most, minutes = self.search.max_candidates, self.search.max_minutes
        if most is not None and begun >= most:
            return f"max_candidates is {most}"
        if minutes is not None and begun and (seconds + longest) / 60 > minutes:
            return (
                f"max_minutes is {minutes:g}: {seconds / 60:.1f} were used, and one candidate took {longest / 60:.1f}"
            )
        return None

    def _side_by_side(self, wave: Sequence[Candidate], trainers: Sequence[Trainer]) -> list[Candidate]:
        """Trains candidates, each with a trainer of its own."""
        if len(trainers) == 1:
            return [self._trained(each, trainers[0]) for each in wave]
        with ThreadPoolExecutor(len(trainers)) as threads:
            trainings = [
                # What a step says of itself, it knows from the context of its thread.
                threads.submit(contextvars.copy_context().run, self._trained, each, trainer)
                for each, trainer in zip(wave, trainers, strict=False)
            ]
            return [training.result() for training in trainings]

    def _trained(self, candidate: Candidate, trainer: Trainer) -> Candidate:
        """The candidate with its checkpoint, which an earlier run may have made, or with the reason why there is none."""
        store, say = self.services.checkpoints, self.context.log
        try:
            made = store.current(CANDIDATES, candidate.name)
            summary = TrainingSummary.kept(Path(made.directory))
            say.info(f"The candidate with {candidate.text} was trained earlier and is kept.")
            return dataclasses.replace(candidate, made=made, summary=summary, earlier_seconds=summary.seconds)
        except DamageError:
            say.info(f"Training the candidate with {candidate.text}.")
        try:
            made, summary = optimized(
                self.context, self.services, candidate.options, self.models, self.pairs, trainer, tried=candidate.tried
            )
        except FinalError as error:
            say.warning(f"The candidate with {candidate.text} is left out: {error.description}")
            return dataclasses.replace(candidate, left_out=error.description)
        store.point_to(CANDIDATES, candidate.name, made)
        return dataclasses.replace(candidate, made=made, summary=summary)

    def _measured(self, candidate: Candidate) -> Candidate:
        """The candidate with what it reached on dev."""
        if candidate.made is None:
            return candidate
        models = {"candidate": candidate.made, "initial": self.models[0]}
        measured = self._followed(models) if self.search.metric == "instructions" else self._judged(models)
        value = "no value" if measured.value is None else f"{measured.value:.3f}"
        self.context.log.info(
            f"The candidate with {candidate.text}: {measured.metric} {value} on dev (n = {measured.n} prompts or templates)."
        )
        left_out = NOTHING_MEASURED[self.search.metric] if measured.value is None else None
        return dataclasses.replace(candidate, measured=measured, left_out=left_out)

    def _judged(self, models: Mapping[str, Checkpoint]) -> Metric:
        """The win rate over M_0 by the independent judge, for answers as they are or of equal length, as in `evaluation`."""
        settings = self.services.settings
        texts = repeated_prompts(self.dev.select("prompt_id", "prompt"), settings.evaluation.samples)
        for name, model in models.items():
            written, usage = self.services.language_model.answer(
                model, prompt_requests(texts, "sample_id"), settings.evaluation.sampling
            )
            answers = {f"{name}_response": whole_answers(written), f"{name}_cut": written["finish_reason"] == "length"}
            texts = texts.with_columns(**answers)
            self.generated.append(usage)
        judge_model = self.services.checkpoints.current("judge_model", None)
        judge = RewardJudge("judge", INDEPENDENT, judge_scorer(settings.judge, self.services.scorer), judge_model)
        judged, usages = judged_by([judge], texts, COMPARED)
        self.scored.extend(usages)
        rates = win_rates(texts.with_columns(*judged), {"judge": INDEPENDENT}, COMPARED, settings.random_seed)
        rate, metric = rates.row(0, named=True), self.search.metric
        low, high = ("low", "high") if metric == "win_rate" else (f"{metric}_low", f"{metric}_high")
        return Metric(METRICS[metric], rate[metric], low=rate[low], high=rate[high], n=rate["prompts"])

    def _followed(self, models: Mapping[str, Checkpoint]) -> Metric:
        """The share of verifiable instructions that it follows, less M_0's, as in `instruction_following`."""
        frame, usages = instruction_answers(self.services, models, self.instructions)
        self.generated.extend(usages)
        shares = shares_followed(frame)
        gains, sha = shares["candidate"] - shares["initial"], models["candidate"].sha
        return gain_metric("verifiable_gain", gains, "initial", sha, groups=shares["template"])
