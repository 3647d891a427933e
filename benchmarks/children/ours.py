"""magmax from Python, everything imported beforehand."""

from child import job, timed

import magmax
import magmax.merging
from magmax.merging.execution.execution_options import Settings

if __name__ == "__main__":
    task = job()
    merge = magmax.merge
    settings = Settings(task.get("threads", 0))
    timed(lambda: merge(task["rule"], base=task["base"], models=task["models"], out=task["out"], settings=settings))
