"""What makes a function a stage: all that is known of it is stated once, where it is defined.

`@Stage(...)` only writes down what is stated. The asset is made when the graph is built for some settings, and carries the rest
in Dagster's own fields: group, kinds, pool, tags and metadata. Lists of assets are derived from these.
"""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, Self

import dagster as dg
import polars as pl
from pydantic import BaseModel

from resources.settings.method import Sampling
from resources.settings.settings import Settings
from synpo_assets.graph.code_versions import code_version
from synpo_assets.graph.cost import Cost
from synpo_assets.graph.partitions import iterations
from synpo_assets.graph.tables import Table, column_schema, frame_type

GPU_POOL = "gpu"
# By it a run knows which of its own steps wait for each other (cli/executor.py).
GPU_TAG = "synpo/pool"
# What is made only when it is asked for by name has this tag: no job, no sensor and no `synpo run` makes it.
OPT_IN_TAG = "synpo/opt_in"
# What looks up other iterations, and so runs whenever anything of its iteration does.
STATE_TAG = "synpo/state"
MADE_FROM = "synpo/made_from"
READS = "synpo/reads"
# The asset that all others of its iteration descend from.
FIRST = "policy"
# The asset that is made when all others of its iteration are.
LAST = "boosting_report"
# A download, a server or a device may fail for a while; finished shards are kept between the tries.
RETRIES = dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL)

# Phases of the method, each made only from those before it, so that the UI draws them from left to right.
Group = Literal["seed", "loop", "prompts", "responses", "preferences", "optimization", "evaluation", "publishing"]
WorkKind = Literal["generates", "trains", "scores", "embeds"]
# What of the engine decides the result of each kind of work.
ENGINE_READS: Mapping[WorkKind, tuple[str, ...]] = {
    "generates": ("engine.dtype", "engine.attention", "engine.kind"), "trains": ("engine.dtype", "engine.attention"),
    "scores": ("engine.dtype", "engine.attention"), "embeds": (),
}  # fmt: skip


@dataclasses.dataclass(eq=False)
class Stage:
    """A stage of the method: a decorator of the function that makes its asset, which states all that is known of it.

    Attributes:
        function: The function that is decorated; its arguments are the assets that it reads, its name is that of its asset.
        schema: The table that it makes; None if it makes none.
        group: The phase of the method that it belongs to.
        lazy: Whether that table is streamed.
        checkpoint: Whether it makes a model.
        reads: The settings that decide its result, by dotted name. Those of the engine follow from `work`.
        work: What it does with models; it then waits for its turn in the pool `gpu`.
        samplings: The ways in which it generates, so that `synpo clean` knows which shards are in use.
        cost: What it costs, for `synpo check`.
        code: Functions that the settings choose and that it calls without naming them.
        made_from: The columns of its table that hold the id of a row of another table, with that asset.
        side: The name that other stages have for the side of a pair that it makes. The last stage that makes it counts.
        deps: Assets that it depends on without reading them as arguments.
        deps_where_made: The same, of stages that some settings leave out.
        once: Whether it is made once and not in each iteration.
        state: Whether it looks up what other iterations left.
        opt_in: Whether it is made only when it is asked for by name.
        needs: What the settings have to state before it can be made, as a sentence; None if they do. Until then the graph shows
            it, but nothing can make it: were it made of nothing, it would look finished.
        kinds: How the UI marks it where it does no work with models.
    """

    function: Callable[..., Any] = dataclasses.field(init=False)
    schema: type[Table] | None = None
    _: dataclasses.KW_ONLY
    group: Group
    lazy: bool = False
    checkpoint: bool = False
    reads: Sequence[str] = ()
    work: Sequence[WorkKind] = ()
    samplings: Callable[[Settings], Iterable[Sampling]] | None = None
    cost: Cost | None = None
    code: Callable[[Settings], Iterable[Callable[..., Any]]] | None = None
    made_from: Mapping[str, str] = dataclasses.field(default_factory=dict)
    side: str | None = None
    deps: Sequence[str] = ()
    deps_where_made: Sequence[str] = ()
    once: bool = False
    state: bool = False
    opt_in: bool = False
    needs: Callable[[Settings], str | None] = lambda settings: None
    kinds: Sequence[str] = ()

    def __call__(self, function: Callable[..., Any]) -> Self:
        """Decorates the function."""
        self.function = function
        return self

    @property
    def name(self) -> str:
        """The name of the asset."""
        return self.function.__name__

    @property
    def inputs(self) -> list[str]:
        """The assets that it reads as arguments."""
        return [name for name in inspect.signature(self.function).parameters if name not in ("context", "services")]

    @property
    def _form(self) -> str:
        """What people filter the catalog by."""
        return "model" if self.checkpoint else "table" if self.schema else "files"

    def functions(self, settings: Settings) -> list[Callable[..., Any]]:
        """Its body, and the functions that the settings choose for it."""
        return [self.function, *(self.code(settings) if self.code else [])]

    def sampling_setting(self, settings: Settings) -> str | None:
        """The first setting of `reads` by which it samples answers; None where it does not, or where a section has several."""
        for name in self.reads if "generates" in self.work else ():
            value = operator.attrgetter(name)(settings)
            fields = [(name, value)]
            if isinstance(value, BaseModel) and not isinstance(value, Sampling):
                fields = [(f"{name}.{field}", each) for field, each in value]
            if named := [place for place, each in fields if isinstance(each, Sampling)]:
                return named[0] if len(named) == 1 else None
        return None

    def reading(self) -> list[str]:
        """The settings that decide its result, by dotted name, without the random seed, which decides all."""
        return sorted({*self.reads, *(name for kind in self.work for name in ENGINE_READS[kind])})

    def description(self, settings: Settings) -> str:
        """What the UI says of it: its docstring, the settings that decide it, and what they lack."""
        parts = [inspect.getdoc(self.function) or ""]
        if names := ", ".join(f"`{name}`" for name in self.reading()):
            parts.append(f"Settings that decide it: {names}.")
        if missing := self.needs(settings):
            parts.insert(0, f"**Off.** {missing} Then press *Reload definitions*.")
        return "\n\n".join(parts)

    def asset(self, settings: Settings, sides: Mapping[str, str], deps: Sequence[str]) -> dg.AssetsDefinition:
        """The asset for some settings; only its place in the graph where they do not state what it needs.

        Args:
            sides: The assets that make the sides of a pair, by the names that other stages have for them.
            deps: Assets that it depends on beside its own inputs.
        """
        reads = sorted({*self.reading(), "random_seed"})
        metadata: dict[str, Any] = {
            MADE_FROM: {column: sides.get(name, name) for column, name in self.made_from.items()},
            READS: reads,
        }
        if self.schema:
            metadata["dagster/column_schema"] = column_schema(self.schema)
        tags = [f"synpo/{kind}" for kind in self.work] + [OPT_IN_TAG] * self.opt_in + [STATE_TAG] * self.state
        shown: dict[str, Any] = {
            "description": self.description(settings),
            "group_name": self.group,
            "partitions_def": None if self.once else iterations(settings),
            "kinds": {self._form, *(["huggingface"] if self.work else self.kinds)},
            "tags": dict.fromkeys(tags, "true"),
            "metadata": metadata,
        }
        if self.needs(settings):
            inputs = [sides.get(name, name) for name in self.inputs]
            return dg.AssetsDefinition(specs=[dg.AssetSpec(self.name, deps=[*inputs, *deps, *self.deps], **shown)])
        make = dg.asset(
            name=self.name,
            ins={name: dg.AssetIn(key=sides[name]) for name in self.inputs if name in sides},
            deps=[*deps, *self.deps],
            pool=GPU_POOL if self.work else None,
            op_tags={GPU_TAG: "true"} if self.work else None,
            code_version=code_version(self.functions(settings), self.schema, reads, settings),
            retry_policy=RETRIES,
            io_manager_key="tables" if self.schema else "checkpoints" if self.checkpoint else None,
            dagster_type=frame_type(self.schema, pl.LazyFrame if self.lazy else pl.DataFrame) if self.schema else None,
            **shown,
        )
        return make(self.function)


def stages_in(modules: Iterable[ModuleType]) -> list[Stage]:
    """The stages that modules define, in order."""
    return [value for module in modules for value in vars(module).values()
            if isinstance(value, Stage) and value.function.__module__ == module.__name__]  # fmt: skip


def assets_of(stages: Sequence[Stage], settings: Settings) -> list[dg.AssetsDefinition]:
    """The assets of an experiment.

    The first asset of an iteration depends on all that is made once, or the daemon would split an iteration into several
    runs. What another asset made once already depends on is left out. The last one depends on all that nothing else reads.
    """
    sides = {each.side: each.name for each in stages if each.side}
    repeated = {each.name for each in stages if not each.once}
    once = [each for each in stages if each.once and repeated.isdisjoint([*each.inputs, *each.deps])]
    used = {name for each in [*once, *(each for each in stages if each.name == FIRST)] for name in each.inputs}
    read = {
        sides.get(name, name)
        for each in stages
        if not each.opt_in
        for name in [*each.inputs, *each.deps, *each.deps_where_made]
    }
    ends = [each.name for each in stages if not each.once and not each.opt_in and each.name not in {*read, LAST}]
    deps = {FIRST: [each.name for each in once if each.name not in used], LAST: ends}
    made = {each.name for each in stages}
    return [
        each.asset(settings, sides, [*deps.get(each.name, []), *made.intersection(each.deps_where_made)])
        for each in stages
    ]
