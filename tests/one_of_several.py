"""Runs an experiment whose network compiles in a second: one process, or one of several.

python tests/one_of_several.py search_cnn smoke ...
"""

import sys
from importlib import import_module
from unittest import mock

import spread_runs

from experiments import search_cnn

if __name__ == "__main__":
    module = import_module(f"experiments.{sys.argv[1]}")
    with mock.patch.object(search_cnn, "supernet", spread_runs.tiny):
        sys.exit(module.main(sys.argv[2:]))
