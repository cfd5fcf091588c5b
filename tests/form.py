"""Whether tests run in their short form, or in full numbers: `make model-tests`, `make batch-tests`."""

import os

FULL = os.environ.get("ROLLOUTQ_MODEL_TESTS") == "full"
"""Those on the real model."""
FULL_BATCHES = os.environ.get("ROLLOUTQ_BATCH_TESTS") == "full"
"""Those of offline batches."""
