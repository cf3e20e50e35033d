"""The network and the iteration of the search in PyTorch, to compare `darts_jax` with.

Written from the paper (arXiv 1806.09055): the first order, and the second order with its central
difference. The passes over the network, and the order of its parameters, are the original's.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from darts_jax.genotype import CNN_PRIMITIVES

MOMENTUM = 0.9
WEIGHT_DECAY = 3e-4
CLIP = 5.0

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Batch], Tensor]


def pointwise(inputs: int, outputs: int) -> nn.Module:
    """A 1x1 convolution."""
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def relu_conv_norm(inputs: int, outputs: int, affine: bool = False) -> nn.Module:
    """ReLU, 1x1 convolution, batch norm."""
    norm = nn.BatchNorm2d(outputs, affine=affine)
    return nn.Sequential(nn.ReLU(), pointwise(inputs, outputs), norm)


class FactorizedReduce(nn.Module):
    """ReLU, half the channels from the even pixels and half from the odd ones, batch norm."""

    def __init__(self, inputs: int, outputs: int, affine: bool = False):
        super().__init__()
        self.conv_1 = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.conv_2 = nn.Conv2d(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, outputs, H / 2, W / 2]."""
        x = functional.relu(x)
        return self.norm(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], 1))


def operations(affine: bool) -> dict[str, Callable[[int, int], nn.Module]]:
    """name -> (channels, stride) -> module: of relaxed cells or, where affine, of discrete ones.

    "none" is zero. In discrete cells pooling has no batch norm.
    """

    def half_sep_conv(channels, size, stride, padding, dilation=1):
        depthwise = nn.Conv2d(
            channels, channels, size, stride, padding, dilation, groups=channels, bias=False
        )
        norm = nn.BatchNorm2d(channels, affine=affine)
        return [nn.ReLU(), depthwise, pointwise(channels, channels), norm]

    def sep_conv(size):
        def make(channels, stride):
            first = half_sep_conv(channels, size, stride, size // 2)
            return nn.Sequential(*first, *half_sep_conv(channels, size, 1, size // 2))

        return make

    def dil_conv(size):
        return lambda c, s: nn.Sequential(*half_sep_conv(c, size, s, size - 1, dilation=2))

    def pooling(make):
        def normalized(channels, stride):
            return nn.Sequential(make(stride), nn.BatchNorm2d(channels, affine=False))

        return (lambda c, s: make(s)) if affine else normalized

    return {
        "max_pool_3x3": pooling(lambda s: nn.MaxPool2d(3, s, 1)),
        "avg_pool_3x3": pooling(lambda s: nn.AvgPool2d(3, s, 1, count_include_pad=False)),
        "skip_connect": lambda c, s: nn.Identity() if s == 1 else FactorizedReduce(c, c, affine),
        "sep_conv_3x3": sep_conv(3),
        "sep_conv_5x5": sep_conv(5),
        "dil_conv_3x3": dil_conv(3),
        "dil_conv_5x5": dil_conv(5),
    }


OPERATIONS = operations(affine=False)
COLUMNS = [CNN_PRIMITIVES.index(name) for name in OPERATIONS]


class Cell(nn.Module):
    """A relaxed cell of 4 nodes; its edges are ordered by destination, then by source."""

    def __init__(self, older: int, newer: int, channels: int, reduction: bool, before: bool):
        super().__init__()
        preprocess = FactorizedReduce if before else relu_conv_norm
        self.preprocess_0 = preprocess(older, channels)
        self.preprocess_1 = relu_conv_norm(newer, channels)
        self.edges = nn.ModuleList(
            nn.ModuleList(
                make(channels, 2 if reduction and i < 2 else 1) for make in OPERATIONS.values()
            )
            for node in range(2, 6)
            for i in range(node)
        )

    def forward(self, older: Tensor, newer: Tensor, weights: Tensor) -> Tensor:
        """Inputs [N, C, H, W], weights [edges, candidates] -> [N, 4 * channels, H', W']."""
        states = [self.preprocess_0(older), self.preprocess_1(newer)]
        edges = iter(zip(self.edges, weights[:, COLUMNS], strict=True))
        for _ in range(4):
            mixed = []
            for state, (operations, row) in zip(states, edges, strict=False):
                mixed.append(sum(w * op(state) for w, op in zip(row, operations, strict=True)))
            states.append(sum(mixed))
        return torch.cat(states[2:], 1)


class Supernet(nn.Module):
    """The relaxed network. Its alphas are no parameters: `alphas`, normal and reduce."""

    def __init__(self, channels: int, layers: int, num_classes: int, image_channels: int = 3):
        super().__init__()
        width = 3 * channels
        stem = nn.Conv2d(image_channels, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width))
        self.cells, self.reductions = nn.ModuleList(), (layers // 3, 2 * layers // 3)
        older = newer = width
        for i in range(layers):
            reduction, before = i in self.reductions, i - 1 in self.reductions
            channels *= 2 if reduction else 1
            self.cells.append(Cell(older, newer, channels, reduction, before))
            older, newer = newer, 4 * channels
        self.classifier = nn.Linear(newer, num_classes)
        shape = (len(self.cells[0].edges), len(CNN_PRIMITIVES))
        self.alphas = [(1e-3 * torch.randn(shape)).requires_grad_() for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, num_classes]."""
        normal, reduce = (alpha.softmax(-1) for alpha in self.alphas)
        older = newer = self.stem(x)
        for i, cell in enumerate(self.cells):
            mix = reduce if i in self.reductions else normal
            older, newer = newer, cell(older, newer, mix)
        return self.classifier(newer.mean((2, 3)))


def first_order(loss: Loss, w: Sequence[Tensor], alphas: Sequence[Tensor], val: Batch):
    """The validation loss's gradient in the alphas. The one in w is formed too, as originally."""
    return torch.autograd.grad(loss(val), [*w, *alphas])[len(w) :]


def finite_difference(
    loss: Loss,
    w: Sequence[Tensor],
    alphas: Sequence[Tensor],
    momenta: Sequence[Tensor],
    xi: float,
    train: Batch,
    val: Batch,
) -> list[Tensor]:
    """Equations (7) and (8): through w' = w - xi (momentum * buffer + gradient + decay * w)."""

    @torch.no_grad()
    def assign(values):
        for parameter, value in zip(w, values, strict=True):
            parameter.copy_(value)

    start = [parameter.detach().clone() for parameter in w]
    gradient = torch.autograd.grad(loss(train), w)
    assign(
        p - xi * (MOMENTUM * m + g + WEIGHT_DECAY * p)
        for p, m, g in zip(start, momenta, gradient, strict=True)
    )
    gradients = torch.autograd.grad(loss(val), [*w, *alphas])
    v, direct = gradients[: len(w)], gradients[len(w) :]
    eps = 0.01 / torch.linalg.vector_norm(torch.cat([x.ravel() for x in v]))
    ends = []
    for sign in (1, -1):
        assign(p + sign * eps * x for p, x in zip(start, v, strict=True))
        ends.append(torch.autograd.grad(loss(train), alphas))
    assign(start)
    mixed = [(plus - minus) / (2 * eps) for plus, minus in zip(*ends, strict=True)]
    return [d - xi * m for d, m in zip(direct, mixed, strict=True)]


def make_step(
    network: Supernet,
    second_order: bool,
    learning_rate: float = 0.025,
    momenta: Iterable[Tensor] | None = None,
) -> Callable[[Batch, Batch], Tensor]:
    """`step(train, val) -> training loss`: a step of alpha, then one of w, both in place.

    Momenta are one tensor a parameter, zero if None.
    """
    w, alphas = list(network.parameters()), network.alphas
    sgd = torch.optim.SGD(w, learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    adam = torch.optim.Adam(alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    for parameter, momentum in zip(w, momenta or map(torch.zeros_like, w), strict=True):
        sgd.state[parameter]["momentum_buffer"] = momentum

    def loss(batch):
        image, label = batch
        return functional.cross_entropy(network(image), label)

    def step(train, val):
        if second_order:
            momenta = [sgd.state[parameter]["momentum_buffer"] for parameter in w]
            gradient = finite_difference(loss, w, alphas, momenta, learning_rate, train, val)
        else:
            gradient = first_order(loss, w, alphas, val)
        for alpha, g in zip(alphas, gradient, strict=True):
            alpha.grad = g
        adam.step()
        value = loss(train)
        for parameter, g in zip(w, torch.autograd.grad(value, w), strict=True):
            parameter.grad = g
        nn.utils.clip_grad_norm_(w, CLIP)
        sgd.step()
        return value.detach()

    return step
