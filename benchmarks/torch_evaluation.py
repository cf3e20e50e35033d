"""The evaluation network and its training step in PyTorch, to compare `darts_jax` with.

Written from the paper (arXiv 1806.09055), for images of 32x32: auxiliary head, drop path.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch_reference import (
    CLIP,
    MOMENTUM,
    WEIGHT_DECAY,
    Batch,
    FactorizedReduce,
    operations,
    pointwise,
    relu_conv_norm,
)
from darts_jax.genotype import Genotype

AUXILIARY_WEIGHT = 0.4
OPERATIONS = operations(affine=True)


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Drops the output of an edge for some samples."""
    keep = 1 - probability
    return x * (torch.empty(len(x), 1, 1, 1).bernoulli_(keep) / keep)


class Cell(nn.Module):
    """A discrete cell."""

    def __init__(self, edges, concat, inputs, channels: int, reduction: bool, before: bool):
        super().__init__()
        older, newer = inputs
        preprocess = FactorizedReduce if before else relu_conv_norm
        self.preprocess_0 = preprocess(older, channels, affine=True)
        self.preprocess_1 = relu_conv_norm(newer, channels, affine=True)
        self.sources, self.concat = [source for _, source in edges], concat
        self.edges = nn.ModuleList(
            OPERATIONS[name](channels, 2 if reduction and source < 2 else 1)
            for name, source in edges
        )

    def forward(self, older: Tensor, newer: Tensor, drop: float) -> Tensor:
        """Inputs [N, C, H, W] -> [N, nodes * channels, H', W']."""
        states = [self.preprocess_0(older), self.preprocess_1(newer)]
        outputs = zip(self.edges, self.sources, strict=True)
        for first in outputs:
            node = 0
            for edge, source in (first, next(outputs)):
                y = edge(states[source])
                node = node + (y if isinstance(edge, nn.Identity) else drop_path(y, drop))
            states.append(node)
        return torch.cat([states[i] for i in self.concat], 1)


class Network(nn.Module):
    """Normal and reduction cells, and a second classifier at two thirds of the depth."""

    def __init__(self, genotype: Genotype, channels: int, layers: int, num_classes: int):
        super().__init__()
        width = 3 * channels
        stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width))
        self.cells, self.reductions = nn.ModuleList(), (layers // 3, 2 * layers // 3)
        older = newer = width
        for i in range(layers):
            reduction, before = i in self.reductions, i - 1 in self.reductions
            channels *= 2 if reduction else 1
            edges = genotype.reduce if reduction else genotype.normal
            concat = genotype.reduce_concat if reduction else genotype.normal_concat
            cell = Cell(edges, concat, (older, newer), channels, reduction, before)
            self.cells.append(cell)
            older, newer = newer, len(concat) * channels
            if i == self.reductions[1]:
                self.auxiliary = nn.Sequential(
                    nn.ReLU(),
                    nn.AvgPool2d(5, 3),
                    pointwise(newer, 128),
                    nn.BatchNorm2d(128),
                    nn.ReLU(),
                    nn.Conv2d(128, 768, 2, bias=False),
                    nn.BatchNorm2d(768),
                    nn.ReLU(),
                    nn.Flatten(),
                    nn.Linear(768, num_classes),
                )
        self.classifier = nn.Linear(newer, num_classes)

    def forward(self, x: Tensor, drop: float) -> tuple[Tensor, Tensor]:
        """Images [N, 3, 32, 32] -> both logits [N, num_classes], the auxiliary ones last."""
        older = newer = self.stem(x)
        for i, cell in enumerate(self.cells):
            older, newer = newer, cell(older, newer, drop)
            if i == self.reductions[1]:
                auxiliary = self.auxiliary(newer)
        return self.classifier(newer.mean((2, 3))), auxiliary


def make_step(network: Network, learning_rate: float, drop: float) -> Callable[[Batch], Tensor]:
    """`step(batch) -> loss`, a training step in place."""
    parameters = list(network.parameters())
    sgd = torch.optim.SGD(parameters, learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def step(batch):
        image, label = batch
        main, auxiliary = network(image, drop)
        loss = functional.cross_entropy(main, label)
        loss = loss + AUXILIARY_WEIGHT * functional.cross_entropy(auxiliary, label)
        sgd.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        sgd.step()
        return loss.detach()

    return step
