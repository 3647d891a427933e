"""`python -m magmax.cli`, for launchers that start modules."""

from . import main

main()
