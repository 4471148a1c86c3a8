"""The lineage of one row: what it was made from, by which checkpoints and runs, and which checkpoints learned from it.

Rows name by ids what they were made from, and these are followed exactly: where a table was made again since, a row may
be gone, and its node says so. Tables are searched lazily, so that a large keyword pool is never held in memory.
"""

import dataclasses
import json
from typing import Any

import polars as pl
from dagster import DagsterInstance
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from resources.common.text import asset_label, visible
from resources.settings.sections import SettingsError
from resources.storage.checkpoint_store import CheckpointStore
from resources.storage.tables import ParquetTables
from synpo_assets.graph.history import metadata_of, newest
from synpo_assets.graph.partitions import partition_key
from synpo_assets.graph.presentation import table_version

ID_COLUMNS = {"keywords": "keyword_set_id", "prompt": "prompt_id", "response": "response_id", "pair": "pair_id"}
RESPONSES = ("refined_responses", "base_responses", "initial_responses")
# Of each table: the column that identifies a row, and the columns that are told of it.
TABLES = {
    "keyword_pool": ("keyword_set_id", ("keywords", "paragraph")),
    "keyword_sets": ("keyword_set_id", ("keywords", "paragraph")),
    **dict.fromkeys(RESPONSES, ("response_id", ("output_tokens", "finish_reason", "response"))),
    "synthetic_prompts": ("prompt_id", ("prompt",)),
    "preference_pairs": ("pair_id", ("iteration", "chosen_score", "rejected_score", "margin")),
    "seed_pairs": ("prompt_id", ("split", "line", "prompt", "answer")),
    "seed_responses": ("response_id", ("iteration", "answer_score", "response_score", "response")),
}
# Table, its column that names another row, what that row is to it, and the table of that row.
MADE_FROM = [
    ("preference_pairs", "chosen_response_id", "chosen", "refined_responses"),
    ("preference_pairs", "rejected_response_id", "rejected", "initial_responses"),
    ("preference_pairs", "prompt_id", "prompt", "synthetic_prompts"),
    ("refined_responses", "base_response_id", "base", "base_responses"),
    ("synthetic_prompts", "keyword_set_id", "keyword set", "keyword_sets"),
]
MADE_ONCE = ("initial_policy", "prompt_generator", "reward_model", "judge_model")
LONG_FACTS = ("paragraph", "prompt", "answer", "response", "text")
SHOWN_IDS, SHOWN_CHARACTERS, SHOWN_LINES = 5, 400, 8


class TraceError(SettingsError):
    """An id cannot be traced; the message says why and what ids look like."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A row or a checkpoint, with all that it was made from. `dataclasses.asdict` turns it into what JSON can hold.

    Attributes:
        kind: What it is to the node above it: `pair`, `chosen`, `prompt`, `written by`, `scored by`, `trained`...
        id: The id of a row, or the asset and iteration of a checkpoint. None: it does not exist.
        facts: Columns of the row, or the sha of the checkpoint.
        table: The table of a row, with its iteration: `base_responses[0001]`.
        run_id: The run that made the table or the checkpoint, or None if that is not known any more.
        note: What is missing or unusual, in words.
        made_from: The checkpoints that wrote and scored it, and the rows that it was made from.
        trained: The current checkpoints trained on the table, of which margins and samples may have left this row out.
    """

    kind: str
    id: str | None
    facts: dict[str, Any]
    table: str | None = None
    run_id: str | None = None
    note: str | None = None
    made_from: list["Node"] = dataclasses.field(default_factory=list)
    trained: list["Node"] = dataclasses.field(default_factory=list)


def trace(
    tables: ParquetTables, checkpoints: CheckpointStore, instance: DagsterInstance, identifier: str
) -> list[Node]:
    """Follows a row back to its origin and forward to the checkpoints that were trained on it.

    Args:
        tables: The tables of the home; those of later stages may not exist yet.
        checkpoints: Its checkpoints, of which only the manifests are read.
        instance: Its Dagster history, which knows the runs.
        identifier: The id of a keyword set, prompt, response or pair, or its beginning: `pair-3f9a`, `3f9a`.

    Returns:
        For each iteration that holds the row, the pair that came of it. Its id is None if none did: `made_from` then
        tells how far it came. For a seed prompt or an answer to one: the seed pair, then the policy's answers.

    Raises:
        TraceError: There are no tables; no id begins so, or several do.
    """
    whole = _whole_id(tables, identifier)
    home = _Home(tables, checkpoints, instance)
    return home.seed(whole) + home.pairs(whole) + home.keyword_sets_without_prompt(whole)


def print_trace(identifier: str, as_json: bool) -> None:
    """Prints the lineage of a row of the prepared home, as a tree or, whole, as JSON.

    Raises:
        TraceError: As in `trace`.
    """
    from definitions import defs

    resources: Any = defs.resources
    with DagsterInstance.get() as instance:
        found = trace(resources["tables"], resources["checkpoints"], instance, identifier)
    if as_json:
        Console().out(json.dumps([dataclasses.asdict(node) for node in found], indent=2), highlight=False)
    else:
        Console().print(as_tree(found))


def as_tree(found: list[Node]) -> Tree:
    """The lineage for the terminal: long texts are cut, and control characters are shown, not obeyed."""
    tree = Tree(Text("lineage"), hide_root=True)
    for node in found:
        _add(tree, node)
    return tree


def _add(branch: Tree, node: Node) -> None:
    facts = {name: value[:16] if name == "sha" else value for name, value in node.facts.items()}
    short = [f"{name} {_shown(value)}" for name, value in facts.items() if name not in LONG_FACTS]
    about = [node.note, *short, node.table, node.run_id and f"run {node.run_id[:8]}"]
    text = Text(f"{node.kind} {node.id or '(none)'}", style="bold")
    text.append(f": {', '.join(part for part in about if part)}", style="not bold dim")
    for name in (name for name in LONG_FACTS if name in facts):
        text.append(f"\n{name}: {_shown(facts[name])}", style="not bold")
    added = branch.add(text)
    for child in node.made_from + node.trained:
        _add(added, child)


def _shown(value: Any) -> str:
    """Cut to what fits a terminal, with control characters made visible."""
    text = ", ".join(value) if isinstance(value, list) else f"{value:.3f}" if isinstance(value, float) else str(value)
    cut = "\n".join(text[:SHOWN_CHARACTERS].split("\n")[:SHOWN_LINES])
    return visible(cut) if cut == text else f"{visible(cut)}…"


def _whole_id(tables: ParquetTables, identifier: str) -> str:
    """The one id that an identifier begins."""
    kind, dash, digits = identifier.strip().lower().rpartition("-")
    if dash and kind not in ID_COLUMNS:
        raise TraceError(f"{identifier!r} is no id: ids begin with {', '.join(ID_COLUMNS)}, such as `pair-3f9a`.")
    columns = {asset: column for asset, (column, _) in TABLES.items() if not dash or column == ID_COLUMNS[kind]}
    searched = ", ".join(columns)
    found = [frame.select(id=columns[asset]) for asset in columns if (frame := tables.scan(asset)) is not None]
    if not found:
        raise TraceError(f"There is no table of {searched} in this home yet: `synpo run` makes them.")
    # An id has one dash, so that without a kind this is where its digits begin.
    begins = pl.col("id").str.contains(f"{kind}-{digits}", literal=True)
    ids = pl.concat(found).filter(begins).unique().sort("id").collect()["id"].to_list()
    if not ids:
        raise TraceError(f"No id begins with {identifier!r}: searched {searched}; ids look like `pair-3f9a` or `3f9a`.")
    if len(ids) > 1:
        shown = ", ".join(ids[:SHOWN_IDS]) + (", …" if len(ids) > SHOWN_IDS else "")
        raise TraceError(f"{len(ids)} ids begin with {identifier!r} ({shown}): give more of it.")
    return ids[0]


class _Home:
    """The rows, manifests and runs of one home, as nodes."""

    def __init__(self, tables: ParquetTables, checkpoints: CheckpointStore, instance: DagsterInstance) -> None:
        self.tables, self.instance = tables, instance
        drawn = tables.scan("keyword_sets")
        iterations = () if drawn is None else drawn.select(pl.col("iteration").unique().sort()).collect()["iteration"]
        found = [checkpoints.manifest(name, None) for name in MADE_ONCE]
        for key in map(partition_key, iterations):
            found += [checkpoints.manifest(name, key) for name in ("response_improver", "model_checkpoint")]
        self.manifests = [manifest for manifest in found if manifest]

    def seed(self, whole: str) -> list[Node]:
        """The seed pair and the policy's answers to it, if the id is of one of them."""
        answers = self._rows("seed_responses", response_id=whole) or self._rows("seed_responses", prompt_id=whole)
        prompt_id = answers[0]["prompt_id"] if answers else whole
        if not answers and not self._rows("seed_pairs", prompt_id=prompt_id):
            return []
        pair = self._follow("seed pair", "seed_pairs", prompt_id, None)
        return [pair, *(self._node("answer", "seed_responses", row) for row in answers)]

    def pairs(self, whole: str) -> list[Node]:
        """For each iteration and prompt that an id belongs to, the pair, which may not exist."""
        column = ID_COLUMNS[whole.partition("-")[0]]
        tables = [name for name in ("preference_pairs", *RESPONSES) if TABLES[name][0] == column]
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

    def _pair(self, iteration: int, prompt_id: str, whole: str) -> Node:
        key = partition_key(iteration)
        rows = self._rows("preference_pairs", key, prompt_id=prompt_id)
        pair = self._node("pair", "preference_pairs", rows[0]) if rows else None
        if pair and whole in _ids(pair):
            return pair
        exist = self._rows("preference_pairs", key)
        why = "dropped by a filter, or not sampled" if exist else "this iteration has no pairs yet"
        note = f"{pair.id} was made from other answers to this prompt" if pair else why
        responses = [
            self._node(asset.removesuffix("_responses"), asset, row)
            for asset in RESPONSES
            for row in self._rows(asset, key, prompt_id=prompt_id)
        ]
        rewritten = {base.id for refined in responses for base in refined.made_from if base.kind == "base"}
        made_from = [node for node in responses if node.kind != "base" or node.id not in rewritten]
        made_from.append(self._follow("prompt", "synthetic_prompts", prompt_id, key))
        return Node("pair", None, {"iteration": iteration}, note=note, made_from=made_from)

    def _node(self, kind: str, asset: str, row: dict[str, Any], note: str | None = None) -> Node:
        column, told = TABLES[asset]
        key = partition_key(row["iteration"]) if "iteration" in row else None
        models = (("written by", "checkpoint_sha"), ("scored by", "scorer_sha"))
        made_from = [self._model(role, row[sha], asset, key) for role, sha in models if sha in row]
        for _, name, role, asset_below in (link for link in MADE_FROM if link[0] == asset):
            # A pair carries the texts of its two sides and its prompt, as messages.
            text = row[role][-1]["content"] if role in row else None
            made_from.append(self._follow(role, asset_below, row[name], key, text))
        record, facts = newest(self.instance, asset, key), {name: row[name] for name in told}
        table, run_id = asset_label(asset, key), record and record.run_id
        trained = self._trained(asset, key)
        if split := row.get("split"):
            trained = [
                node for node in trained if (node.id == "judge_model") == (split == "judge") and split != "held_out"
            ]
        return Node(kind, row[column], facts, table, run_id, note, made_from, trained)

    def _follow(self, kind: str, asset: str, whole: str, key: str | None, text: str | None = None) -> Node:
        """The row that an id leads to, or a node that says that it is gone."""
        if rows := self._rows(asset, key, **{TABLES[asset][0]: whole}):
            return self._node(kind, asset, rows[0])
        note = f"no longer in {asset_label(asset, key)}, which was deleted or made again"
        return Node(kind, whole, {"text": text} if text else {}, note=note)

    def _model(self, role: str, sha: str, asset: str, key: str | None) -> Node:
        """The checkpoint with a sha; one that was replaced is known by what the table that it made recorded."""
        if made := next((manifest for manifest in self.manifests if manifest["sha"] == sha), None):
            return _checkpoint(role, made)
        recorded = metadata_of(self.instance, asset, key)
        label = recorded.get("checkpoint") if recorded.get("checkpoint_sha") == sha else "unknown checkpoint"
        return Node(role, label, {"sha": sha}, note="not a current checkpoint any more")

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
        present = table_version(self._table(asset, key)) if named else None
        note = f"on an earlier version of {label}"
        return [_checkpoint("trained", made, None if version == present else note) for made, version in named]

    def _rows(self, asset: str, key: str | None = None, **equal: str) -> list[dict[str, Any]]:
        return self._table(asset, key, **equal).to_dicts()

    def _table(self, asset: str, key: str | None, **equal: str) -> pl.DataFrame:
        frame, at = self.tables.scan(asset), {"iteration": int(key)} if key else {}
        return pl.DataFrame() if frame is None else frame.filter(**equal, **at).collect()


def _checkpoint(role: str, manifest: dict[str, Any], note: str | None = None) -> Node:
    label = asset_label(manifest["asset"], manifest["partition"])
    return Node(role, label, {"sha": manifest["sha"]}, run_id=manifest["run_id"], note=note)


def _ids(node: Node) -> set[str | None]:
    return {node.id}.union(*map(_ids, node.made_from))
