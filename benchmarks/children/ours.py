"""magmax from Python, everything imported beforehand."""

from child import read_job, run_timed

import magmax
import magmax.merging
from magmax.merging.execution.execution_options import ExecutionOptions

if __name__ == "__main__":
    task = read_job()
    merge = magmax.merge
    settings = ExecutionOptions(task.get("threads", 0))
    run_timed(
        lambda: merge(task["rule"], base=task["base"], models=task["models"], out=task["out"], execution=settings)
    )
