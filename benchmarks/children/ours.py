"""magmax from Python, everything imported beforehand."""

from child import job, timed

import magmax
import magmax.engine

if __name__ == "__main__":
    task = job()
    merge = magmax.merge
    timed(lambda: merge(task["rule"], base=task["base"], models=task["models"], out=task["out"]))
