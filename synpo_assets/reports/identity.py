"""Which experiment a report is of."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from resources.models.device import device_name
from resources.storage.manifests import ONCE
from synpo_assets.graph.services import Services
from synpo_assets.graph.used_settings import used_in
from synpo_assets.reports.finished import FinishedIteration
from synpo_assets.reports.search import chosen_values

# What an experiment is told apart by, as far as it has them.
TELLING = (
    "preferences.chosen_from", "prompt_generator.prompts_per_iteration", "preferences.pairs_per_iteration",
    "preferences.margin_threshold", "preference_optimization.loss", "preference_optimization.training.learning_rate",
    "preference_optimization.training.epochs", "preference_optimization.training.batch_size", "scorer.kind", "judge.kind",
    "evaluation.samples", "evaluation.sampling.max_new_tokens", "engine.kind", "engine.dtype", "random_seed",
)  # fmt: skip


def identity_of(services: Services, iterations: Sequence[FinishedIteration]) -> dict[str, str]:
    """M_0, home, preset, dates, machine and versions, by name."""
    settings, manifest = services.settings, services.checkpoints.manifest("initial_policy", None)
    name = settings.initial_policy.name
    made = sorted(str(each.manifest["created"])[:16].replace("T", " ") for each in iterations if each.manifest)
    libraries = iterations[-1].manifest.get("libraries", {})
    versions = {"synpo": importlib.metadata.version("synpo")} | libraries
    return {
        # The path of a local model is nobody's business.
        "M_0": (Path(name).name if Path(name).is_absolute() else name)
        + (f", sha {manifest['sha'][:16]}" if manifest else ""),
        "Home": str(services.home),
        "Preset": settings.preset,
        "Checkpoints made": f"{' to '.join(dict.fromkeys([made[0], made[-1]]))} UTC" if made else "unknown",
        "Machine of this report": device_name(settings.engine),
        "Versions": ", ".join(f"{library} {version}" for library, version in versions.items()),
    }


def telling_settings(services: Services, newest: FinishedIteration) -> dict[str, str]:
    """The settings that matter most, as the newest iteration was made with them."""
    used = used_in(services.used_settings, ONCE) | dict(newest.settings) | chosen_values(newest.manifest)
    return {
        name: value
        for telling in TELLING
        for name, value in used.items()
        if name == telling or name.startswith(f"{telling}.")
    }
