"""The accuracies that are published for NAS-Bench-201, from files that the user has.

`load` reads an array file, or the folder of NATS-Bench (arXiv 2009.00437) that is named
NATS-tss-v1_0-3ffb9-simple; `save` writes the one from the other, so that reading is fast.
"""

import bz2
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from darts_jax.files import write_bytes
from darts_jax.ground_truth import index
from darts_jax.spaces._dag import from_string
from darts_jax.spaces.nasbench201 import EDGES, PRIMITIVES

SIZE = len(PRIMITIVES) ** len(EDGES)  # 15625
DATASETS = ("cifar10", "cifar100", "ImageNet16-120")
SPLITS = ("validation", "test")
# Where the authors' files have them: (dataset, set). Networks for validation on CIFAR-10 are
# trained on half of its training images, those for the test on all of them.
PUBLISHED = {
    ("cifar10", "validation"): ("cifar10-valid", "x-valid"),
    ("cifar10", "test"): ("cifar10", "ori-test"),
    **{(name, "validation"): (name, "x-valid") for name in DATASETS[1:]},
    **{(name, "test"): (name, "x-test") for name in DATASETS[1:]},
}
META = "meta.pickle.pbz2"
EPOCHS = "200"  # of the training that the accuracies are taken from


class Accuracies(NamedTuple):
    """Accuracies after the last epoch, the mean over seeds.

    Attributes:
      accuracy: float32 [15625, dataset, split], in [0, 1], rows by `ground_truth.index` of the
        operations of the edges, as `spaces.nasbench201` orders them.
      datasets, splits: names along the axes.
    """

    accuracy: Array
    datasets: tuple[str, ...] = DATASETS
    splits: tuple[str, ...] = SPLITS


def load(path: str | os.PathLike[str], allow_pickle: bool = False) -> Accuracies:
    """Reads published accuracies.

    Args:
      path: of a .npy file with an array [15625, 3, 2] in percent (rows by `ground_truth.index`;
        `DATASETS`; `SPLITS`), or of the folder of NATS-Bench.
      allow_pickle: the folder's files are pickles. They are read without running what they name,
        but only if this is set.

    Raises:
      ValueError: if it cannot be read or is something else; one line that names the path.
    """
    path = Path(path)
    if path.is_dir():
        if not allow_pickle:
            raise ValueError(
                f"{path} holds pickles; set allow_pickle if they are from where you trust"
            )
        percent = _read_folder(path)
    else:
        try:
            percent = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise ValueError(f"no file or folder {path}; give the path of one") from None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is no array file ({error}); give another") from error
    shape = (SIZE, len(DATASETS), len(SPLITS))
    if not isinstance(percent, np.ndarray) or percent.shape != shape or percent.dtype.kind != "f":
        found = f"{getattr(percent, 'dtype', '')}{list(getattr(percent, 'shape', []))}"
        raise ValueError(f"{path} holds {found}; it needs real numbers {list(shape)}")
    if not ((percent >= 0) & (percent <= 100)).all() or percent.max() <= 1:
        raise ValueError(f"{path} does not hold percentages, 0 to 100; write it in percent")
    return Accuracies(jnp.asarray(percent / 100, jnp.float32))


def save(accuracies: Accuracies, path: str | os.PathLike[str]) -> None:
    """Writes accuracies as the .npy file that `load` reads.

    Raises:
      OSError: if it cannot be written.
    """
    content = io.BytesIO()
    np.save(content, 100 * np.asarray(accuracies.accuracy))
    write_bytes(path, content.getvalue())


def regret(accuracies: Accuracies, choice: Array, dataset: str, split: str = "test") -> Array:
    """How much more accurate the best of all architectures is; on the device, under jit too.

    Args:
      accuracies: as from `load`.
      choice: the operations of architectures, integers [..., 6], as alpha.argmax(-1).
      dataset: one of `DATASETS`.
      split: one of `SPLITS`.

    Returns:
      float32 [...], in [0, 1].
    """
    column = accuracies.accuracy[
        :, accuracies.datasets.index(dataset), accuracies.splits.index(split)
    ]
    return column.max() - column[index(choice, len(PRIMITIVES))]


class _Ignored:
    """Stands for every class that a pickle names and that is not needed."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# A NumPy scalar is pickled as a call of `scalar`, which releases keep in different places.
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy", "dtype"): np.dtype,
}


class _Unpickler(pickle.Unpickler):
    """Reads plain objects alone, so that a pickle cannot run anything."""

    def find_class(self, module: str, name: str) -> Any:
        return _PLAIN.get((module, name), _Ignored)


def _read_folder(folder: Path) -> np.ndarray:
    """Percentages [15625, dataset, split] of the folder of NATS-Bench."""
    strings = _field(_unpickle(folder / META), folder / META, "meta_archs")
    percent = np.full((SIZE, len(DATASETS), len(SPLITS)), np.nan)
    for number, text in enumerate(strings):
        file = folder / f"{number:06}.pickle.pbz2"
        results = _field(_unpickle(file), file, EPOCHS, "all_results")
        row = int(index(np.array(from_string(text, EDGES, PRIMITIVES)), len(PRIMITIVES)))
        for d, dataset in enumerate(DATASETS):
            for s, split in enumerate(SPLITS):
                percent[row, d, s] = _mean(results, file, *PUBLISHED[dataset, split])
    return percent


def _mean(results: Any, file: Path, dataset: str, part: str) -> float:
    """The mean over seeds of the accuracy after the last epoch."""
    last = f"{part}@{int(EPOCHS) - 1}"
    try:
        found = [r["eval_acc1es"][last] for (name, _), r in results.items() if name == dataset]
        return fmean(found)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} lacks {last} of {dataset}; fetch it again") from error


def _field(content: Any, file: Path, *names: str) -> Any:
    for name in names:
        if not isinstance(content, dict) or name not in content:
            raise ValueError(f"{file} lacks {name!r}; give the folder NATS-tss-v1_0-3ffb9-simple")
        content = content[name]
    return content


def _unpickle(file: Path) -> Any:
    try:
        with bz2.open(file) as stream:
            return _Unpickler(stream).load()
    except FileNotFoundError:
        raise ValueError(
            f"no file {file}; give the folder NATS-tss-v1_0-3ffb9-simple, unpacked"
        ) from None
    except Exception as error:  # a damaged pickle raises errors of many types
        raise ValueError(f"{file} cannot be read ({error}); fetch it again") from error
