"""results/NAME.json, one entry a workload, and results/NAME.md drawn from it."""

import json
from typing import Any

from harness.machine import commit, hardware, our_versions
from harness.places import RESULTS
from harness.tables import Column, Record, markdown, show


def entry(title: str, records: list[Record], load: float, **more: Any) -> dict[str, Any]:
    """One workload's result with what it was measured on."""
    about = {"commit": commit(), "hardware": hardware(), "load_before": load}
    return {"title": title, **about, "versions": {"ours": our_versions()}, **more, "records": records}


def publish(file: str, name: str, found: dict[str, Any], columns: dict[str, list[Column]], save: bool) -> None:
    """Prints the table; with `save` also replaces this workload's entry in results/`file`."""
    show(f"{found['title']} (commit {found['commit']})", columns[name], found["records"])
    if not save:
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{file}.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries = dict(sorted((entries | {name: found}).items()))
    path.write_text(json.dumps(entries, indent=1) + "\n")
    sections = [_section(entries[key], columns[key]) for key in entries]
    (RESULTS / f"{file}.md").write_text("\n".join(sections))


def _section(found: dict[str, Any], columns: list[Column]) -> str:
    machine = found["hardware"]
    about = (
        f"Commit {found['commit']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}, Python {machine['python']}, numpy {machine['numpy']}; "
        f"load before the first run {found['load_before']}."
    )
    rivals = [
        ", ".join(f"{package} {version}" for package, version in sorted(packages.items()))
        for name, packages in found["versions"].items()
        if name != "ours" and packages
    ]
    notes = [f"Environment: {line}." for line in rivals] + found.get("notes", [])
    return "\n\n".join([f"## {found['title']}", about, markdown(columns, found["records"]).rstrip(), *notes]) + "\n"
