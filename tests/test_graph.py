"""The graph as data: its snapshot, two of it in one process, and what is derived from it."""

import json
import re
from pathlib import Path
from typing import get_args

import dagster as dg
import pytest

from definitions import build
from resources.settings.settings import Settings
from synpo_assets.algorithm import stages_of
from synpo_assets.graph.stage import Group
from synpo_assets.reports.boosting_report import READ_ASSETS
from tests.nano import active_settings

SNAPSHOT = Path(__file__).with_name("graph.json")


def described(settings, home=Path("/nowhere")):
    """Every asset with what nobody should change without meaning to."""
    _, services = build(settings, home)
    graph, found = services.graph, {}
    for key in sorted(graph.materializable_asset_keys):
        node = graph.get(key)
        checks = {check.name: graph.get(check).blocking for check in sorted(node.check_keys, key=str)}
        found[key.to_user_string()] = {
            "deps": sorted(parent.to_user_string() for parent in node.parent_keys),
            "group": node.group_name,
            "kinds": sorted(node.kinds),
            "partitions": node.partitions_def.get_partition_keys() if node.partitions_def else None,
            "pool": sorted(node.pools or ()),
            "tags": sorted(tag for tag in node.tags if tag.startswith("synpo/")),
            "made_from": dict(node.metadata["synpo/made_from"]),
            "blocking checks": sorted(name for name, blocking in checks.items() if blocking),
            "other checks": sorted(name for name, blocking in checks.items() if not blocking),
        }
    return found


def with_ranked_samples():
    settings = active_settings()
    preferences = settings.preferences.model_copy(update={"chosen_from": "ranked_samples"})
    return settings.model_copy(update={"preferences": preferences})


def with_search():
    settings = active_settings().model_dump()
    settings["preference_optimization"]["search"] = {"loss.beta": [2.0, 4.0]}
    return Settings.model_validate(settings)


WAYS = {"improver": active_settings, "ranked_samples": with_ranked_samples}


@pytest.mark.parametrize("way", WAYS)
def test_the_graph_is_the_one_that_was_agreed(way):
    """If a change is meant: delete the entry of tests/graph.json, run the test, and look at the difference in git."""
    agreed = json.loads(SNAPSHOT.read_text())
    if way not in agreed:
        SNAPSHOT.write_text(json.dumps(agreed | {way: described(WAYS[way]())}, indent=1) + "\n")
        pytest.fail("The snapshot was written anew: look at what changed, and run the test again.")
    assert described(WAYS[way]()) == agreed[way]


def test_the_report_is_made_when_all_else_of_an_iteration_is():
    settings = active_settings()
    improver = settings.response_improver.model_copy(update={"damaged_copies": 1})
    optimization = settings.preference_optimization.model_copy(update={"equal_steps_control": True})
    changed = settings.model_copy(update={"response_improver": improver, "preference_optimization": optimization})
    assert described(changed)["boosting_report"]["deps"] == sorted(
        {"equal_steps_evaluation", "equal_steps_gold", "equal_steps_instructions", "improver_edits", *READ_ASSETS}
    )


def test_two_graphs_with_different_settings_live_in_one_process(tmp_path):
    fewer = with_ranked_samples().model_copy(update={"max_iterations": 2})
    one, other = build(active_settings(), tmp_path / "one"), build(fewer, tmp_path / "other")
    assert dg.AssetKey("response_improver") in one[1].graph.materializable_asset_keys
    assert dg.AssetKey("response_improver") not in other[1].graph.materializable_asset_keys
    counts = [
        len(each[1].graph.get(dg.AssetKey("policy")).partitions_def.get_partition_keys()) for each in (one, other)
    ]
    assert counts == [4, 2]
    assert [each[1].home.name for each in (one, other)] == ["one", "other"]
    versions = [each[1].graph.get(dg.AssetKey("preference_pairs")).code_version for each in (one, other)]
    assert versions[0] != versions[1]


@pytest.mark.parametrize("way", [active_settings, with_search])
def test_each_phase_is_made_only_from_those_before_it(way):
    """Else Lineage could not draw the groups from left to right."""
    _, services = build(way(), Path("/nowhere"))
    order = list(get_args(Group))
    for key in services.graph.materializable_asset_keys:
        node = services.graph.get(key)
        for parent in node.parent_keys:
            assert order.index(services.graph.get(parent).group_name) <= order.index(node.group_name), (parent, key)


def test_every_asset_of_an_iteration_descends_from_the_policy():
    _, services = build(active_settings(), Path("/nowhere"))
    graph = services.graph
    nodes = [graph.get(key) for key in graph.materializable_asset_keys]
    for node in nodes:
        ancestors = {node.key, *graph.get_ancestor_asset_keys(node.key)} if node.parent_keys else {node.key}
        if node.is_partitioned:
            assert dg.AssetKey("policy") in ancestors, node.key
        elif not any(graph.get(key).is_partitioned for key in ancestors):
            assert node.key in graph.get_ancestor_asset_keys(dg.AssetKey("policy")), node.key


def test_every_asset_says_what_it_is_how_to_read_it_and_which_settings_decide_it():
    settings = active_settings()
    _, services = build(settings, Path("/nowhere"))
    for stage in stages_of(settings):
        what, how, *rest = services.graph.get(dg.AssetKey(stage.name)).description.split("\n\n")[
            bool(stage.needs(settings)) :
        ]
        assert what.endswith("."), stage.name
        assert how.endswith("."), stage.name
        named = set(re.findall("`(.*?)`", rest[0])) if rest else set()
        assert named == set(stage.reading()), stage.name
