"""Whether the tests on the real model run in their short form, or in full numbers (`make model-tests`)."""

import os

FULL = os.environ.get("ROLLOUTQ_MODEL_TESTS") == "full"
