"""The lineage of one row on the terminal: `synpo trace`."""

import dataclasses
import json

from dagster import DagsterInstance
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from synpo_assets.graph.lineage import Node, trace
from synpo_assets.graph.services import Services


def print_trace(services: Services, identifier: str, as_json: bool) -> None:
    """Prints the lineage of a row, as a tree or, whole, as JSON."""
    with DagsterInstance.get() as instance:
        nodes = trace(services, instance, identifier)
    if as_json:
        Console().out(json.dumps([dataclasses.asdict(node) for node in nodes], indent=2), highlight=False)
    else:
        Console().print(as_tree(nodes))


def as_tree(nodes: list[Node]) -> Tree:
    """The lineage for the terminal: long texts are cut, and control characters are shown, not obeyed."""
    tree = Tree(Text("lineage"), hide_root=True)
    for node in nodes:
        _add(tree, node)
    return tree


def _add(branch: Tree, node: Node) -> None:
    # Without a space between them, a narrow terminal does not tear name and value apart.
    facts = [f"{name}={value}" for name, value in node.short_facts()]
    details = [node.note, *facts, node.table, node.run_id and f"run={node.run_id[:8]}"]
    text = Text(f"{node.kind} {node.id or '(none)'}", style="bold")
    text.append(f": {', '.join(part for part in details if part)}", style="not bold dim")
    for name, value in node.long_facts():
        text.append(f"\n{name}: {value}", style="not bold")
    added = branch.add(text)
    for child in node.made_from + node.trained:
        _add(added, child)
