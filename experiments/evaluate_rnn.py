"""Trains a language model with a found recurrent cell from scratch, and reports its perplexity.

    python -m experiments.evaluate_rnn                         # the cell searched last, minutes
    python -m experiments.evaluate_rnn --genotype DARTS_V2
    python -m experiments.evaluate_rnn paper --data.path PTB --genotype DARTS_V2

The workdir then holds the cell, its picture, the vocabulary, a sample of text, and what
`experiments.runner` writes. The same command resumes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from rich.table import Table
from rich.text import Text

from darts_jax import averaging, finite, genotype, language_model, text, training
from darts_jax.averaging import Average
from darts_jax.files import write_text
from darts_jax.genotype import RecurrentGenotype
from darts_jax.language_model import Inputs
from darts_jax.text import Corpus
from experiments import command_line, devices, distributed, runner, texts
from experiments.memory import peak_memory
from experiments.metrics import Display
from experiments.recurrent_cell import describe, draw_cell
from experiments.run_config import RunConfig, check_run, prepare
from experiments.sources import newest_search, saved_genotype
from experiments.texts import DropoutConfig, TextConfig, TextOptimizerConfig
from experiments.workdir import opened, write_config, writing

MODULE = "experiments.evaluate_rnn"
DEFAULT_GENOTYPE = "DARTS_V2"  # where nothing has been searched yet
LSTM = "LSTM"  # in place of a genotype
SAMPLE_WORDS = 200


@dataclass(frozen=True)
class TrainConfig:
    """Training from scratch."""

    epochs: int = 8000
    """Passes over the training text."""
    batch_size: int = 64
    """Columns that the training text is cut into."""
    eval_batch_size: int = 10
    """Columns that the validation text is cut into."""
    length: int = 35
    """Words of a usual sequence; lengths vary about it, one in twenty about its half."""
    slowness: float = 1e-3
    """Weight of the squared change of the hidden state in the loss."""
    patience: int = 5
    """Epochs without progress after which the weights are averaged."""
    w: TextOptimizerConfig = field(default_factory=lambda: TextOptimizerConfig(weight_decay=8e-7))


@dataclass(frozen=True)
class Config:
    """All that decides what is trained."""

    data: TextConfig
    genotype: str | None = None
    """Cell: a JSON file or a published name, or LSTM, to compare with; None for that of the newest
    search in runs/."""
    size: int = 850
    """Length of embeddings and hidden states."""
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    """Of everything random: parameters, lengths of sequences, dropout, the sample."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/evaluate_rnn-PRESET-seedSEED."""
    cell: Annotated[RecurrentGenotype | None, tyro.conf.Suppress] = None
    """What `genotype` stands for; None for an LSTM."""


PYDOC = Config(
    TextConfig("pydoc"),
    size=128,
    dropout=DropoutConfig(0.05, 0.1, 0.1, 0.1, 0.3),
    train=TrainConfig(epochs=30, batch_size=20),
)
# "code:" is rnn/train.py of quark0/darts; the paper's section 3.2.2 and appendix A.2.2 agree.
PAPER = Config(
    TextConfig("ptb"),
    size=850,  # code
    dropout=DropoutConfig(
        words=0.1,  # code: dropoute
        embedding=0.2,  # code: dropouti
        input=0.75,  # code: dropoutx
        hidden=0.25,  # code: dropouth
        output=0.75,  # code: dropout
    ),
    train=TrainConfig(
        epochs=8000,  # code
        batch_size=64,  # code
        eval_batch_size=10,  # code
        length=35,  # code: bptt
        slowness=1e-3,  # code: beta
        patience=5,  # code: nonmono
        w=TextOptimizerConfig(
            learning_rate=20.0,  # code
            weight_decay=8e-7,  # code
            clip=0.25,  # code
        ),
    ),
    run=RunConfig(log_every=50),  # code: log_interval
)
PRESETS = {
    "pydoc": ("the help texts of Python, minutes on two cores", PYDOC),
    "ptb": (
        "Penn Treebank, smaller and shorter than the paper's",
        replace(PAPER, size=300, train=replace(PAPER.train, epochs=100)),
    ),
    "paper": ("Penn Treebank, the values of the paper", PAPER),
    "wikitext2": (
        "WikiText-2, the values of the paper",
        replace(
            PAPER,
            data=TextConfig("wikitext2"),
            size=700,
            dropout=replace(PAPER.dropout, hidden=0.15),
            train=replace(PAPER.train, w=replace(PAPER.train.w, weight_decay=5e-7)),
        ),
    ),
    "smoke": (
        "a few steps on a few words, to see that all works",
        replace(
            PYDOC,
            data=TextConfig("pydoc", limit=2000),
            size=8,
            train=replace(PYDOC.train, epochs=2, batch_size=8),
            run=RunConfig(log_every=1),
        ),
    ),
}


class State(NamedTuple):
    """All that continues a training; `averaged` says whether the average has begun."""

    step: jax.Array
    key: jax.Array
    params: Any
    hidden: jax.Array
    opt_state: optax.OptState
    average: Average
    averaged: jax.Array


class Metrics(NamedTuple):
    """Scalars of one step: cross-entropy in nats, and norm of the gradient before clipping."""

    train_loss: jax.Array
    gradient_norm: jax.Array
    nonfinite: jax.Array
    """Of the leaves of `training.Checked`, the first that holds NaN or infinity; -1 if none."""


class Step(NamedTuple):
    """One step, int32: where its window starts, and its length."""

    start: np.ndarray
    length: np.ndarray


def make_job(config: Config, corpus: Corpus) -> runner.Job:
    """The training as the runner takes it.

    Raises:
      ValueError: if a text is too short for its columns or a window.
    """
    seed, own = config.seed, config.train
    mesh = devices.mesh()
    longest = own.length + text.LENGTH_EXTRA  # padded to one length, so that one is compiled
    rows = texts.on_device(mesh, corpus.train, own.batch_size, longest)
    num_rows = len(rows) - longest
    steps_per_epoch = text.num_windows(num_rows, own.length)
    optimizer = texts.optimizer(own.w)
    cell, init_params, width = texts.recurrence(config.cell, config.size)
    loss = language_model.make_discrete_loss(cell, texts.dropout_of(config.dropout), own.slowness)
    evaluate = texts.make_evaluation(mesh, corpus, "valid", own.eval_batch_size, width)

    def init() -> State:
        params_key, state_key = jax.random.split(jax.random.key(seed))
        params = init_params(params_key, len(corpus.vocabulary))
        return State(
            jnp.zeros((), jnp.int32),
            state_key,
            params,
            jnp.zeros((own.batch_size, width)),
            optimizer.init(params),
            # A copy, since the step donates both.
            averaging.init(jax.device_put(params, may_alias=False)),
            jnp.zeros((), bool),
        )

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: State, rows: jax.Array, at: Step):
        key = jax.random.fold_in(state.key, state.step)
        batch = texts.window(rows, at.start, at.length, longest, key)
        first = state.step % steps_per_epoch == 0  # of an epoch, where the text begins anew
        hidden = jnp.where(first, 0, state.hidden)
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.params, Inputs(batch, hidden, None)
        )
        opt_state = texts.with_length(state.opt_state, own.w, at.length, own.length)

        def update(old):
            params, _, opt_state, average = old
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            average = averaging.update(average, params, state.averaged)
            return params, aux.hidden, opt_state, average

        new = finite.guarded(update, config.run.skip_nonfinite)(
            (value, gradient), (state.params, hidden, opt_state, state.average)
        )
        of_each = finite.squares(gradient)
        nonfinite = finite.first(jnp.concatenate([value[None], of_each]))
        metrics = Metrics(aux.cross_entropy, jnp.sqrt(of_each.sum()), nonfinite)
        return State(state.step + 1, state.key, *new, state.averaged), metrics

    @jax.jit
    def eval_step(state: State, rows: jax.Array, _: jax.Array):
        total, tokens = evaluate(state.average.mean, cell)
        return {"eval_loss": total}, tokens

    def train_batches(epoch: int) -> list[Step]:
        windows = text.training_windows(seed, epoch, num_rows, own.length)
        return list(map(Step, windows.starts, windows.lengths))

    def next_epoch(state: State, lines: Sequence[dict[str, Any]]) -> State:
        start = averaging.should_start([line["eval_loss"] for line in lines], own.patience)
        return state._replace(averaged=state.averaged | start)

    return runner.Job(
        name="training step",
        init=init,
        train_step=train_step,
        eval_step=eval_step,
        data=rows,
        train_batches=train_batches,
        eval_batches=[np.int32(0)],
        epochs=own.epochs,
        steps_per_epoch=steps_per_epoch,
        end_epoch=lambda state: {"averaged": bool(state.averaged)},
        checked=lambda state: training.Checked(0.0, state.params),
        next_epoch=next_epoch,
        facts={"text": text.fingerprint(corpus)},
        place=partial(place, mesh),
    )


def place(mesh: Mesh, state: State) -> State:
    """The state on the devices, which have their own columns of the hidden state."""
    hidden = devices.spread(mesh, state.hidden, devices.BATCH)
    return devices.spread(mesh, state)._replace(hidden=hidden)


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    own = config.train
    texts.check_text(config.data, config.dropout, own.w, "train.w")
    command_line.check_at_least(
        ("size", config.size, 1),
        ("train.epochs", own.epochs, 1),
        ("train.length", own.length, 1),
        ("train.slowness", own.slowness, 0),
        ("train.patience", own.patience, 1),
    )
    devices.check_batch(devices.mesh(), "train.batch-size", own.batch_size)
    command_line.check_seed(config.seed)
    check_run(config.run)


class Outcome(NamedTuple):
    """What came of a training: the run, nats a word by split, and the number of parameters."""

    result: runner.Result
    losses: dict[str, float]
    parameters: int


def train(config: Config, corpus: Corpus, workdir: Path, display: Display) -> Outcome:
    """Trains the model of a config whose cell is known, from where its workdir says.

    Raises:
      UserError: for texts that are too short, or a workdir of another run.
    """
    with command_line.user_errors():
        job = make_job(config, corpus)
    with command_line.user_errors(), writing(workdir):
        write_config(config, workdir)
        if distributed.is_first():
            text.save_vocabulary(corpus.vocabulary, workdir / "vocabulary.json")
    result = runner.run(job, config, workdir, display)
    with display.phase("testing"), writing(workdir):
        losses = finish(config, result, corpus, workdir)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
    return Outcome(result, losses, parameters)


def finish(
    config: Config, result: runner.Result, corpus: Corpus, workdir: Path
) -> dict[str, float]:
    """Writes cell and sample; returns nats a word of validation and test text."""
    cell, _, width = texts.recurrence(config.cell, config.size)
    params = result.state.average.mean
    # The test text is read as one column, as it is.
    evaluate = texts.make_evaluation(devices.mesh(), corpus, "test", 1, width)
    total, tokens = jax.jit(partial(evaluate, cell=cell))(params)
    key, _ = jax.random.split(result.state.key)  # steps fold their numbers in
    hidden, start = jnp.zeros((1, width)), corpus.vocabulary.index(text.END)
    drawn = jax.jit(
        lambda params: language_model.sample(key, params, cell, hidden, start, SAMPLE_WORDS)
    )(params)
    write_text(workdir / "sample.txt", text.decode(drawn.tolist(), corpus.vocabulary) + "\n")
    if config.cell is not None:
        genotype.save(config.cell, workdir / "genotype.json")
        draw_cell(config.cell, workdir / "cell")
    return {"valid": result.epochs[-1]["eval_loss"], "test": float(total / tokens)}


def summary(config: Config, outcome: Outcome, corpus: Corpus, workdir: Path, command: str) -> Table:
    """The table that a training ends with."""
    result = outcome.result
    table = Table(title="Training finished", show_header=False, title_justify="left")
    nodes = "" if config.cell is None else f"\n{describe(config.cell)}"
    table.add_row("cell", Text(f"{config.genotype}{nodes}"))
    for split, loss in outcome.losses.items():
        bits = text.bits_per_character(loss, corpus, split)
        table.add_row(
            split, f"perplexity {texts.perplexity(loss):.2f} a word, {bits:.3f} bits a character"
        )
    unigram, bigram = text.unigram_perplexity(corpus), text.bigram_perplexity(corpus)
    table.add_row("baselines, test", f"perplexity {unigram:.1f} of words, {bigram:.1f} of pairs")
    table.add_row("parameters", f"{outcome.parameters:,}")
    began = next((line["epoch"] for line in result.epochs if line["averaged"]), None)
    table.add_row("weights", "not averaged" if began is None else f"averaged from epoch {began}")
    table.add_row(
        "time",
        f"{result.seconds:.0f} s training, all {len(result.epochs)} epochs;"
        f" {result.compile_seconds:.0f} s tracing and compiling, this time",
    )
    if (peak := peak_memory()) is not None:
        table.add_row("peak memory", f"{peak / 1e6:.0f} MB, this process, compiling included")
    table.add_row("written to", Text(str(workdir)))
    table.add_row("next", Text(command))
    return table


def resolve_genotype(config: Config, workdir: Path) -> Config:
    """The config with its cell: that named, that of the run in the workdir, or the newest.

    Raises:
      ValueError: if a file holds no recurrent genotype.
    """
    name = config.genotype
    if name is None:
        name = saved_genotype(workdir) or newest_search("search_rnn") or DEFAULT_GENOTYPE
    return with_cell(config, name)


def with_cell(config: Config, name: str) -> Config:
    """The config with the cell that a file or a name stands for."""
    cell = None if name == LSTM else genotype.load(name, kind=genotype.RNN)
    return replace(config, genotype=name, cell=cell)


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        prepare(config.run)
        check(config)
        workdir = config.workdir or Path("runs") / f"evaluate_rnn-{preset}-seed{config.seed}"
        config = resolve_genotype(config, workdir)
    with opened(workdir, config, config.run.fork) as workdir, Display() as display:
        display.console.print(f"cell: {config.genotype}", soft_wrap=True, highlight=False)
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            corpus = text.load(config.data.name, config.data.path, config.data.limit)
        outcome = train(config, corpus, workdir, display)
    command = command_line.next_command(MODULE, argv, config.seed + 1)
    display.console.print(summary(config, outcome, corpus, workdir, command))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
