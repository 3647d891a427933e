"""results/NAME.json, one entry a workload, and results/NAME.md drawn from it."""

import json
from typing import Any

from harness.machine import git_commit, hardware, our_versions
from harness.places import RESULTS
from harness.tables import Column, Record, markdown_table, print_table


def make_entry(title: str, records: list[Record], load: float, **more: Any) -> dict[str, Any]:
    """One workload's result with what it was measured on."""
    about = {"commit": git_commit(), "hardware": hardware(), "load_before": load}
    return {"title": title, **about, "versions": {"ours": our_versions()}, **more, "records": records}


def publish_entry(file: str, name: str, entry: dict[str, Any], columns: dict[str, list[Column]], save: bool) -> None:
    """Prints the table; with `save` also replaces this workload's entry in results/`file`."""
    print_table(f"{entry['title']} (commit {entry['commit']})", columns[name], entry["records"])
    if not save:
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{file}.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries = dict(sorted((entries | {name: entry}).items()))
    path.write_text(json.dumps(entries, indent=1) + "\n")
    sections = [_render_section(entries[key], columns[key]) for key in entries]
    (RESULTS / f"{file}.md").write_text("\n".join(sections))


def _render_section(entry: dict[str, Any], columns: list[Column]) -> str:
    machine = entry["hardware"]
    about = (
        f"Commit {entry['commit']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}, Python {machine['python']}, numpy {machine['numpy']}; "
        f"load before the first run {entry['load_before']}."
    )
    rivals = [
        ", ".join(f"{package} {version}" for package, version in sorted(packages.items()))
        for name, packages in entry["versions"].items()
        if name != "ours" and packages
    ]
    notes = [f"Environment: {line}." for line in rivals] + entry.get("notes", [])
    return (
        "\n\n".join([f"## {entry['title']}", about, markdown_table(columns, entry["records"]).rstrip(), *notes]) + "\n"
    )
