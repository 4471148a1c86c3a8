"""What the Launchpad offers: settings that hold for one run alone, refused before anything starts if they are wrong.

Dagster asks for the resources of a run when it is launched, when its process starts, and in each of its steps. So this is also
where a run is refused while the settings of its home are wrong.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_origin

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
from dagster._core.definitions.definition_config_schema import IDefinitionConfigSchema
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from resources.common.errors import FinalError
from resources.common.processes import GRACE_SECONDS, ended_after_interrupt
from resources.common.progress import Progress
from resources.settings.files import OF_THE_HOME, changed_settings, changes_between, settings_problem
from resources.settings.sections import SettingsError, sections_in
from resources.settings.settings import Settings
from synpo_assets.graph.budget import budget_refusal
from synpo_assets.graph.outlook import told
from synpo_assets.graph.services import Services

logger = logging.getLogger("synpo.steps")

Rebuild = Callable[[Settings, Sequence[str]], Services]
DESCRIPTION = "Settings that hold for this run alone, by dotted name: `preference_optimization.loss.beta: 3`."


class RunRefused(SettingsError, dg.DagsterError):
    """A run that is not to start; Dagster shows an error of its own kind as it is."""


class _Nothing(IDefinitionConfigSchema):
    """That a resource takes no config: Dagster leaves one whose schema is false out of the Launchpad."""

    config_type = dg.Shape({})

    def as_field(self) -> None:  # type: ignore[override]
        return None

    def __bool__(self) -> bool:
        return False


NOTHING = _Nothing()


def run_resources(services: Services, rebuild: Rebuild) -> dict[str, dg.ResourceDefinition]:
    """What the stages of a run ask for; of all this the Launchpad offers `changes` alone.

    Args:
        rebuild: Opens the services for other settings, given what differs in words.
    """
    at_start = settings_problem(services.home)

    def opened(changes: Mapping[str, Any]) -> Services:
        # A run and its steps go on with the settings that it started with; whoever starts one reads the file again.
        is_of_a_run = multiprocessing.parent_process() is not None
        if problem := at_start if is_of_a_run else settings_problem(services.home):
            raise RunRefused(problem)
        try:
            return with_changes(services, changes, rebuild)
        except SettingsError as error:
            raise RunRefused(str(error)) from None

    def checked(changes: dict[str, Any]) -> dict[str, Any]:
        opened(changes)
        return changes

    @dg.resource(required_resource_keys={"changes"}, config_schema=NOTHING)
    def of_run(context: dg.InitResourceContext) -> Iterator[Services]:
        in_a_step = multiprocessing.parent_process() is not None
        with contextlib.ExitStack() as stack:
            # The main process of a command is the user's to stop.
            if in_a_step:
                stack.enter_context(ended_after_interrupt(GRACE_SECONDS, GRACE_SECONDS))
            chosen = opened(context.resources.changes)
            of_this_run = dataclasses.replace(chosen, checkpoints=chosen.checkpoints.of_run(context.run_id))
            # `synpo run` asks by itself before each run, and needs the resources once more to tell how a run ended.
            instance = context.instance
            if in_a_step and context.run and instance and (spent := budget_refusal(instance, of_this_run)):
                raise FinalError(spent)
            stack.enter_context(told(context, of_this_run))
            stack.enter_context(Progress(None, "At work", logger))
            yield of_this_run
        of_this_run.trainer.forget_finished()

    taken = dg.ResourceDefinition(lambda context: context.resource_config, config_schema=dg.Permissive())
    tables = dg.IOManagerDefinition(lambda _: services.tables, config_schema=NOTHING)
    return {
        "changes": taken.configured(checked, changes_schema(), DESCRIPTION),
        "services": of_run,
        "experiment": dg.ResourceDefinition(lambda _: services, config_schema=NOTHING),
        "tables": tables,
        "io_manager": tables,
        "checkpoints": dg.IOManagerDefinition(
            lambda context: services.checkpoints.of_run(context.run_id), config_schema=NOTHING
        ),
    }


def with_changes(services: Services, changes: Mapping[str, Any], rebuild: Rebuild) -> Services:
    """The services of a run that changes some settings.

    Raises:
        SettingsError: A change is wrong, or it makes another graph.
    """
    settings = changed_settings(services.settings, changes, services.home)
    differences = changes_between(services.settings, settings)
    if not differences:
        return services
    changed = rebuild(settings, differences)
    if _shape(changed.graph) != _shape(services.graph):
        raise SettingsError(
            f"Changes of this run: {', '.join(differences)} makes other assets or other arrows between them, which a run cannot "
            "do. Change it in settings.yaml and press *Reload definitions*."
        )
    return changed


def changes_schema() -> dg.Field:
    """The settings that a run may change, with their descriptions.

    Whatever they are, Dagster hands them on: settings know their types, and say what is wrong in the words of a settings file.
    """
    offered = {
        name: dg.Field(dg.Any, is_required=False, description=field.description)
        for name, field in _fields(Settings)
        if name.split(".")[0] not in OF_THE_HOME
    }
    return dg.Field(dg.Permissive(offered), is_required=False, default_value={}, description=DESCRIPTION)


def _fields(section: type[BaseModel], place: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All settings below a section by dotted name, those of each variant of it."""
    for name, field in section.model_fields.items():
        yield f"{place}{name}", field
        for inner in sections_in(field.annotation) if get_origin(field.annotation) is not list else ():
            yield from _fields(inner, f"{place}{name}.")


def _shape(graph: AssetGraph) -> dict[str, Any]:
    nodes = [graph.get(key) for key in graph.materializable_asset_keys]
    return {node.key.to_user_string(): (node.parent_keys, node.check_keys, node.partitions_def) for node in nodes}
