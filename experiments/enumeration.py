"""Training many architectures of one cell at once, as one program."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from darts_jax import data
from darts_jax.dag_network import Network
from darts_jax.search import cross_entropy

PyTree = Any
PADDING = -1  # label of what fills up a batch: never predicted


class Batch(NamedTuple):
    """Images, float32 [..., H, W, C], normalised, and labels, int32 [...]."""

    image: np.ndarray
    label: np.ndarray


class Images(NamedTuple):
    """What networks are trained on, and two parts that they are evaluated on.

    `train` is [N, ...]; `val` and `test` are [batches, size, ...], filled up by labels of -1.
    """

    train: Batch
    val: Batch
    test: Batch


class Run(NamedTuple):
    """A network in training: its key and mixing weights stay as they are."""

    key: Array
    weights: Array
    params: PyTree
    stats: PyTree
    opt_state: optax.OptState


class Descent(Protocol):
    """What SGD takes of a config."""

    learning_rate: float
    momentum: float
    weight_decay: float


def sgd(config: Descent, num_steps: int) -> optax.GradientTransformation:
    """SGD whose learning rate falls to zero in so many steps, as half of a cosine."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, config.momentum)
    )


def pooled(split: data.Split, dataset: data.Dataset, factor: int) -> Batch:
    """Normalised images, each square of factor x factor pixels their mean.

    Raises:
      ValueError: if height or width is no multiple of the factor.
    """
    count, height, width, channels = split.images.shape
    if height % factor or width % factor:
        raise ValueError(f"--pool is {factor}; give a divisor of the images' {height}x{width}")
    blocks = split.images.reshape(
        count, height // factor, factor, width // factor, factor, channels
    )
    mean, std = (np.float32(moment) for moment in (dataset.mean, dataset.std))
    image = (blocks.mean((2, 4), dtype=np.float32) / 255 - mean) / std
    return Batch(image.astype(np.float32), split.labels)


def batched(batch: Batch, size: int) -> Batch:
    """A part to evaluate on as [batches, size, ...]."""
    count = len(batch.label)
    more = -count % size
    image = np.pad(batch.image, ((0, more), (0, 0), (0, 0), (0, 0)))
    label = np.pad(batch.label, (0, more), constant_values=PADDING)
    return Batch(*(x.reshape(-1, size, *x.shape[1:]) for x in (image, label)))


def make_train(
    network: Network, optimizer: optax.GradientTransformation, batch_size: int
) -> tuple[Callable, Callable]:
    """The two functions that train many networks at once, each by itself.

    Returns:
      init: `(keys [A], weights [A, edges, candidates], image [N, H, W, C]) -> Run`, A of them.
      epoch: `(run, number, images) -> (run, right, finite)`, one pass over the training images in
        an order of each network's own; right, int32 [A, 2], counts right predictions of val and
        test; finite, bool [A], says that no weight and no statistic is NaN or infinite after it.
    """

    def init(key, weights, image):
        variables = network.init(key, image[:1], weights, train=True)
        params, stats = variables["params"], variables["batch_stats"]
        return Run(key, weights, params, stats, optimizer.init(params))

    def loss(params, run, batch):
        variables = {"params": params, "batch_stats": run.stats}
        logits, updated = network.apply(
            variables, batch.image, run.weights, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch.label).mean(), updated["batch_stats"]

    def step(run, batch):
        gradient, stats = jax.grad(loss, has_aux=True)(run.params, run, batch)
        updates, opt_state = optimizer.update(gradient, run.opt_state, run.params)
        params = optax.apply_updates(run.params, updates)
        return run._replace(params=params, stats=stats, opt_state=opt_state)

    def count_right(run, batches):
        def right(batch):
            variables = {"params": run.params, "batch_stats": run.stats}
            logits = network.apply(variables, batch.image, run.weights, train=False)
            return (logits.argmax(-1) == batch.label).sum()

        return lax.map(right, batches).sum()

    def epoch(run, number, images):
        count = len(images.train.label)
        order = jax.random.permutation(jax.random.fold_in(run.key, number), count)
        order = order[: count // batch_size * batch_size].reshape(-1, batch_size)

        def advance(run, indices):
            return step(run, jax.tree.map(lambda x: x[indices], images.train)), None

        run, _ = lax.scan(advance, run, order)
        right = jnp.stack([count_right(run, images.val), count_right(run, images.test)])
        # A loss that is NaN makes the gradient so, and a weight that is NaN remains it.
        leaves = jax.tree.leaves((run.params, run.stats))
        return run, right, jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()

    return (
        jax.jit(jax.vmap(init, in_axes=(0, 0, None))),
        jax.jit(jax.vmap(epoch, in_axes=(0, None, None)), donate_argnums=0),
    )
