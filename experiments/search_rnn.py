"""Searches the cell of a recurrent language model (DARTS, arXiv 1806.09055).

    python -m experiments.search_rnn                          # the help texts of Python, minutes
    python -m experiments.search_rnn paper --data.path PTB    # Penn Treebank, as in the paper
    python -m experiments.search_rnn --search.estimator first_order --workdir runs/first_order
    python -m experiments.search_rnn --seeds 4                # four searches as one program

The workdir then holds genotype.json, a picture of the cell, one of the alphas over time, and what
`experiments.runner` writes. The same command resumes it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, PartitionSpec
from rich.table import Table
from rich.text import Text

from darts_jax import genotype, language_model, recurrent, search, text
from darts_jax.language_model import Aux, Inputs
from darts_jax.operations import Moments
from darts_jax.relaxation import EVALUATION, Relaxation, softmax
from darts_jax.text import Corpus
from experiments import command_line, devices, distributed, remedies, runner, seeds, texts
from experiments.config import AlphaConfig, alpha_optimizer
from experiments.memory import peak_memory
from experiments.metrics import Display
from experiments.recurrent_cell import START, describe, draw_cell
from experiments.remedies import RelaxationConfig
from experiments.run_config import RunConfig, check_run, prepare
from experiments.search_cnn import make_estimator
from experiments.texts import DropoutConfig, TextConfig, TextOptimizerConfig
from experiments.workdir import opened, write_config, writing

MODULE = "experiments.search_rnn"


@dataclass(frozen=True)
class ModelConfig:
    """The relaxed model."""

    size: int = 300
    """Length of embeddings and hidden states."""
    nodes: int = 8
    """Nodes of the cell."""


@dataclass(frozen=True)
class SearchConfig:
    """The bilevel optimization."""

    estimator: Literal["first_order", "unrolled", "finite_difference"] = "unrolled"
    """Hypergradient: at constant weights; exact through one step of w; or the paper's
    approximation of that, by a finite difference."""
    radius: float = 0.01
    """How far the finite difference moves the weights, as a global norm."""
    epochs: int = 50
    """Passes over the training text."""
    batch_size: int = 256
    """Columns that the training text, and the one that trains alpha, are cut into."""
    eval_batch_size: int = 10
    """Columns that the validation text is cut into to evaluate."""
    length: int = 35
    """Words of a sequence; one in twenty is half as long."""
    slowness: float = 1e-3
    """Weight of the squared change of the hidden state in the training loss."""
    w: TextOptimizerConfig = field(default_factory=TextOptimizerConfig)
    alpha: AlphaConfig = field(default_factory=lambda: AlphaConfig(3e-3, b1=0.9))
    remedies: RelaxationConfig = field(default_factory=RelaxationConfig)


@dataclass(frozen=True)
class Config:
    """All that decides what a search does."""

    data: TextConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    seed: int = 0
    """Of everything random: parameters, lengths of sequences, dropout."""
    seeds: int = 1
    """Searches to run side by side: by this seed and those that follow it."""
    seeds_at_once: int | None = None
    """Of these, so many in one batch of arrays, which bounds memory; None for all, on CPUs for one
    on each device."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/search_rnn-PRESET-seedSEED."""


PYDOC = Config(
    TextConfig("pydoc"),
    ModelConfig(size=32),
    DropoutConfig(output=0.1),
    # Small batches, for more steps; at the paper's rate of 20 they diverge.
    SearchConfig(epochs=5, batch_size=8, w=TextOptimizerConfig(learning_rate=5.0)),
)
# "paper:" is section 3.1.2 and appendix A.1.2 of arXiv 1806.09055v2, "code:" rnn/train_search.py of
# quark0/darts where the paper is silent or differs.
PAPER = Config(
    TextConfig("ptb"),
    ModelConfig(
        size=300,  # paper: embedding and hidden sizes
        nodes=8,  # code: STEPS; the paper's figure has 8 besides the start
    ),
    DropoutConfig(
        words=0.0,  # code: dropoute
        embedding=0.2,  # code: dropouti
        input=0.75,  # code: dropoutx
        hidden=0.25,  # code: dropouth
        output=0.75,  # code: dropout
    ),
    SearchConfig(
        estimator="unrolled",  # paper: second order; exact here, `finite_difference` is the paper's
        radius=0.01,  # paper: epsilon = 0.01 / norm
        epochs=50,  # paper
        batch_size=256,  # paper
        eval_batch_size=10,  # code
        length=35,  # paper: BPTT length
        slowness=1e-3,  # code: beta
        w=TextOptimizerConfig(
            learning_rate=20.0,  # paper
            weight_decay=5e-7,  # paper
            clip=0.25,  # code
        ),
        alpha=AlphaConfig(
            learning_rate=3e-3,  # paper
            b1=0.9,  # paper
            b2=0.999,  # paper
            weight_decay=1e-3,  # paper
        ),
    ),
    run=RunConfig(log_every=50),  # code: log_interval
)
PRESETS = {
    "pydoc": ("the help texts of Python, minutes on two cores", PYDOC),
    "ptb": (
        "Penn Treebank, smaller and shorter than the paper's",
        replace(
            PAPER,
            model=ModelConfig(size=128),
            dropout=DropoutConfig(0.0, 0.2, 0.25, 0.25, 0.4),
            search=replace(PAPER.search, epochs=15, batch_size=64),
        ),
    ),
    "wikitext2": (
        "WikiText-2, smaller and shorter than the paper's search",
        replace(
            PAPER,
            data=TextConfig("wikitext2"),
            model=ModelConfig(size=128),
            dropout=DropoutConfig(0.0, 0.2, 0.25, 0.25, 0.4),
            search=replace(PAPER.search, epochs=10, batch_size=64),
        ),
    ),
    "paper": ("Penn Treebank, the values of the paper", PAPER),
    "smoke": (
        "a few steps on a few words, to see that all works",
        replace(
            PYDOC,
            data=TextConfig("pydoc", limit=2000),
            model=ModelConfig(size=8, nodes=2),
            search=replace(PYDOC.search, epochs=2, batch_size=8),
            run=RunConfig(log_every=1),
        ),
    ),
}


class Carry(NamedTuple):
    """From batch to batch: running statistics [D], hidden states [B, D] of both texts."""

    running: Moments
    train_hidden: jax.Array
    val_hidden: jax.Array


class Step(NamedTuple):
    """One iteration, int32: where its two windows start, and the length of the first."""

    train_start: np.ndarray
    length: np.ndarray
    val_start: np.ndarray


def task(config: Config, relax: Relaxation = softmax) -> search.Task:
    """Prediction of the next word, for the search step.

    The inner step is the very step that trains w: dropout, slowness, clipping, and the embedding
    moves too. The validation loss has the dropout alone.
    """
    dropout = texts.dropout_of(config.dropout)

    def inputs(hidden: str) -> Callable[[Carry, Any], Inputs]:
        return lambda carry, batch: Inputs(batch, getattr(carry, hidden), carry.running)

    def accuracy(aux: Aux, batch: language_model.Batch) -> jax.Array:
        right = (aux.logits.argmax(-1) == batch.targets) & batch.valid[:, None]
        return right.sum() / (batch.valid.sum() * batch.targets.shape[1])

    return search.Task(
        language_model.make_loss(dropout, config.search.slowness, relax),
        language_model.make_loss(dropout, relax=relax),
        inputs("train_hidden"),
        inputs("val_hidden"),
        lambda train, val: Carry(train.running, train.hidden, val.hidden),
        accuracy,
    )


def make_train_step(
    step: Callable, config: Config, steps_per_epoch: int
) -> Callable[[search.SearchState, texts.Texts, Step], tuple[search.SearchState, search.Metrics]]:
    """The search step on windows of the texts, at the learning rate of their length."""
    own = config.search
    hidden = jnp.zeros((own.batch_size, config.model.size))

    @jax.jit
    def prepare(state: search.SearchState, data: texts.Texts, at: Step):
        """The state before a step, and its two batches."""
        train_key, val_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        batches = (
            texts.window(data.train, at.train_start, at.length, own.length, train_key),
            texts.window(data.val, at.val_start, own.length, own.length, val_key),
        )
        first = state.step % steps_per_epoch == 0  # of an epoch, where both texts begin anew
        fresh = Carry(state.carry.running, hidden, hidden)
        carry = jax.tree.map(lambda a, b: jnp.where(first, a, b), fresh, state.carry)
        opt_state = texts.with_length(state.w_opt_state, own.w, at.length, own.length)
        return state._replace(carry=carry, w_opt_state=opt_state), *batches

    def train_step(state, data, at):
        return step(*prepare(state, data, at))

    return train_step


def make_job(config: Config, corpus: Corpus, workdir: Path) -> runner.Job:
    """The search as the runner takes it.

    Raises:
      ValueError: if a text is too short for its columns or a window.
    """
    own, size = config.search, config.model.size
    longest, vocabulary = own.length, len(corpus.vocabulary)
    mesh = devices.mesh(config.seeds, config.seeds_at_once)
    data = texts.Texts(
        texts.on_device(mesh, corpus.train, own.batch_size, longest),
        texts.on_device(mesh, corpus.valid, own.batch_size, longest),
    )
    train_rows, val_rows = (len(rows) - longest for rows in data)
    steps_per_epoch = text.num_windows(train_rows, longest)
    val_windows = text.num_windows(val_rows, longest)
    w, alpha = texts.optimizer(own.w), alpha_optimizer(own.alpha)
    relax = remedies.choose_relaxation(own.remedies)
    step = search.make_task_step(
        task(config, relax), make_estimator(own, w), w, alpha, config.run.skip_nonfinite
    )
    if relax is not softmax:  # which needs no context
        step = search.with_context(step, own.epochs * steps_per_epoch)
    hidden = jnp.zeros((own.batch_size, size))
    evaluate = texts.make_evaluation(mesh, corpus, "valid", own.eval_batch_size, size)

    @jax.jit
    def eval_step(state: search.SearchState, data: texts.Texts, _: jax.Array):
        # By the batch where `none` may have had nearly all the weight: a state then hardly varies,
        # and by running statistics, which all states share, the others would diverge.
        weights, by_batch = relax(state.alpha, EVALUATION), relax is not softmax
        cell = language_model.relaxed_cell(state.carry.running, weights, train=by_batch)
        total, tokens = evaluate(state.w, cell)
        return {"eval_loss": total}, tokens

    train_step = make_train_step(step, config, steps_per_epoch)
    facts = {"text": text.fingerprint(corpus)}

    def alone(seed: int, folder: Path) -> runner.Job:
        def init() -> search.SearchState:
            w_key, alpha_key, state_key = jax.random.split(jax.random.key(seed), 3)
            shape = len(genotype.edges(config.model.nodes, 1)), len(genotype.RNN_PRIMITIVES)
            params = language_model.init_params(w_key, vocabulary, size, config.model.nodes)
            alphas = search.ALPHA_SCALE * jax.random.normal(alpha_key, shape)
            return search.SearchState(
                step=jnp.zeros((), jnp.int32),
                key=state_key,
                w=params,
                alpha=alphas,
                carry=Carry(recurrent.running_statistics(size), hidden, hidden),
                w_opt_state=w.init(params),
                alpha_opt_state=alpha.init(alphas),
            )

        def train_batches(epoch: int) -> list[Step]:
            windows = text.search_windows(seed, epoch, train_rows, longest)
            val_starts = (np.arange(steps_per_epoch) % val_windows * longest).astype(np.int32)
            return list(map(Step, windows.starts, windows.lengths, val_starts))

        return runner.Job(
            name="search step",
            init=init,
            train_step=train_step,
            eval_step=eval_step,
            data=data,
            train_batches=train_batches,
            eval_batches=[np.int32(0)],
            epochs=own.epochs,
            steps_per_epoch=steps_per_epoch,
            end_epoch=partial(end_epoch, folder),
            checked=search.checked,
            draw=partial(draw, folder),
            facts=facts,
            place=partial(place, mesh, devices.leading(config.seeds)),
        )

    return seeds.together(alone, seeds_of(config), config.seeds_at_once, workdir, mesh, found)


def seeds_of(config: Config) -> range:
    """The seeds of the searches."""
    return range(config.seed, config.seed + config.seeds)


def place(mesh: Mesh, leading: Sequence[str], state: search.SearchState) -> search.SearchState:
    """The state on the devices, which have their own columns, an axis of the hidden states."""
    placed, carry = devices.spread(mesh, state, PartitionSpec(*leading)), state.carry
    hidden = devices.spread(
        mesh, (carry.train_hidden, carry.val_hidden), PartitionSpec(*leading, devices.DATA)
    )
    return placed._replace(carry=Carry(placed.carry.running, *hidden))


def end_epoch(workdir: Path, state: search.SearchState) -> dict[str, Any]:
    """Saves the cell so far; returns the alphas, to be recorded."""
    alpha = jax.device_get(state.alpha)
    genotype.save(genotype.derive_recurrent(alpha), workdir / "genotype.json")
    return {"alpha": alpha.tolist()}


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    own = config.search
    texts.check_text(config.data, config.dropout, own.w, "search.w")
    command_line.check_at_least(
        ("model.size", config.model.size, 1),
        ("model.nodes", config.model.nodes, 1),
        ("search.epochs", own.epochs, 1),
        ("search.length", own.length, 1),
        ("search.slowness", own.slowness, 0),
        ("search.alpha.learning-rate", own.alpha.learning_rate, 0),
        ("search.alpha.b1", own.alpha.b1, 0),
        ("search.alpha.b2", own.alpha.b2, 0),
        ("search.alpha.weight-decay", own.alpha.weight_decay, 0),
    )
    mesh = devices.mesh(config.seeds, config.seeds_at_once)
    devices.check_batch(mesh, "search.batch-size", own.batch_size)
    command_line.check_positive(("search.radius", own.radius))
    remedies.check_relaxation(own.remedies)
    command_line.check_below_one(
        ("search.alpha.b1", own.alpha.b1), ("search.alpha.b2", own.alpha.b2)
    )
    seeds.check(config.seed, config.seeds, config.seeds_at_once)
    check_run(config.run)


def found(epochs: Sequence[dict[str, Any]]) -> genotype.RecurrentGenotype:
    """The cell that the last of some epochs stands for."""
    return genotype.derive_recurrent(np.array(epochs[-1]["alpha"]))


def draw(workdir: Path, epochs: Sequence[dict[str, Any]]) -> list[Path]:
    """Draws the cell that was found, and the alphas over time; returns the pictures, PNG."""
    from darts_jax import plots  # matplotlib

    alphas = np.array([line["alpha"] for line in epochs])
    cell = found(epochs)
    genotype.save(cell, workdir / "genotype.json")
    draw_cell(cell, workdir / "cell")
    plots.draw_alphas(
        [line["step"] for line in epochs],
        {"recurrent": alphas},
        genotype.RNN_PRIMITIVES,
        workdir / "alphas",
        inputs=(START,),
    )
    return [workdir / "cell.png", workdir / "alphas.png"]


def summary(
    result: runner.Result, own_seeds: Sequence[int], corpus: Corpus, workdir: Path, command: str
) -> Table:
    """The table that a search ends with; the cell is that of the best seed."""
    table = Table(title="Search finished", show_header=False, title_justify="left")
    table.add_row("cell", describe(found(seeds.of_best(result.epochs, own_seeds))))

    def validation(of: Sequence[int]) -> str:
        losses = seeds.values_of(result.epochs[-1], "eval_loss", of, own_seeds)
        perplexities = np.array([texts.perplexity(loss) for loss in losses])
        return f"perplexity {seeds.mean_text(perplexities, 1)}, of the relaxed model"

    seeds.add_rows(table, result.epochs, own_seeds, validation, found)
    unigram, bigram = (
        f(corpus, "valid") for f in (text.unigram_perplexity, text.bigram_perplexity)
    )
    table.add_row("baselines", f"perplexity {unigram:.1f} of words, {bigram:.1f} of pairs")
    table.add_row(
        "time",
        f"{result.seconds:.0f} s search, all {len(result.epochs)} epochs;"
        f" {result.compile_seconds:.0f} s tracing and compiling, this time",
    )
    if (peak := peak_memory()) is not None:
        table.add_row("peak memory", f"{peak / 1e6:.0f} MB, this process, compiling included")
    table.add_row("written to", Text(str(workdir)))
    table.add_row("next", Text(command))
    return table


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        prepare(config.run)
        check(config)
    workdir = config.workdir or Path("runs") / f"search_rnn-{preset}-seed{config.seed}"
    with opened(workdir, config, config.run.fork) as workdir, Display() as display:
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            corpus = text.load(config.data.name, config.data.path, config.data.limit)
            job = make_job(config, corpus, workdir)
        with command_line.user_errors(), writing(workdir):
            write_config(config, workdir)
            if distributed.is_first():
                text.save_vocabulary(corpus.vocabulary, workdir / "vocabulary.json")
        result = runner.run(job, config, workdir, display)
    own = command_line.data_flags(config.data, PRESETS[preset][1].data)
    file = seeds.best_genotype(result.epochs, seeds_of(config), workdir)
    command = command_line.command(
        "experiments.evaluate_rnn", [preset, *own, "--genotype", str(file)]
    )
    display.console.print(summary(result, seeds_of(config), corpus, workdir, command))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
