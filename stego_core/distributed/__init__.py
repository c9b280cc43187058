"""The only package that imports ray: clusters, pipelines, trainers."""

import os

# Ray Data reads this as it is imported. By default a stage runs ahead until half of its share of
# the object store is full, so memory would grow with the pile; here from a fiftieth on it waits for
# the next stage (`units.configure`). At 0, receipts of a few bytes stop the stages before them.
os.environ.setdefault("RAY_DATA_DOWNSTREAM_CAPACITY_OBJECT_STORE_BUDGET_UTIL_THRESHOLD", "0.02")
