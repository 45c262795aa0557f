"""One refine task: `python jobs/refine.py WORKSPACE [--index I]`; the index defaults to SLURM_ARRAY_TASK_ID."""

from cmrhpc.cli import job

job("refine")
