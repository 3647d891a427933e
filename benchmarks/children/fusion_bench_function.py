"""FusionBench's function magmax_merge on modules that are all loaded first."""

from pathlib import Path

from child import read_job, run_timed
from fusion_bench.method.magmax.magmax import magmax_merge
from in_memory import SCALING_FACTOR, save
from modules import build_module, module_state


def run(base: str, models: list[str], out: Path) -> None:
    merged = magmax_merge(build_module(base), [build_module(model) for model in models], scaling_factor=SCALING_FACTOR)
    save(module_state(merged), base, out)


if __name__ == "__main__":
    task = read_job()
    run_timed(lambda: run(task["base"], task["models"], Path(task["out"])))
