"""FusionBench's MagMaxAlgorithm, its pool loading one model at a time from the files."""

from pathlib import Path

from child import read_job, run_timed
from fusion_bench.method import MagMaxAlgorithm
from fusion_bench.modelpool import BaseModelPool
from in_memory import SCALING_FACTOR, save
from modules import module_state


def run(base: str, models: list[str], out: Path) -> None:
    named = {"_pretrained_": base} | {f"task{number}": path for number, path in enumerate(models, 1)}
    pool = BaseModelPool({name: {"_target_": "modules.module_from", "path": path} for name, path in named.items()})
    merged = MagMaxAlgorithm(scaling_factor=SCALING_FACTOR, inplace=True).run(pool)
    save(module_state(merged), base, out)


if __name__ == "__main__":
    task = read_job()
    run_timed(lambda: run(task["base"], task["models"], Path(task["out"])))
