"""One synthesize task: `python jobs/synthesize.py WORKSPACE [--index I]`; the index defaults to SLURM_ARRAY_TASK_ID."""

from cmrhpc.cli import job

job("synthesize")
