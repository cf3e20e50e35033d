"""Trained networks in files: saved by a run, loaded to predict, exported to run on their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from darts_jax import checkpoint, genotype
from darts_jax.augment import normalize
from darts_jax.evaluation import EvaluationNetwork
from darts_jax.files import write_text

PyTree = Any

DESCRIPTION, VARIABLES = "model.json", "model"  # a file and a folder of a workdir
_FIELDS = ("channels", "layers", "num_classes", "stem")


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      apply: `apply(variables, images) -> logits` [N, classes], float32; pure, and works in jit.
        Images are uint8 [N, height, width, channels].
      variables: its parameters and running statistics.
      network: the module that apply is made of.
      image_shape: (height, width, channels).
    """

    apply: Callable[[PyTree, Array], Array]
    variables: PyTree
    network: EvaluationNetwork
    image_shape: tuple[int, int, int]


def save(
    workdir: str | Path,
    network: EvaluationNetwork,
    variables: PyTree,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Writes networks of one architecture to a folder, for `load`.

    Args:
      workdir: the folder.
      network: the architecture, made of the operations of the library.
      variables: {"params", "batch_stats"}, every array stacked over the networks.
      image_shape: (height, width, channels).
      mean, std: as for `augment.normalize`, by which the network's input was normalised.
    """
    description = {
        "genotype": network.genotype._asdict(),
        **{name: getattr(network, name) for name in _FIELDS},
        "image_shape": image_shape,
        "mean": mean,
        "std": std,
        "count": len(jax.tree.leaves(variables)[0]),
    }
    with checkpoint.open_saver(Path(workdir) / VARIABLES, keep=1) as saver:
        checkpoint.save(saver, checkpoint.next_step(saver), variables)
    write_text(Path(workdir) / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def load(workdir: str | Path, index: int = 0) -> Trained:
    """A network that a run has trained and saved.

    Args:
      workdir: the folder of the run.
      index: which of its networks, by the order of their seeds.

    Raises:
      ValueError: if there is none, or it cannot be read.
    """
    path = Path(workdir) / DESCRIPTION
    try:
        found = json.loads(path.read_text())
        cells = genotype.validate(genotype.Genotype(**found["genotype"]))
        network = EvaluationNetwork(cells, **{name: found[name] for name in _FIELDS})
        image_shape, mean, std = (tuple(found[name]) for name in ("image_shape", "mean", "std"))
        count = found["count"]
    except FileNotFoundError:
        raise ValueError(
            f"{workdir} holds no trained network (no {DESCRIPTION}); give the folder of a run of"
            " experiments.evaluate_cnn that has ended"
        ) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); train the network again") from error
    if not 0 <= index < count:
        raise ValueError(f"{workdir} holds {count} networks; give an index from 0 to {count - 1}")
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=True)
    )
    like = jax.tree.map(lambda x: np.zeros((count, *x.shape), x.dtype), shapes)
    restored = checkpoint.restore_latest(Path(workdir) / VARIABLES, like)
    if restored is None:
        raise ValueError(f"{workdir} holds no {VARIABLES}/; train the network again")
    variables = jax.tree.map(lambda x: x[index], restored.state)

    def apply(variables: PyTree, images: Array) -> Array:
        return network.apply(variables, normalize(images, mean, std), train=False).main

    return Trained(apply, variables, network, image_shape)


def export(trained: Trained, path: str | Path) -> None:
    """Writes a network to a file that runs without this library, on CPU, GPU and TPU.

    In any process with JAX, for any number of images:

        network = jax.export.deserialize(bytearray(open(path, "rb").read()))
        logits = network.call(images)  # uint8 [N, height, width, channels]
    """
    (count,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, *trained.image_shape), jnp.uint8)
    function = jax.jit(lambda images: trained.apply(trained.variables, images))
    exported = jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(images)
    Path(path).write_bytes(exported.serialize())
