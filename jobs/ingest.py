"""One ingest task: `python jobs/ingest.py WORKSPACE [--index I]`; the index defaults to SLURM_ARRAY_TASK_ID."""

from cmrhpc.cli import job

job("ingest")
