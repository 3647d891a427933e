"""mergekit with its default options: run_merge on model folders, the raw merge on single files.

The folders have no tokenizer, so none is copied. The raw merge is what the command mergekit-pytorch does; a
folder's architecture would have to be one that mergekit knows, and a ViT is not.
"""

from pathlib import Path
from typing import Any

from child import read_job, run_timed
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

OPTIONS = MergeOptions(copy_tokenizer=False, quiet=True)


def recipe(task: dict[str, Any]) -> dict[str, Any]:
    parameters = {"weight": 1.0} | ({"density": task["density"]} if "density" in task else {})
    base = {} if task["rule"] == "linear" else {"base_model": task["base"]}
    return base | {
        "merge_method": task["rule"],
        "models": [{"model": model, "parameters": parameters} for model in task["models"]],
        "dtype": task["dtype"],
    }


def run(task: dict[str, Any]) -> None:
    if Path(task["base"]).is_dir():
        run_merge(MergeConfiguration.model_validate(recipe(task)), task["out"], options=OPTIONS)
        return
    config = RawPyTorchMergeConfig.model_validate(recipe(task))
    tasks = plan_flat_merge(config, task["out"], tensor_union=False, tensor_intersection=False, options=OPTIONS)
    Executor(tasks, math_device="cpu", storage_device="cpu").execute()


if __name__ == "__main__":
    task = read_job()
    run_timed(lambda: run(task))
