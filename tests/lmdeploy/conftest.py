"""These tests run where lmdeploy is installed: `make test-lmdeploy`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("lmdeploy") else ["test_*.py"]
