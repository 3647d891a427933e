"""Tables for the terminal and for results/*.md, from the same rows."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], str]]


def number_cell(name: str, digits: int) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        value = record.get(name)
        return "-" if value is None else f"{value:,.{digits}f}"

    return cell


def _agreement_cell(record: Record) -> str:
    share = record.get("differing")
    if share is None:
        return ""
    if isinstance(share, str):
        return share
    return "same bits" if share == 0 else f"{share:.2%} differ"


def _seconds_cell(record: Record) -> str:
    return record["failure"] or number_cell("whole_s", 2)(record)


METHOD_COLUMNS: list[Column] = [
    ("method", lambda record: record["method"]),
    ("whole s", _seconds_cell),
    ("inner s", number_cell("inner_s", 2)),
    ("x floor", number_cell("times_floor", 2)),
    ("passes", number_cell("passes", 0)),
    ("ns / element", number_cell("ns_per_element", 1)),
    ("whole / ours", number_cell("whole_over_ours", 2)),
    ("inner / ours", number_cell("inner_over_ours", 2)),
    ("peak RSS MB", number_cell("peak_rss_mb", 0)),
    ("anonymous MB", number_cell("peak_anonymous_mb", 0)),
    ("above imports MB", number_cell("anonymous_above_imports_mb", 0)),
    ("against ours", _agreement_cell),
    ("runs", lambda record: str(record["runs"])),
]
MEMORY_COLUMNS: list[Column] = [
    ("parameters", number_cell("parameters", 0)),
    ("dtype", lambda record: record["dtype"]),
    ("models", lambda record: str(record["models"])),
    ("inner s", lambda record: record["failure"] or number_cell("inner_s", 2)(record)),
    ("peak RSS MB", number_cell("peak_rss_mb", 0)),
    ("anonymous MB", number_cell("peak_anonymous_mb", 1)),
    ("above imports MB", number_cell("anonymous_above_imports_mb", 1)),
]
ABSORB_COLUMNS: list[Column] = [
    ("model", lambda record: record["model"]),
    ("whole s", _seconds_cell),
    ("read MB", number_cell("read_mb", 1)),
    ("written MB", number_cell("written_mb", 1)),
    ("reads / (base + state + model)", number_cell("reads", 3)),
    ("writes / state", number_cell("writes", 3)),
]
GROWTH_COLUMNS: list[Column] = [
    ("method", lambda record: record["method"]),
    ("T", lambda record: str(record["tasks"])),
    ("whole s", _seconds_cell),
    ("peak anonymous MB", number_cell("anonymous_mb", 0)),
    ("read MB", number_cell("read_mb", 0)),
    ("kept for the next task MB", number_cell("kept_mb", 0)),
]


SCALING_COLUMNS: list[Column] = [
    ("parameters", number_cell("parameters", 0)),
    ("models", lambda record: str(record["models"])),
    ("workers", lambda record: str(record["workers"])),
    ("wall s", lambda record: record["failure"] or number_cell("inner_s", 2)(record)),
    ("processor s", number_cell("processor_s", 2)),
    ("model s", number_cell("predicted_s", 2)),
    ("processor / model", number_cell("over_predicted", 2)),
    ("wall / model", number_cell("wall_over_predicted", 2)),
    ("peak RSS MB", number_cell("peak_rss_mb", 0)),
    ("above imports MB", number_cell("above_imports_mb", 1)),
]
COLD_COLUMNS: list[Column] = [
    ("round", lambda record: str(record["round"])),
    ("floor s", number_cell("floor_s", 2)),
    ("floor MB/s", number_cell("floor_mb_s", 0)),
    ("ours s", number_cell("ours_s", 2)),
    ("x floor", number_cell("times_floor", 2)),
    ("ours, processor s", number_cell("processor_s", 2)),
]


def _percent_cell(name: str) -> Callable[[Record], str]:
    return lambda record: f"{record[name]:.3%}"


def _significant_cell(name: str) -> Callable[[Record], str]:
    return lambda record: f"{record[name]:.2g}"


PARITY_COLUMNS: list[Column] = [
    ("recipe", lambda record: record["method"]),
    ("dtype", lambda record: record["dtype"]),
    ("equal", _percent_cell("equal")),
    ("largest difference", _significant_cell("apart")),
    ("ours nearest to exact", _percent_cell("ours_nearest")),
    ("mergekit nearest to exact", _percent_cell("theirs_nearest")),
    ("our largest error", _significant_cell("ours_error")),
    ("mergekit's largest error", _significant_cell("theirs_error")),
    ("why", lambda record: record["why"]),
]
MOMENT_COLUMNS: list[Column] = [
    ("recipe", lambda record: record["method"]),
    ("dtype", lambda record: record["dtype"]),
    ("moved, ours", _percent_cell("ours_moved")),
    ("moved, mergekit", _percent_cell("theirs_moved")),
    ("mean move, ours", _significant_cell("ours_mean")),
    ("mean move, mergekit", _significant_cell("theirs_mean")),
    ("rms move, ours", _significant_cell("ours_rms")),
    ("rms move, mergekit", _significant_cell("theirs_rms")),
]


def print_table(title: str, columns: list[Column], records: list[Record]) -> None:
    table = Table(title=title, title_justify="left")
    for index, (name, _) in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    for record in records:
        table.add_row(*(cell(record) for _, cell in columns))
    Console(width=None if Console().is_terminal else 180).print(table)


def markdown_table(columns: list[Column], records: list[Record]) -> str:
    names = [name for name, _ in columns]
    lines = [names, ["---", *["---:"] * (len(names) - 1)]]
    lines += [[cell(record).replace("|", "/") for _, cell in columns] for record in records]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
