"""Published models as scorers: how they are fetched and checked."""

from pathlib import Path

from resources.models.model_source import fetch
from resources.scoring.scorer import SCORERS
from resources.settings.data import ModelSource
from resources.settings.method import PublishedScorer


def fetch_reward_model(
    scorer: PublishedScorer, trust_remote_code: bool, section: str = "scorer", compares: bool = True
) -> tuple[Path, dict[str, str]]:
    """The directory of a published reward model or pair ranker with safetensors weights, and its origin for the manifest.

    Args:
        section: The section of the settings that names it.
        compares: As of `fetch`.
    """
    is_directory = Path(scorer.name).is_dir()
    source = ModelSource(
        source="directory" if is_directory else "hub", name=scorer.name, revision=scorer.revision or "main"
    )
    directory, origin = fetch(source, section, trust_remote_code, compares)
    SCORERS[scorer.kind].check(directory, trust_remote_code, section)
    return directory, origin
