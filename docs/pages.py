"""An mkdocs hook: the pages that are made of the code itself, all rules, and of the results as they were measured."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from magmax.rules import MergedTransform, Rule, StreamingRule, TaskVectorTransform, all_components
from magmax.rules.contract import Component

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "src" / "magmax" / "recipes" / "shipped"
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "rules.md", content=rules_page()))
    files.append(File.generated(config, "results.md", content=results_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file that is not of the site is shown as the file's name."""
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)


def rules_page() -> str:
    """Every rule and transform: what it computes, its options, its cost, its paper, a recipe."""
    kinds = all_components()
    merging, before, after = (
        [kind for kind in kinds.values() if issubclass(kind, of)] for of in (Rule, TaskVectorTransform, MergedTransform)
    )
    parts = [
        "# Rules",
        "A rule makes one merged task vector `m` of the task vectors `tau_1 ... tau_T`; the merged model is "
        "`theta_0 + scaling_factor * m`. `magmax recipes rules` prints the same in short.",
        *(section(kind) for kind in merging),
        "# Before a rule",
        "Transforms of each task vector, ahead of a rule in a chain: `rule: [{dare: {density: 0.1}}, magmax]`.",
        *(section(kind) for kind in before),
        "# After a rule",
        "Transforms of what a rule merged, behind it in a chain: `rule: [magmax, calibrate_weights]`.",
        *(section(kind) for kind in after),
    ]
    return "\n\n".join(parts) + "\n"


def section(kind: type[Component]) -> str:
    """One rule."""
    part = kind()
    options = ", ".join(f"`{f.name}: {getattr(part, f.name)}`" for f in dataclasses.fields(kind)) or "none"
    facts = [f"Options and defaults: {options}."]
    if isinstance(part, Rule):
        facts.append(f"Scaling factor: {part.scaling_factor:g}.")
        facts.append(f"Extra passes: {part.passes_in_words}.")
        facts.append("Absorbs task after task in constant memory." if isinstance(part, StreamingRule) else "")
    text = (
        f"## {kind.name}\n\n{rendered(inspect.getdoc(kind) or '')}\n\n{' '.join(filter(None, facts))}\n\n*{kind.paper}*"
    )
    if recipe := recipe_of(kind.name):
        text += f"\n\n```yaml\n{recipe}```"
    return text


def rendered(docstring: str) -> str:
    """A docstring as Markdown: examples as Python, what it raises left to the pages of the API."""
    text = docstring.split("\nRaises:")[0]
    return re.sub(
        r"((?:^>>> .*\n?)(?:.+\n?)*)", lambda found: f"```pycon\n{found[1].rstrip()}\n```\n", text, flags=re.M
    )


def recipe_of(name: str) -> str | None:
    """The shipped recipe that has the rule's name, or else the first that uses it."""
    own = RECIPES / f"{name.replace('_', '-')}.yaml"
    texts = [path.read_text(encoding="utf-8") for path in (own, *sorted(RECIPES.glob("*.yaml"))) if path.exists()]
    return next((text for text in texts if re.search(rf"^rule:.*\b{name}\b", text, re.MULTILINE)), None)


def results_page() -> str:
    """What was measured, as the benchmarks wrote it."""
    found = ["# Results", "As the commands in `benchmarks/` wrote them. What is missing was not run."]
    for path in sorted(RESULTS.glob("continual/*/results.md")):
        if not path.parent.name.startswith("magic-"):  # of which continual/magic has a shorter table
            found.append(f"## {path.parent.name}\n\n{path.read_text(encoding='utf-8')}")
    for path in sorted(RESULTS.glob("continual/*/environments/results.md")):
        found.append(f"## {path.parent.parent.name}: preferences\n\n{path.read_text(encoding='utf-8')}")
    for name in ("continual/magic", "language/results", "merge", "absorb", "cold", "growth", "parity"):
        found.append(re.sub(r"^#", "##", (RESULTS / f"{name}.md").read_text(encoding="utf-8"), flags=re.M))
    return "\n\n".join(found) + "\n"
