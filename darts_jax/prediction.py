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
from darts_jax.files import read_json, write_text

PyTree = Any

DESCRIPTION, VARIABLES = "model.json", "model"  # a file and a folder of a workdir
MAX_SIZE = 100_000  # of anything that a description counts
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
        network, image_shape, mean, std, count = _parse(read_json(path))
    except FileNotFoundError:
        raise ValueError(
            f"{workdir} holds no trained network (no {DESCRIPTION}); give the folder of a run of"
            " experiments.evaluate_cnn that has ended"
        ) from None
    except ValueError as error:
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
        if images.shape[1:] != image_shape or images.dtype != jnp.uint8:
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}; give uint8 [N, "
                f"{', '.join(map(str, image_shape))}]"
            )
        return network.apply(variables, normalize(images, mean, std), train=False).main

    return Trained(apply, variables, network, image_shape)


class _Description(NamedTuple):
    network: EvaluationNetwork
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int


def _parse(found: dict[str, Any]) -> _Description:
    """What a description says; a ValueError that names the first field that is not valid."""

    def integer(value: Any, least: int = 1) -> bool:
        return type(value) is int and least <= value <= MAX_SIZE

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(x) is float and abs(x) < 1e6 for x in value)

    def shape(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 3 and all(map(integer, value))

    valid = {
        "channels": integer,
        "layers": lambda value: integer(value, 3),
        "num_classes": integer,
        "stem": lambda value: value in ("cifar", "imagenet"),
        "image_shape": shape,
        "mean": numbers,
        "std": lambda value: numbers(value) and all(x > 0 for x in value),
        "count": integer,
        "genotype": lambda value: isinstance(value, dict),
    }
    for name, is_valid in valid.items():
        if name not in found or not is_valid(found[name]):
            raise ValueError(f"its field {name!r} is missing or not valid")
    image_shape, mean, std = (tuple(found[name]) for name in ("image_shape", "mean", "std"))
    if not len(mean) == len(std) == image_shape[-1]:
        raise ValueError("its mean and std are not those of its channels")
    cells = genotype.from_json(json.dumps(found["genotype"]))
    network = EvaluationNetwork(cells, **{name: found[name] for name in _FIELDS})
    return _Description(network, image_shape, mean, std, found["count"])


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
