import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from experiments import events
from experiments.errors import UserError


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for Weights & Biases that notes what it is told."""
    told = []

    def log(values, step):
        told.append((step, values))

    run = SimpleNamespace(log=log, finish=lambda: told.append("finished"))
    module = SimpleNamespace(
        init=lambda **options: told.append(options) or run,
        Histogram=lambda values: ("histogram", values.tolist()),
        Image=lambda image: ("image", image.size),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_is_told_the_same(wandb, tmp_path):
    Image.new("RGB", (2, 1)).save(tmp_path / "cell.png")
    sink = events.Wandb("project", tmp_path / "run")
    sink.scalars(3, "step", {"loss": 1.5})
    sink.histogram(4, "alpha/normal", np.eye(2))
    sink.picture(5, "cell", (tmp_path / "cell.png").read_bytes())
    sink.flush()
    sink.close()
    options, *rest = wandb
    assert (options["project"], options["name"], options["resume"]) == ("project", "run", "allow")
    assert rest == [
        (3, {"step/loss": 1.5}),
        (4, {"alpha/normal": ("histogram", [1, 0, 0, 1])}),
        (5, {"cell": ("image", (2, 1))}),
        "finished",
    ]


def test_a_folder_is_one_run_of_wandb(wandb, tmp_path):
    for name in ("a", "b", "a"):
        events.Wandb("project", tmp_path / name)
    one, other, again = (options["id"] for options in wandb)
    assert one == again != other


def test_wandb_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        events.Wandb("project", tmp_path)
