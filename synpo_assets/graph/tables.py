"""What a table is: how it is checked against its schema, and how Dagster and its UI know of that.

A table that breaks its schema fails the step before anything is written, and the message shows the first bad rows.
"""

import functools

import dagster as dg
import pandera.errors
import pandera.polars as pa
import polars as pl

from synpo_assets.method.outcomes import NO_VERDICT, POINTS
from synpo_assets.method.seed import HELD_OUT

SHOWN_BAD_ROWS = 5


class Table(pa.DataFrameModel):
    """A table: no unknown columns, no missing values, columns in the order stated."""

    class Config:
        """Checked of every table."""

        strict = True
        ordered = True


def id_column(description: str, unique: bool = False) -> str:
    """A content hash or a checkpoint's sha."""
    return pa.Field(str_length={"min_value": 3}, description=description, unique=unique)


def text_column(description: str) -> str:
    """A text that is not empty."""
    return pa.Field(str_length={"min_value": 1}, description=description)


def share_column(description: str, nullable: bool = False) -> float:
    """A share, from 0 to 1."""
    return pa.Field(ge=0, le=1, nullable=nullable, description=description)


def split_column() -> str:
    """Which of the held-out splits a row belongs to."""
    return pa.Field(isin=HELD_OUT, description="`dev`: searches and the gate read it; `test`: tables report it.")


def outcome_column(judge: str, opponent: str, of: str = "M_t's", nullable: bool = False) -> str:
    """What a judge says of two answers."""
    return pa.Field(
        isin=[*POINTS, NO_VERDICT],
        nullable=nullable,
        description=f"What {judge} says of {of} answer beside {opponent}'s: win, tie, loss or no verdict.",
    )


def column_schema(model: type[Table]) -> dg.TableSchema:
    """The columns with their descriptions, as the UI shows them."""
    columns = model.to_schema().columns
    return dg.TableSchema(
        columns=[
            dg.TableColumn(name, type=str(column.dtype), description=column.description)
            for name, column in columns.items()
        ]
    )


def check(model: type[Table], table: pl.DataFrame) -> str | None:
    """None if a table is valid, else a text that names the broken rules and shows the first bad rows."""
    try:
        model.validate(table, lazy=True)
    except pandera.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        shown = [_case(table, case) for case in cases.head(SHOWN_BAD_ROWS).to_dicts()]
        return f"{model.__name__}: {cases.height} violations, the first of them:\n" + "\n".join(shown)
    return None


@functools.cache
def frame_type(model: type[Table], frame: type[pl.DataFrame] | type[pl.LazyFrame] = pl.DataFrame) -> dg.DagsterType:
    """A Dagster type that accepts exactly the tables of a schema; its failure shows the first bad rows.

    Of a lazy frame only the column types are checked: whoever streams it validates each batch with `check`.
    """

    def type_check(_context: dg.TypeCheckContext, value: object) -> dg.TypeCheck:
        if not isinstance(value, frame):
            return dg.TypeCheck(success=False, description=f"expected a {frame.__name__}, got {type(value).__name__}")
        problem = check(model, value if isinstance(value, pl.DataFrame) else value.head(0).collect())
        return dg.TypeCheck(success=problem is None, description=problem)

    return dg.DagsterType(
        type_check_fn=type_check, name=f"{model.__name__}{frame.__name__}", description=model.__doc__, typing_type=frame
    )


def _case(table: pl.DataFrame, case: dict[str, object]) -> str:
    rule = f"- {case.get('column') or 'table'}: {case['check']} fails on {str(case['failure_case'])[:80]!r}"
    place = case.get("index")
    return rule if place is None else f"{rule} in row {place}: {str(table.row(int(str(place)), named=True))[:300]}"
