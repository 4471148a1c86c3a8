"""The code location: the stages of the method as assets, on the services that the settings choose."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from resources.common.processes import end_with_parent
from resources.settings.files import home_directory
from resources.settings.settings import Settings
from synpo_assets.algorithm import stages_of
from synpo_assets.cli import automation
from synpo_assets.cli.executor import executor
from synpo_assets.cli.home import last_valid_settings
from synpo_assets.cli.settings_watch import with_settings_check
from synpo_assets.cli.terminal import terminal_logger
from synpo_assets.graph.changes import run_resources
from synpo_assets.graph.checks import checks_of
from synpo_assets.graph.services import Services, open_services
from synpo_assets.graph.stage import assets_of

# Data versions and pools are marked beta; the pinned Dagster minor version is the one they were tested with.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
end_with_parent()


def build(settings: Settings, home: Path, changes: Sequence[str] = ()) -> tuple[dg.Definitions, Services]:
    """The graph of an experiment, and the services that its assets work with, given what one run changes in words."""
    stages = stages_of(settings)
    assets, checks = assets_of(stages, settings), checks_of(stages, settings)
    services = open_services(settings, home, AssetGraph.from_assets([*assets, *checks]), changes)
    definitions = dg.Definitions(
        assets=assets,
        asset_checks=checks,
        resources=run_resources(services, lambda changed, words: build(changed, home, words)[1]),
        jobs=automation.JOBS,
        sensors=[automation.next_iteration],
        executor=executor,
        loggers={"console": terminal_logger},
    )
    return definitions, services


home = home_directory()
# While the settings are wrong, the graph is that of the last valid ones, if there are any.
settings = last_valid_settings(home)
defs = with_settings_check(build(settings, home)[0] if settings else dg.Definitions(), home)
