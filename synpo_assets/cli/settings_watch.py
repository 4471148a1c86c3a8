"""The settings of the home in the UI: an asset with a check, which turns red while they are wrong and says why.

A sensor reads the file now and then, so a wrong value shows before *Reload definitions* as well.
"""

from pathlib import Path

import dagster as dg

from resources.settings.files import settings_problem

NAME = "settings"


def with_settings_check(definitions: dg.Definitions, home: Path) -> dg.Definitions:
    """A graph with the asset `settings`, its check `valid`, and the sensor that keeps that up to date."""

    def verdict() -> tuple[bool, str]:
        problem = settings_problem(home)
        return problem is None, problem or f"{home / 'settings.yaml'} holds valid settings."

    @dg.asset_check(asset=NAME, description="Whether settings.yaml holds valid settings; the sensor `settings` looks.")
    def valid() -> dg.AssetCheckResult:
        passed, sentence = verdict()
        return dg.AssetCheckResult(passed=passed, description=sentence)

    @dg.sensor(
        name=NAME,
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=15,
        description="Reports whether settings.yaml is valid, when that changes.",
    )
    def watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        passed, sentence = verdict()
        seen = dg.AssetCheckEvaluation(dg.AssetKey(NAME), valid.check_key.name, passed, description=sentence)
        return dg.SensorResult(
            asset_events=[] if context.cursor == sentence else [seen], skip_reason=sentence, cursor=sentence
        )

    passed, sentence = verdict()
    # Lineage opens on the names of groups.
    file = dg.AssetSpec(NAME, group_name=NAME if passed else f"wrong_{NAME}", kinds={"yaml"}, description=sentence)
    return dg.Definitions.merge(definitions, dg.Definitions(assets=[file], asset_checks=[valid], sensors=[watch]))
