"""Names that stand in studies, files and commands alike. Imports nothing."""

STAGES = ("ingest", "synthesize", "refine", "classify", "aggregate")
METRICS = ("accuracy", "sensitivity", "specificity", "balanced_accuracy", "auc")
# Of shards; the number is raised when a reader of the old ones would misread the new.
COHORT_SCHEMA, FOLDS_SCHEMA, IMAGES_SCHEMA, PREDICTIONS_SCHEMA = "cohort-1", "folds-1", "images-1", "predictions-1"
