"""Tables for the terminal and for results/*.md, from the same rows."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], str]]


def number(name: str, digits: int) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        value = record.get(name)
        return "-" if value is None else f"{value:,.{digits}f}"

    return cell


def _bits(record: Record) -> str:
    share = record.get("differing")
    if share is None:
        return ""
    if isinstance(share, str):
        return share
    return "same bits" if share == 0 else f"{share:.2%} differ"


def _whole(record: Record) -> str:
    return record["failure"] or number("whole_s", 2)(record)


METHODS: list[Column] = [
    ("method", lambda record: record["method"]),
    ("whole s", _whole),
    ("inner s", number("inner_s", 2)),
    ("x floor", number("times_floor", 2)),
    ("passes", number("passes", 0)),
    ("ns / element", number("ns_per_element", 1)),
    ("whole / ours", number("whole_over_ours", 2)),
    ("inner / ours", number("inner_over_ours", 2)),
    ("peak RSS MB", number("peak_rss_mb", 0)),
    ("anonymous MB", number("peak_anonymous_mb", 0)),
    ("above imports MB", number("anonymous_above_imports_mb", 0)),
    ("against ours", _bits),
    ("runs", lambda record: str(record["runs"])),
]
MEMORY: list[Column] = [
    ("parameters", number("parameters", 0)),
    ("dtype", lambda record: record["dtype"]),
    ("models", lambda record: str(record["models"])),
    ("inner s", lambda record: record["failure"] or number("inner_s", 2)(record)),
    ("peak RSS MB", number("peak_rss_mb", 0)),
    ("anonymous MB", number("peak_anonymous_mb", 1)),
    ("above imports MB", number("anonymous_above_imports_mb", 1)),
]
ABSORB: list[Column] = [
    ("model", lambda record: record["model"]),
    ("whole s", _whole),
    ("read MB", number("read_mb", 1)),
    ("written MB", number("written_mb", 1)),
    ("reads / (base + state + model)", number("reads", 3)),
    ("writes / state", number("writes", 3)),
]
GROWTH: list[Column] = [
    ("method", lambda record: record["method"]),
    ("T", lambda record: str(record["tasks"])),
    ("whole s", _whole),
    ("peak anonymous MB", number("anonymous_mb", 0)),
    ("read MB", number("read_mb", 0)),
    ("kept for the next task MB", number("kept_mb", 0)),
]


SCALING: list[Column] = [
    ("parameters", number("parameters", 0)),
    ("models", lambda record: str(record["models"])),
    ("workers", lambda record: str(record["workers"])),
    ("wall s", lambda record: record["failure"] or number("inner_s", 2)(record)),
    ("processor s", number("processor_s", 2)),
    ("model s", number("predicted_s", 2)),
    ("processor / model", number("over_predicted", 2)),
    ("wall / model", number("wall_over_predicted", 2)),
    ("peak RSS MB", number("peak_rss_mb", 0)),
    ("above imports MB", number("above_imports_mb", 1)),
]
COLD: list[Column] = [
    ("round", lambda record: str(record["round"])),
    ("floor s", number("floor_s", 2)),
    ("floor MB/s", number("floor_mb_s", 0)),
    ("ours s", number("ours_s", 2)),
    ("x floor", number("times_floor", 2)),
    ("ours, processor s", number("processor_s", 2)),
]


def _share(name: str) -> Callable[[Record], str]:
    return lambda record: f"{record[name]:.3%}"


def _power(name: str) -> Callable[[Record], str]:
    return lambda record: f"{record[name]:.2g}"


PARITY: list[Column] = [
    ("recipe", lambda record: record["method"]),
    ("dtype", lambda record: record["dtype"]),
    ("equal", _share("equal")),
    ("largest difference", _power("apart")),
    ("ours nearest to exact", _share("ours_nearest")),
    ("mergekit nearest to exact", _share("theirs_nearest")),
    ("our largest error", _power("ours_error")),
    ("mergekit's largest error", _power("theirs_error")),
    ("why", lambda record: record["why"]),
]
MOMENTS: list[Column] = [
    ("recipe", lambda record: record["method"]),
    ("dtype", lambda record: record["dtype"]),
    ("moved, ours", _share("ours_moved")),
    ("moved, mergekit", _share("theirs_moved")),
    ("mean move, ours", _power("ours_mean")),
    ("mean move, mergekit", _power("theirs_mean")),
    ("rms move, ours", _power("ours_rms")),
    ("rms move, mergekit", _power("theirs_rms")),
]


def show(title: str, columns: list[Column], records: list[Record]) -> None:
    table = Table(title=title, title_justify="left")
    for index, (name, _) in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    for record in records:
        table.add_row(*(cell(record) for _, cell in columns))
    Console(width=None if Console().is_terminal else 180).print(table)


def markdown(columns: list[Column], records: list[Record]) -> str:
    names = [name for name, _ in columns]
    lines = [names, ["---", *["---:"] * (len(names) - 1)]]
    lines += [[cell(record).replace("|", "/") for _, cell in columns] for record in records]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
