"""FusionBench's function magmax_merge on modules that are all loaded first."""

from pathlib import Path

from child import job, timed
from fusion_bench.method.magmax.magmax import magmax_merge
from in_memory import SCALING_FACTOR, save
from modules import module_from, state_of


def run(base: str, models: list[str], out: Path) -> None:
    merged = magmax_merge(module_from(base), [module_from(model) for model in models], scaling_factor=SCALING_FACTOR)
    save(state_of(merged), base, out)


if __name__ == "__main__":
    task = job()
    timed(lambda: run(task["base"], task["models"], Path(task["out"])))
