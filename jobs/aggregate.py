"""One aggregate task: `python jobs/aggregate.py WORKSPACE [--index I]`; the index defaults to SLURM_ARRAY_TASK_ID."""

from cmrhpc.cli import job

job("aggregate")
