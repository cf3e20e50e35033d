import subprocess
import sys

from experiments.memory import peak_memory


def test_the_peak_is_in_bytes():
    assert 10e6 < peak_memory() < 1e12  # in kB, this process would need 10 GB to pass


def test_nothing_is_known_where_python_has_no_resource_module():
    code = """
import sys
sys.modules["resource"] = None
from experiments.memory import peak_memory
assert peak_memory() is None
assert not {"jax", "numpy", "rich"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
