"""mergekit carries out recipes from files, one after the other: [recipe, output folder, compute type or null] each.

What `mergekit-yaml RECIPE OUT --no-copy-tokenizer --random-seed 0` does; a type that is given replaces the recipe's.
"""

from pathlib import Path

import yaml
from child import read_job
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

OPTIONS = MergeOptions(copy_tokenizer=False, quiet=True, random_seed=0)

if __name__ == "__main__":
    for recipe, out, dtype in read_job()["merges"]:
        content = yaml.safe_load(Path(recipe).read_text())
        if dtype:
            content["dtype"] = dtype
        run_merge(MergeConfiguration.model_validate(content), out, options=OPTIONS)
