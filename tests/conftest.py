"""Fixtures that every test file shares."""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import meshes
import numpy as np
import pytest

from darts_jax import native

# Other devices, for what is sharded; experiments use the first one alone, but in `meshes.use`.
jax.config.update("jax_num_cpu_devices", 4)
# Most of a test's time is compiling. So code is compiled in half the time, to run slower and give
# the same numbers but for rounding (`optimized` undoes that); and what one test has compiled,
# however small, is read by the others, though not from the user's own cache.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
if not jax.config.jax_compilation_cache_dir:
    jax.config.update(
        "jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
    )

# The files that take longest, which come first: what comes last should not keep one process busy
# while the others have nothing to do.
LONGEST = (
    "test_kill",
    "test_networks",
    "test_evaluate_cnn",
    "test_recurrent",
    "test_recurrent_hypergradient",
    "test_evaluation",
    "test_search",
    "test_hypergradient",
    "test_runner",
    "test_search_cnn",
    "test_compare_hypergradients",
    "test_docs",
    "test_unrolled",
    "test_benchmarks",
    "test_devices",
    "test_distributed",
    "test_rnn_experiments",
    "test_imagenet",
    "test_comparison_problems",
    "test_pooling",
    "test_mixing",
    "test_depthwise",
)

ORACLE = Path(__file__).parent / "oracle"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@cache
def _load(name: str) -> dict[str, Any]:
    path = ORACLE / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as archive:
        return dict(archive)


def _unpack(archive: dict[str, Any], pack: str) -> dict[str, np.ndarray]:
    shapes = json.loads(str(archive[f"{pack}_shapes"]))
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
    flat = np.split(archive[f"{pack}_flat"].astype(np.float64), ends[:-1])
    return {
        str(name): leaf.reshape(shape)
        for name, leaf, shape in zip(archive[f"{pack}_names"], flat, shapes, strict=True)
    }


@pytest.fixture(autouse=True, scope="session")
def one_device() -> Iterator[None]:
    """Experiments see one device."""
    with meshes.use(1):
        yield


@pytest.fixture
def two_devices(one_device: None) -> Iterator[None]:
    """Experiments see two."""
    with meshes.use(2):
        yield


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Compile as for users, where a test runs for longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in double precision."""
    with jax.enable_x64(True):
        yield


def pytest_report_header() -> list[str]:
    return [] if native.AVAILABLE else ["darts_jax_native is not installed: no test of its kernels"]


@contextmanager
def _in_form(form: str) -> Iterator[None]:
    if form == "kernels":
        if not native.AVAILABLE:
            pytest.skip("darts_jax_native is not installed")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        jax.clear_caches()  # or what is compiled already would be called
        patch.setattr(native, "AVAILABLE", False)
        if form == "lowered":
            patch.setattr(native, "preferred", lambda dtype: dtype in (np.float32, np.float64))
        yield
        jax.clear_caches()


@pytest.fixture(scope="module", params=["kernels", "portable"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the tests with kernels for CPUs, and again as where they are not installed."""
    with _in_form(request.param):
        yield request.param


@pytest.fixture(scope="module", params=["kernels", "lowered", "portable"])
def forms(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `kernels`, and as in a program that is exported: of the same primitives, without kernels.

    For functions that are other operations where no kernels are installed.
    """
    with _in_form(request.param):
        yield request.param


@pytest.fixture
def full_disk() -> Iterator[Callable[[int | None], None]]:
    """`full_disk(size)`: no file can grow beyond so many bytes any more; None undoes it."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="session")
def oracle_path() -> Path:
    """The folder of recorded numbers."""
    return ORACLE


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], dict[str, Any]]:
    """`oracle("toy_bilevel.npz")["hyper/w"]`: a recorded file, JSON or arrays, read once."""
    return _load


@pytest.fixture(scope="session")
def unpack() -> Callable[[dict[str, Any], str], dict[str, np.ndarray]]:
    """`unpack(oracle("search_cnn.npz"), "w")`: the tensors of a weight pack by name, float64."""
    return _unpack
