"""The lineage of one row: what it was made from, by which checkpoints and runs, and which checkpoints learned from it.

Follows the ids stored in each row. If a table was rebuilt, a referenced row may no longer exist; the tree says so.
Tables are searched lazily, so that a large keyword pool is never held in memory.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import dagster as dg
import polars as pl
from dagster import DagsterInstance
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from resources.common.errors import DamageError
from resources.common.text import asset_label, visible
from resources.settings.sections import SettingsError
from resources.storage.tables import ParquetTables
from synpo_assets.graph.history import data_version_of, newest
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.presentation import label_link, run_link, table_version
from synpo_assets.graph.services import Services
from synpo_assets.graph.stage import MADE_FROM, STATE_TAG
from synpo_assets.method.pairs import middle_pair
from synpo_assets.method.rules import rules_text
from synpo_assets.method.seed import HELD_OUT

ID_COLUMNS = {"keywords": "keyword_set_id", "prompt": "prompt_id", "response": "response_id", "pair": "pair_id"}
LONG_FACTS = ("paragraph", "prompt", "answer", "response", "text")
SHOWN_IDS, SHOWN_CHARACTERS, SHOWN_LINES, SHA_DIGITS = 5, 400, 8, 16


@dataclasses.dataclass(frozen=True)
class Links:
    """How the rows of a table name each other: their id, the columns told of them, and the asset behind each other id."""

    identity: str
    facts: list[str]
    made_from: dict[str, str]


def links_of(graph: AssetGraph) -> dict[str, Links]:
    """The tables whose rows have ids of their own, by asset."""
    links = {}
    for key in sorted(graph.materializable_asset_keys):
        metadata = graph.get(key).metadata
        if "dagster/column_schema" not in metadata:
            continue
        columns = {column.name: column.type for column in metadata["dagster/column_schema"].columns}
        identity, made_from = next(iter(columns)), dict(metadata[MADE_FROM])
        if identity in ID_COLUMNS.values() and identity not in made_from:
            # The text of another row, such as the prompt of a response, is told with that row.
            others = {name.removesuffix("_id") for name in columns if name.endswith("_id") and name != identity}
            facts = [name for name, kind in columns.items() if "Struct" not in kind and name not in others
                     and not name.endswith(("_id", "_sha"))]  # fmt: skip
            links[key.to_user_string()] = Links(identity, facts, made_from)
    return links


class TraceError(SettingsError):
    """An id cannot be traced; the message says why and what ids look like."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A row or a checkpoint, with all that it was made from. `dataclasses.asdict` turns it into what JSON can hold.

    `kind` is what it is to the node above it: `pair`, `chosen`, `written by`, `trained`... `id` is None where there is no
    such row. `facts` are columns of the row, or the sha of the checkpoint. `note` says what is missing or unusual.
    `made_from` are the checkpoints that wrote and scored it and the rows it was made from; `trained` are the current
    checkpoints trained on its table, of which margins and samples may have left this row out.
    """

    kind: str
    id: str | None
    facts: dict[str, Any]
    table: str | None = None
    run_id: str | None = None
    note: str | None = None
    made_from: list["Node"] = dataclasses.field(default_factory=list)
    trained: list["Node"] = dataclasses.field(default_factory=list)

    def short_facts(self) -> list[tuple[str, str]]:
        """Names and values of what fits a line, as they are shown."""
        return [(name, shown_value(value[:SHA_DIGITS] if name == "sha" else value))
                for name, value in self.facts.items() if name not in LONG_FACTS]  # fmt: skip

    def long_facts(self) -> list[tuple[str, str]]:
        """Names and texts of what does not."""
        return [(name, shown_value(self.facts[name])) for name in LONG_FACTS if name in self.facts]


def trace(services: Services, instance: DagsterInstance, identifier: str) -> list[Node]:
    """Follows a row, by its id or the beginning of it, back to its origin and forward to the checkpoints trained on it.

    For each iteration that holds the row: the pair that came of it. Its id is None if none did: `made_from` then tells how
    far it came. For a seed prompt or an answer to one: the seed pair, then the policy's answers.
    """
    links = links_of(services.graph)
    whole = _whole_id(services.tables, links, identifier)
    home = _Home(services, links, instance)
    return home.seed(whole) + home.pairs(whole) + home.keyword_sets_without_prompt(whole) or home.alone(whole)


def median_pair(
    context: dg.AssetExecutionContext, services: Services, preference_pairs: pl.DataFrame
) -> dg.MarkdownMetadataValue:
    """The lineage of the pair with the median margin, of pairs that are not stored yet, as a list with links for the UI."""
    home = _Home(services, links_of(services.graph), context.instance, preference_pairs=preference_pairs)
    try:
        nodes = home.pairs(middle_pair(preference_pairs)["pair_id"])
    except (OSError, pl.exceptions.PolarsError, DamageError) as error:
        # It reads tables of other iterations: what is damaged there is no fault of these pairs.
        return dg.MetadataValue.md(f"A table that it leads to cannot be read: {error}")
    return dg.MetadataValue.md("\n".join(line for node in nodes for line in _markdown(node)))


def _markdown(node: Node, depth: int = 0) -> Iterator[str]:
    name = node.id or "(none)"
    if node.table is None and node.run_id:
        name = label_link(name)
    facts = [f"{fact} {value}" for fact, value in node.short_facts()]
    facts += [label_link(node.table)] if node.table else []
    facts += [f"run {run_link(node.run_id)}"] if node.run_id else []
    indent = "  " * depth
    yield f"{indent}- **{node.kind}** {name}: {', '.join([node.note, *facts] if node.note else facts)}"
    for fact, text in node.long_facts():
        # As code, so that a text is shown and does nothing: longer quotes than any that it holds.
        line = " ".join(text.split())
        quotes = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
        yield f"{indent}  - {fact}: {quotes} {line} {quotes}"
    for below in node.made_from + node.trained:
        yield from _markdown(below, depth + 1)


def shown_value(value: Any) -> str:
    """A fact cut to what can be shown, with control characters made visible."""
    text = ", ".join(value) if isinstance(value, list) else f"{value:.3f}" if isinstance(value, float) else str(value)
    cut = "\n".join(text[:SHOWN_CHARACTERS].split("\n")[:SHOWN_LINES])
    return visible(cut) if cut == text else f"{visible(cut)}…"


def _whole_id(tables: ParquetTables, links: dict[str, Links], identifier: str) -> str:
    """The one id that an identifier begins."""
    kind, dash, digits = identifier.strip().lower().rpartition("-")
    if dash and kind not in ID_COLUMNS:
        raise TraceError(f"{identifier!r} is no id: ids begin with {', '.join(ID_COLUMNS)}, such as `pair-3f9a`.")
    columns = {asset: each.identity for asset, each in links.items() if not dash or each.identity == ID_COLUMNS[kind]}
    searched = ", ".join(columns)
    frames = [frame.select(id=columns[asset]) for asset in columns if (frame := tables.scan(asset)) is not None]
    if not frames:
        raise TraceError(f"There is no table of {searched} in this home yet: `synpo run` makes them.")
    # An id has one dash, so that without a kind this is where its digits begin.
    begins = pl.col("id").str.contains(f"{kind}-{digits}", literal=True)
    ids = pl.concat(frames).filter(begins).unique().sort("id").collect()["id"].to_list()
    if not ids:
        raise TraceError(f"No id begins with {identifier!r}: searched {searched}; ids look like `pair-3f9a` or `3f9a`.")
    if len(ids) > 1:
        shown = ", ".join(ids[:SHOWN_IDS]) + (", …" if len(ids) > SHOWN_IDS else "")
        raise TraceError(f"{len(ids)} ids begin with {identifier!r} ({shown}): give more of it.")
    return ids[0]


class _Home:
    """The rows, manifests and runs of one home, as nodes."""

    def __init__(
        self, services: Services, links: dict[str, Links], instance: DagsterInstance, **unsaved: pl.DataFrame
    ) -> None:
        self.unsaved = unsaved
        self.tables, self.checkpoints = services.tables, services.checkpoints
        self.links, self.instance = links, instance
        # What both sides of a pair were made of, the sides included.
        self.responses = [name for name in self._origins("preference_pairs") if links[name].identity == "response_id"]
        self.manifests, self.shown = self._manifests(services.graph), set[tuple[str, str]]()

    def _origins(self, asset: str) -> list[str]:
        below = list(dict.fromkeys(self.links[asset].made_from.values()))
        return list(dict.fromkeys([*below, *(name for each in below for name in self._origins(each))]))

    def _manifests(self, graph: AssetGraph) -> list[dict[str, Any]]:
        """The manifests of all current checkpoints that were trained here; one that was altered is made again, and not read."""
        manifests = []
        for key in sorted(graph.materializable_asset_keys):
            node, name = graph.get(key), key.to_user_string()
            if node.io_manager_key == "checkpoints" and STATE_TAG not in node.tags:
                partitions = node.partitions_def.get_partition_keys() if node.partitions_def else [None]
                for partition in partitions:
                    with contextlib.suppress(DamageError):
                        manifests.append(self.checkpoints.manifest(name, partition))
        # Two assets may point to one checkpoint: in iteration 1 the control of equal steps is M_1.
        return list({(each["asset"], each["partition"]): each for each in manifests if each}.values())

    def seed(self, whole: str) -> list[Node]:
        """The seed pair and the policy's answers to it, if the id is of one of them."""
        answers = self._rows("seed_responses", response_id=whole) or self._rows("seed_responses", prompt_id=whole)
        prompt_id = answers[0]["prompt_id"] if answers else whole
        if not answers and not self._rows("seed_pairs", prompt_id=prompt_id):
            return []
        pair = self._follow("seed pair", "seed_pairs", prompt_id, None)
        self.shown.add(("seed_pairs", prompt_id))
        return [pair, *(self._node("answer", "seed_responses", row) for row in answers)]

    def pairs(self, whole: str) -> list[Node]:
        """For each iteration and prompt that an id belongs to, the pair, which may not exist."""
        column = ID_COLUMNS[whole.partition("-")[0]]
        named = (name for name in ("preference_pairs", "pair_verdicts", *self.responses) if name in self.links)
        tables = [name for name in named if self.links[name].identity == column]
        # What is none of these, a prompt or a keyword set, is looked up among the prompts.
        rows = [row for name in tables or ["synthetic_prompts"] for row in self._rows(name, **{column: whole})]
        return [self._pair(*place, whole) for place in sorted({(row["iteration"], row["prompt_id"]) for row in rows})]

    def keyword_sets_without_prompt(self, whole: str) -> list[Node]:
        """The draws of a keyword set that gave no prompt, or what the pool holds if it was never drawn."""
        drawn = self._rows("keyword_sets", keyword_set_id=whole)
        used = [row["iteration"] for row in self._rows("synthetic_prompts", keyword_set_id=whole)]
        note = "no prompt was written from it yet, or none that is valid, or enough were found without it"
        unused = [row for row in drawn if row["iteration"] not in used]
        pool = [] if drawn else self._rows("keyword_pool", keyword_set_id=whole)
        nodes = [self._node("keyword set", "keyword_sets", row, note) for row in unused]
        return nodes + [self._node("keyword set", "keyword_pool", row, "no iteration has drawn it") for row in pool]

    def alone(self, whole: str) -> list[Node]:
        """A row that no pair comes of, such as an instruction of an evaluation."""
        column = ID_COLUMNS[whole.partition("-")[0]]
        tables = [name for name, each in self.links.items() if each.identity == column]
        return [self._node(column.removesuffix("_id"), name, row) for name in tables
                for row in self._rows(name, **{column: whole})]  # fmt: skip

    def _pair(self, iteration: int, prompt_id: str, whole: str) -> Node:
        key, self.shown = partition_key(iteration), set()
        rows = self._rows("preference_pairs", key, prompt_id=prompt_id)
        pair = self._node("pair", "preference_pairs", rows[0]) if rows else None
        said = self._rows("pair_verdicts", key, prompt_id=prompt_id) if "pair_verdicts" in self.links else []
        verdicts = [_verdict(row, asset_label("pair_verdicts", key)) for row in said]
        if pair:
            pair.made_from.extend(verdicts)
        if pair and whole in _ids(pair):
            return pair
        exist = "preference_pairs" in self.unsaved or self.tables.scan("preference_pairs", key) is not None
        why = "dropped by a filter, or not sampled" if exist else "this iteration has no pairs yet"
        note = f"{pair.id} was made from other answers to this prompt" if pair else why
        self.shown = {("synthetic_prompts", prompt_id)}
        responses = [
            self._node(asset.removesuffix("_responses"), asset, row)
            for asset in self.responses
            for row in self._rows(asset, key, prompt_id=prompt_id)
        ]
        rewritten = {base.id for refined in responses for base in refined.made_from if base.kind == "base"}
        made_from = [node for node in responses if node.kind != "base" or node.id not in rewritten]
        made_from += [self._follow("prompt", "synthetic_prompts", prompt_id, key), *([] if pair else verdicts)]
        return Node("pair", None, {"iteration": iteration}, note=note, made_from=made_from)

    def _node(self, kind: str, asset: str, row: dict[str, Any], note: str | None = None) -> Node:
        links = self.links[asset]
        key = partition_key(row["iteration"]) if "iteration" in row else None
        models = (("written by", "checkpoint_sha"), ("scored by", "scorer_sha"))
        made_from = [self._model(role, row[sha]) for role, sha in models if sha in row]
        for name, below in ((name, below) for name, below in links.made_from.items() if name in row):
            role = name.removesuffix("_id").removesuffix("_response")
            # A pair carries the texts of its two sides and its prompt, as messages; a response that of its prompt.
            text = row[role][-1]["content"] if isinstance(row.get(role), list) else row.get(role)
            # Both sides lead to one prompt, which is shown once.
            if (below, row[name]) not in self.shown:
                self.shown.add((below, row[name]))
                made_from.append(self._follow(role.replace("_", " "), below, row[name], key, text))
        record, facts = newest(self.instance, asset, key), {name: row[name] for name in links.facts if name in row}
        if rules := facts.pop("rules", rules_text(row.get("constraints", ()))):
            facts["rules"] = rules
        table, run_id = asset_label(asset, key), record.run_id if record and asset not in self.unsaved else None
        trained = self._trained(asset, key)
        if row.get("split") in HELD_OUT:
            trained = []
        elif split := row.get("split"):
            # What is set aside for one model is read by no other.
            aside = {"judge": "judge_model", "scorer": "reward_model"}
            trained = [node for node in trained if aside.get(split) == (node.id if node.id in aside.values() else None)]
        return Node(kind, row[links.identity], facts, table, run_id, note, made_from, trained)

    def _follow(self, kind: str, asset: str, whole: str, key: str | None, text: str | None = None) -> Node:
        """The row that an id leads to, or a node that says that it is gone."""
        identity = self.links[asset].identity
        # People may have exchanged the sides of a pair: its chosen answer is then one of the rejected responses.
        for place in dict.fromkeys([asset, *(self.responses if identity == "response_id" else ())]):
            if rows := self._rows(place, key, **{identity: whole}):
                return self._node(kind, place, rows[0])
        note = f"no longer in {asset_label(asset, key)}, which was deleted or made again"
        return Node(kind, whole, {"text": text} if text else {}, note=note)

    def _model(self, role: str, sha: str) -> Node:
        """The checkpoint with a sha, current or superseded."""
        current = next((manifest for manifest in self.manifests if manifest["sha"] == sha), None)
        if current is not None:
            return _checkpoint(role, current)
        earlier = self.checkpoints.manifest_of_sha(sha)
        note = "not a current checkpoint any more"
        if earlier is None:
            return Node(role, "unknown checkpoint", {"sha": sha}, note=note)
        return _checkpoint(role, earlier, note)

    def _trained(self, asset: str, key: str | None) -> list[Node]:
        """The checkpoints whose manifests name a table among what they were trained on."""
        label = asset_label(asset, key)
        named = [
            (made, version)
            for made in self.manifests
            for name, version in made["trained_on"].items()
            # A table of the checkpoint's own iteration is named by its asset alone.
            if name == label or (name == asset and made["partition"] == key)
        ]
        if not named:
            return []
        unsaved = self.unsaved.get(asset)
        present = data_version_of(self.instance, asset, key) if unsaved is None else table_version(unsaved)
        note = f"on an earlier version of {label}"
        return [_checkpoint("trained", made, None if version == present else note) for made, version in named]

    def _rows(self, asset: str, key: str | None = None, **equal: str) -> list[dict[str, Any]]:
        frame = self.unsaved[asset].lazy() if asset in self.unsaved else self.tables.scan(asset, key)
        return [] if frame is None else frame.filter(**equal).collect().to_dicts()


def _checkpoint(role: str, manifest: dict[str, Any], note: str | None = None) -> Node:
    label = asset_label(manifest["asset"], manifest["partition"])
    return Node(role, label, {"sha": manifest["sha"]}, run_id=manifest["run_id"], note=note)


def _verdict(row: dict[str, Any], table: str) -> Node:
    facts = {name: row[name] for name in ("outcome", "verdict", "reviewer", "reviewed_at") if row[name]}
    return Node("verdict of people", row["pair_id"], facts, table)


def _ids(node: Node) -> set[str | None]:
    return {node.id}.union(*map(_ids, node.made_from))
