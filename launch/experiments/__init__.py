"""Experiments that `python -m launch.reproduce NAME` runs, one module each with `DESCRIPTION` and `run(out, quick)`."""
