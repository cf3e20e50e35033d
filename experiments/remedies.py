"""Remedies for what goes wrong in plain DARTS, as `experiments.search_cnn` switches them on.

docs/remedies.md lists them with their sources; each is a piece of the library.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.core import FrozenDict

from darts_jax import data, relaxation, search, shrinking, smoothing, spectrum
from darts_jax.operations import OPERATIONS
from darts_jax.relaxation import Context, Relaxation
from experiments.command_line import check_at_least, check_positive
from experiments.images import plain_batch
from experiments.metrics import METRICS, parse_line
from experiments.seeds import OF_SEED

AUXILIARY = "auxiliary_skip"
REMOVED = -1e9  # as which the alpha of an operation that was taken away is recorded


@dataclass(frozen=True)
class RelaxationConfig:
    """Remedies for what goes wrong in plain DARTS, in cells of any kind; all off by default."""

    relaxation: Literal["softmax", "gumbel", "concrete", "sigmoid", "dirichlet"] = "softmax"
    """From alphas to mixing weights: gumbel is GDAS, concrete SNAS, sigmoid FairDARTS, dirichlet
    DrNAS."""
    temperature: tuple[float, float] = (1.0, 1.0)
    """Of softmax, gumbel and concrete: at the beginning, and in a straight line to the end."""


@dataclass(frozen=True)
class RemediesConfig(RelaxationConfig):
    """Remedies for what goes wrong in plain DARTS; all off by default."""

    edge_weights: bool = False
    """Edges have weights of their own (PC-DARTS)."""
    auxiliary_skip: float = 0.0
    """Strength, at the beginning, of a skip connection beside each edge, down to 0 (DARTS-)."""
    perturb: Literal["none", "random", "adversarial"] = "none"
    """Weights are trained at perturbed mixing weights (SmoothDARTS)."""
    perturb_radius: tuple[float, float] = (0.03, 0.3)
    """Of the perturbation: at the beginning, and in a straight line to the end."""
    shrink_from: str | None = None
    """A workdir of an earlier search, each of whose edges keeps its best operations (P-DARTS)."""
    keep: int = 5
    """How many operations an edge keeps."""
    eigenvalue_every: int = 0
    """Epochs between two measurements of the curvature in alpha (RobustDARTS); 0 for none."""
    stop_ratio: float = 0.0
    """Stop where the mean eigenvalue before is less than this share of that now; 0 for never."""


def check_relaxation(config: RelaxationConfig) -> None:
    """Raises a ValueError for a field out of range."""
    check_positive(*(("search.remedies.temperature", value) for value in config.temperature))


def check(config: RemediesConfig) -> None:
    """Raises a ValueError for a field out of range."""
    check_relaxation(config)
    check_at_least(
        ("search.remedies.auxiliary-skip", config.auxiliary_skip, 0),
        *(("search.remedies.perturb-radius", value, 0) for value in config.perturb_radius),
        ("search.remedies.keep", config.keep, 1),
        ("search.remedies.eigenvalue-every", config.eigenvalue_every, 0),
        ("search.remedies.stop-ratio", config.stop_ratio, 0),
    )
    if config.stop_ratio and not config.eigenvalue_every:
        raise ValueError("--search.remedies.stop-ratio needs --search.remedies.eigenvalue-every 1")
    if config.perturb != "none" and config.relaxation == "sigmoid":
        raise ValueError(
            "--search.remedies.perturb keeps the weights of an edge at a sum of one, which those of"
            " sigmoid have not; leave one of the two out"
        )


def survivors(config: RemediesConfig) -> shrinking.Mask | None:
    """The operations that an earlier search leaves; None without one.

    Raises:
      ValueError: if there is no such search, or it has too few operations.
    """
    if config.shrink_from is None:
        return None
    path = Path(config.shrink_from) / METRICS
    try:
        lines = [parse_line(line) for line in path.read_bytes().splitlines()]
        last = [line for line in lines if line["kind"] == "epoch"][-1]
        alpha = None if any(OF_SEED in name for name in last) else last["alpha"]
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"--search.remedies.shrink-from: {path} holds no finished epoch of a search"
            f" ({type(error).__name__}); give the workdir of one"
        ) from error
    if alpha is None:
        raise ValueError(
            f"--search.remedies.shrink-from: {config.shrink_from} holds searches of several seeds;"
            " give the workdir of one, made by --seeds 1"
        )
    alpha = {cell: np.array(alpha[cell]) for cell in ("normal", "reduce")}
    had = {cell: values > REMOVED / 2 for cell, values in alpha.items()}
    return shrinking.survivors(alpha, config.keep, had)


def facts(mask: shrinking.Mask | None) -> dict[str, str]:
    """What of an earlier search makes this one what it is."""
    if mask is None:
        return {}
    content = b"".join(np.packbits(mask[cell]).tobytes() for cell in sorted(mask))
    return {"surviving operations": hashlib.sha256(content).hexdigest()[:16]}


def adapt(config: RemediesConfig, network: nn.Module, mask: shrinking.Mask | None) -> nn.Module:
    """The network, without what is taken away, and with the auxiliary skip connection if any.

    Raises:
      ValueError: if an edge has nothing left but `none`.
    """
    names, added = network.primitives, (AUXILIARY,) if config.auxiliary_skip else ()
    if mask is not None:
        held = {
            cell: tuple(tuple(np.array(names)[row].tolist()) for row in mask[cell]) for cell in mask
        }
        for cell, edges in held.items():
            if ("none",) in edges:
                raise ValueError(
                    f"--search.remedies.keep {config.keep} leaves edge {edges.index(('none',))} of"
                    f" the {cell} cell nothing but none; keep more"
                )
        candidates = {cell: tuple(own + added for own in edges) for cell, edges in held.items()}
        network = network.clone(candidates=FrozenDict(candidates))
    if not added:
        return network
    return network.clone(
        operations=network.operations.copy({AUXILIARY: OPERATIONS["skip_connect"]}),
        primitives=(*names, *added),
    )


def init_alpha(config: RemediesConfig) -> Callable[[jax.Array, nn.Module], Any]:
    """What `search.init` makes alphas by."""
    return partial(
        search.init_alpha, edge_weights=config.edge_weights, fixed=int(config.auxiliary_skip > 0)
    )


def choose_relaxation(config: RelaxationConfig) -> Relaxation:
    """From alphas to mixing weights: `relaxation.softmax` itself where nothing is changed."""
    temperature = relaxation.linear(*config.temperature)
    if config.temperature[0] == config.temperature[1]:
        temperature = config.temperature[0]
    return {
        "softmax": lambda: (
            relaxation.softmax if temperature == 1 else relaxation.tempered_softmax(temperature)
        ),
        "gumbel": lambda: relaxation.gumbel(temperature),
        "concrete": lambda: relaxation.concrete(temperature),
        "sigmoid": lambda: relaxation.sigmoid,
        "dirichlet": lambda: relaxation.dirichlet,
    }[config.relaxation]()


def make_relaxation(config: RemediesConfig, mask: shrinking.Mask | None) -> Relaxation:
    """From alphas to mixing weights, but for a perturbation."""
    relax = choose_relaxation(config)
    if mask is not None:
        relax = relaxation.masked(relax, mask)
    return relaxation.edge_weighted(relax) if config.edge_weights else relax


def with_auxiliary_skip(config: RemediesConfig, relax: Relaxation) -> Relaxation:
    """The relaxation with the column of the auxiliary skip connection, if there is to be one."""
    if not config.auxiliary_skip:
        return relax
    return relaxation.with_auxiliary_skip(relax, relaxation.linear(config.auxiliary_skip, 0))


def make_step(
    config: RemediesConfig,
    network: nn.Module,
    relax: Relaxation,
    estimator: Callable,
    w_optimizer: optax.GradientTransformation,
    alpha_optimizer: optax.GradientTransformation,
    skip_nonfinite: bool,
    num_steps: int,
) -> Callable:
    """The search step: plain DARTS, bit for bit, where every remedy is off.

    Args:
      relax: as `make_relaxation` gives it.
      num_steps: of the whole search.
      The others: as for `search.make_step`.
    """
    whole = with_auxiliary_skip(config, relax)
    if config.perturb == "none":
        step = search.make_step(
            network, estimator, w_optimizer, alpha_optimizer, whole, skip_nonfinite
        )
    else:
        task = search.image_task(network, whole)
        radius = relaxation.linear(*config.perturb_radius)
        if config.perturb == "random":
            noisy = with_auxiliary_skip(config, smoothing.random(relax, radius))
            loss = search.make_loss(network, noisy)
        else:
            given = with_auxiliary_skip(config, relaxation.as_they_are)
            loss = smoothing.adversarial(search.make_loss(network, given), relax, radius)
        task = task._replace(train_loss=loss)
        step = search.make_task_step(task, estimator, w_optimizer, alpha_optimizer, skip_nonfinite)
    if whole is relaxation.softmax and config.perturb == "none":
        return step  # it needs no context
    return search.with_context(step, num_steps)


def make_eigenvalue(
    network: nn.Module,
    relax: Relaxation,
    dataset: data.Dataset,
    val: data.Split,
    batch_size: int,
    num_steps: int,
) -> Callable[[search.SearchState], float]:
    """`eigenvalue(state)`: of the Hessian in alpha of the validation loss on its first images.

    As they are, normalised by the batch, and without the noise of the relaxation.
    """
    loss = search.make_loss(network, relax)

    @jax.jit
    def measure(w, alpha, batch_stats, batch, key):
        inputs = search.Inputs(batch, batch_stats)
        return spectrum.dominant_eigenvalue(lambda alpha: loss(w, alpha, inputs)[0], alpha, key)

    def eigenvalue(state: search.SearchState) -> float:
        # On this process alone: what the devices hold is fetched first.
        w, alpha, batch_stats, step = jax.device_get(
            (state.w, state.alpha, state.carry, state.step)
        )
        batch = plain_batch(dataset, val, np.arange(batch_size) % len(val.labels))
        batch = batch._replace(context=Context(None, step / num_steps))
        return float(measure(w, alpha, batch_stats, batch, jax.random.key(0)))

    return eigenvalue


def recorded(alpha: Mapping[str, np.ndarray], mask: shrinking.Mask | None) -> dict[str, np.ndarray]:
    """Alphas as they are written down: those of operations that are gone are -1e9."""
    alpha = {name: np.asarray(values) for name, values in alpha.items()}
    gone = {} if mask is None else {c: np.where(mask[c], alpha[c], REMOVED) for c in mask}
    return {**alpha, **gone}


def measured(epochs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The epochs after which the eigenvalue was measured."""
    return [line for line in epochs if "eigenvalue" in line]


def stop_line(config: RemediesConfig, epochs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The epoch to go back to, where the curvature says so; None to go on."""
    if not config.stop_ratio:
        return None
    lines = measured(epochs)
    index = spectrum.early_stop([line["eigenvalue"] for line in lines], config.stop_ratio)
    return None if index is None else lines[index]


def draw_eigenvalues(config: RemediesConfig, epochs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the eigenvalues over the steps, and where an early stop went back to."""
    from darts_jax import spectrum_plots  # matplotlib

    lines, stop = measured(epochs), stop_line(config, epochs)
    spectrum_plots.draw_eigenvalues(
        [line["step"] for line in lines],
        [line["eigenvalue"] for line in lines],
        path,
        stop and stop["step"],
    )
