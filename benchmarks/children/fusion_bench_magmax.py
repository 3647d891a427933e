"""FusionBench's MagMaxAlgorithm, its pool loading one model at a time from the files."""

from pathlib import Path

from child import job, timed
from fusion_bench.method import MagMaxAlgorithm
from fusion_bench.modelpool import BaseModelPool
from in_memory import SCALING_FACTOR, save
from modules import state_of


def run(base: str, models: list[str], out: Path) -> None:
    named = {"_pretrained_": base} | {f"task{number}": path for number, path in enumerate(models, 1)}
    pool = BaseModelPool({name: {"_target_": "modules.module_from", "path": path} for name, path in named.items()})
    merged = MagMaxAlgorithm(scaling_factor=SCALING_FACTOR, inplace=True).run(pool)
    save(state_of(merged), base, out)


if __name__ == "__main__":
    task = job()
    timed(lambda: run(task["base"], task["models"], Path(task["out"])))
