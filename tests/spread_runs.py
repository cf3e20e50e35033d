"""A few steps of each experiment in double precision, on so many devices.

python tests/spread_runs.py 1 4 8    # forces 8 CPU devices, and compares
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import meshes
import numpy as np
from cheap_cells import CHEAP
from tiny_network import TinyNetwork

from darts_jax import augment, data, genotype, text
from experiments import (
    evaluate_cnn,
    evaluation_config,
    images,
    runner,
    search_cnn,
    search_config,
    search_rnn,
)
from experiments import evaluate_rnn as rnn

STEPS = 3
SUPERNET = "search_cnn unrolled supernet"
RUNS = (
    "search_cnn first_order",
    "search_cnn unrolled",
    "search_cnn finite_difference",
    "search_rnn unrolled",
    "evaluate_cnn",
    "evaluate_rnn",
)


class Run(NamedTuple):
    """What came of a few steps.

    Attributes:
      metrics: of each step.
      sums: of an evaluation.
      state: at the end.
      compiled: names of programs that steps after the first compiled.
    """

    metrics: list[Any]
    sums: Any
    state: Any
    compiled: list[str]


def make_job(name: str, seeds: int, at_once: int | None) -> runner.Job:
    """The job of an experiment, on networks that compile in seconds."""
    fields = {"seeds": seeds, "seeds_at_once": at_once}
    experiment, *rest = name.split()
    if experiment == "search_cnn":
        config = search_cnn.PRESETS["smoke"][1]
        config = replace(
            config,
            data=replace(config.data, cutout=2, flip=True),
            search=replace(config.search, estimator=rest[0]),
            **fields,
        )
        if name == SUPERNET:
            config = replace(config, network=replace(config.network, nodes=1))
            return search_cnn.make_job(config, digits(config), Path())
        with mock.patch.object(search_cnn, "supernet", tiny):
            return search_cnn.make_job(config, digits(config), Path())
    if experiment == "evaluate_cnn":
        config = evaluation_config.PRESETS["smoke"][1]
        train = replace(config.train, batch_size=16, precision="float64")
        config = replace(config, cells=CHEAP, train=train, **fields)
        return evaluate_cnn.make_job(config, digits(config))
    corpus = text.load("pydoc", limit=1000)
    if experiment == "search_rnn":
        config = search_rnn.PRESETS["smoke"][1]
        search = replace(config.search, estimator=rest[0], length=5)
        config = replace(config, search=search, **fields)
        return search_rnn.make_job(config, corpus, Path())
    config = rnn.PRESETS["smoke"][1]
    train = replace(config.train, length=5)
    cell = genotype.PUBLISHED_RECURRENT["DARTS_V1"]
    return rnn.make_job(replace(config, cell=cell, train=train), corpus)


def tiny(config: search_config.NetworkConfig, num_classes: int) -> TinyNetwork:
    """In place of the supernet."""
    return TinyNetwork(config.channels, config.layers, num_classes, config.nodes)


def digits(config: Any) -> data.Dataset:
    """The images of a config."""
    return data.load("digits", None, config.data.limit)


def double(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function whose images are float64, as everything else then is."""
    return lambda *args, **options: function(*args, **options).astype(float)


def wide(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    """A leaf in double precision, unlike in Flax's layers; but the rate of a text is in single."""
    if "learning_rate" in jax.tree_util.keystr(path):
        return leaf.astype(jnp.float32)
    return leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def run(name: str, count: int, seeds: int = 1, at_once: int | None = None) -> Run:
    """A few steps and an evaluation on so many devices, of so many seeds."""
    compiled: list[str] = []

    def listen(event: str, _: float, fun_name: str = "", **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    with (
        meshes.use(count),
        jax.enable_x64(True),
        mock.patch.object(images, "augment", double(augment.augment)),
        mock.patch.object(images, "normalize", double(augment.normalize)),
    ):
        job = make_job(name, seeds, at_once)
        state, metrics = job.place(jax.tree.map_with_path(wide, job.init())), []
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            for batch in job.train_batches(0)[:STEPS]:
                state, measured = job.train_step(state, job.data, batch)
                metrics.append(jax.device_get(measured))
                if len(metrics) == 1:
                    compiled.clear()
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        sums = jax.device_get(job.eval_step(state, job.data, job.eval_batches[-1]))
    return Run(metrics, sums, state, compiled)


def compare(name: str, count: int, one: Run, many: Run, groups: int = 1) -> None:
    """Asserts that many devices do what one does, and have the state as they should.

    Groups of devices have seeds of their own, and the devices of a group columns of hidden states.
    """
    assert many.compiled == [], many.compiled
    for path, leaf in jax.tree.leaves_with_path(many.state):
        place, part = jax.tree_util.keystr(path), list(leaf.shape)
        if groups > 1:
            part[0] //= groups
        if "hidden" in place:
            part[-2] //= count // groups
        assert len(leaf.sharding.device_set) == count, place
        assert leaf.sharding.shard_shape(leaf.shape) == tuple(part), place
    compared = [(one.metrics, many.metrics), (one.sums, many.sums), (one.state, many.state)]
    check = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    for a, b in compared:
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                check(np.asarray(y), np.asarray(x), err_msg=name)


if __name__ == "__main__":
    first, *counts = map(int, sys.argv[1:])
    jax.config.update("jax_num_cpu_devices", max(counts))
    jax.config.update("jax_disable_most_optimizations", True)
    for each in (*RUNS, SUPERNET):
        alone = run(each, first)
        for number in counts:
            compare(each, number, alone, run(each, number))
        print(each, "the same on", *counts)
