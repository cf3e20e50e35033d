"""Compiling a function stage by stage, to see what each costs, and what estimators share.

An estimator is a few jitted functions called from Python. Traced, it is an outline whose entries
are these stages; here each is compiled on its own, once for all functions that call it or another
that computes the same. So time and scratch memory can be told apart by estimator, and nothing is
compiled for the telling alone.
"""

import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, jaxpr_as_fun

PyTree = Any
Say = Callable[..., None]


class Stage(NamedTuple):
    """A compiled program.

    Attributes:
      run: takes and returns the flat arrays.
      compile_seconds: lowering and compiling, or reading it from the compilation cache.
      temp_bytes: scratch memory that it allocates beside arguments and results.
    """

    run: Callable[..., list[jax.Array]]
    compile_seconds: float
    temp_bytes: int


class Program(NamedTuple):
    """A function whose stages are compiled.

    Attributes:
      call: the function, for arguments of the structure, shapes and dtypes it was compiled for.
      compile_seconds: of its stages, as if no other function had compiled one of them.
      temp_bytes: of the stage that allocates most.
    """

    call: Callable[..., PyTree]
    compile_seconds: float
    temp_bytes: int


def compile_stages(
    function: Callable[..., PyTree],
    args: tuple[PyTree, ...],
    compiled: dict[Hashable, Stage],
    say: Say = lambda name, seconds=None: None,
) -> Program:
    """Compiles every jitted function that `function` calls; what is between them runs eagerly.

    Args:
      function: of pytrees of arrays, pure.
      args: examples of its arguments.
      compiled: the stages so far, which functions share; new ones are added.
      say: called with the name of each stage before it is compiled, and with its seconds after.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr, treedef = closed.jaxpr, jax.tree.structure(shapes)
    runs = [_runner(equation, compiled, say) for equation in jaxpr.eqns]
    stages = {run for run in runs if isinstance(run, Stage)}

    def call(*args):
        known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        known.update(zip(jaxpr.invars, jax.tree.leaves(args), strict=True))

        def read(atom):
            return atom.val if isinstance(atom, Literal) else known[atom]

        for equation, run in zip(jaxpr.eqns, runs, strict=True):
            run = run.run if isinstance(run, Stage) else run
            outputs = run(*map(read, equation.invars))
            known.update(zip(equation.outvars, outputs, strict=True))
        return treedef.unflatten(map(read, jaxpr.outvars))

    return Program(
        call,
        sum(stage.compile_seconds for stage in stages),
        max((stage.temp_bytes for stage in stages), default=0),
    )


def _runner(equation: Any, compiled: dict[Hashable, Stage], say: Say) -> Stage | Callable:
    """What runs one entry of an outline: a stage, or a primitive operation."""
    inner = equation.params.get("jaxpr")
    if equation.primitive.name != "jit":
        return partial(_run_primitive, equation)
    if inner not in compiled:  # the same object, wherever the same jitted function is called
        compiled[inner] = _compile(equation.params["name"], inner, compiled, say)
    return compiled[inner]


def _run_primitive(equation: Any, *args: jax.Array) -> list[jax.Array]:
    outputs = equation.primitive.bind(*args, **equation.params)
    return outputs if equation.primitive.multiple_results else [outputs]


def _compile(name: str, closed: Any, compiled: dict[Hashable, Stage], say: Say) -> Stage:
    run = jaxpr_as_fun(closed)
    run.__name__ = name  # by which profilers, and the compilation cache, know the program
    start = time.perf_counter()
    # An argument that is not used stays one, so that programs of one text are called alike.
    lowered = jax.jit(run, keep_unused=True).lower(*closed.in_avals)
    text = lowered.as_text()
    if text not in compiled:
        label = name.replace("_", " ")
        say(label)
        program = lowered.compile()
        seconds = time.perf_counter() - start
        say(label, seconds)
        memory = program.memory_analysis().temp_size_in_bytes
        compiled[text] = Stage(program, seconds, memory)
    return compiled[text]
