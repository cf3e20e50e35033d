"""The recurrent language model in PyTorch, relaxed and discrete, to compare `darts_jax` with.

Written from the paper (arXiv 1806.09055, section 2.1 and appendix A.1.2) the ordinary way: a loop
over time, in it one over nodes, in it one over activations, each applied to all edges of a node.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch_reference import Batch, finite_difference, first_order
from darts_jax.genotype import RNN_PRIMITIVES, RecurrentGenotype

CLIP = 0.25
BOUND = 0.04  # of initial weights

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda h: h,
}


class Model(nn.Module):
    """Embedding, cell and decoder, which shares the embedding's weights.

    Args:
      vocabulary, size, nodes: lengths.
      genotype: the cell; None for the relaxed one.
    """

    def __init__(
        self, vocabulary: int, size: int, nodes: int, genotype: RecurrentGenotype | None = None
    ):
        super().__init__()
        self.genotype, self.size = genotype, size
        self.embedding = nn.Parameter(torch.empty(vocabulary, size))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.start = nn.Parameter(torch.empty(2 * size, 2 * size))
        self.nodes = nn.ParameterList(torch.empty(size, 2 * size) for _ in range(nodes))
        for weight in (self.embedding, self.start, *self.nodes):
            nn.init.uniform_(weight, -BOUND, BOUND)
        self.norm = nn.BatchNorm1d(size, affine=False)
        self.alphas = []
        if genotype is None:
            shape = nodes * (nodes + 1) // 2, len(RNN_PRIMITIVES)
            self.alphas = [(1e-3 * torch.randn(shape)).requires_grad_()]

    def forward(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [T, B] and hidden state [B, D] -> logits [T, B, V] and the last hidden state."""
        outputs = []
        cell = self.relaxed if self.genotype is None else self.discrete
        mix = self.alphas[0].softmax(-1) if self.alphas else None
        for x in self.embedding[tokens]:
            products = torch.cat([x, hidden], -1) @ self.start
            gate, candidate = products.split(self.size, -1)
            start = hidden + gate.sigmoid() * (candidate.tanh() - hidden)
            hidden = cell(start, mix)
            outputs.append(hidden)
        return torch.stack(outputs) @ self.embedding.T + self.bias, hidden

    def relaxed(self, start: Tensor, mix: Tensor) -> Tensor:
        """Each node is the weighted sum over all edges that enter it."""
        states, offset = self.norm(start)[None], 0
        for i, weight in enumerate(self.nodes):
            gate, candidate = (states @ weight).split(self.size, -1)
            gate, node = gate.sigmoid(), 0
            for column, name in enumerate(RNN_PRIMITIVES):
                if name != "none":
                    outputs = states + gate * (ACTIVATIONS[name](candidate) - states)
                    share = mix[offset : offset + i + 1, column, None, None]
                    node = node + (share * outputs).sum(0)
            states = torch.cat([states, self.norm(node)[None]])
            offset += i + 1
        return states[1:].mean(0)

    def discrete(self, start: Tensor, mix: None) -> Tensor:
        """Each node has one edge, with one activation."""
        states = [start]
        for weight, (name, source) in zip(self.nodes, self.genotype.recurrent, strict=True):
            gate, candidate = (states[source] @ weight).split(self.size, -1)
            s = states[source]
            states.append(s + gate.sigmoid() * (ACTIVATIONS[name](candidate) - s))
        return torch.stack([states[i] for i in self.genotype.concat]).mean(0)


def make_step(
    model: Model, hidden: Tensor, second_order: bool, learning_rate: float = 20.0
) -> Callable[[Batch, Batch], Tensor]:
    """`step(train, val) -> training loss`: a step of alpha, if there is one, then one of w.

    Both are in place. Batches are tokens and targets [T, B] each. The hidden states [B, D] of both
    go on from the given one.
    """
    w, alphas = list(model.parameters()), model.alphas
    hiddens = {}  # by the text's name
    adam = torch.optim.Adam(alphas, 3e-3, weight_decay=1e-3) if alphas else None
    sgd = torch.optim.SGD(w, learning_rate, weight_decay=5e-7)
    zeros = [torch.zeros_like(parameter) for parameter in w]

    def loss(batch):
        name, tokens, targets = batch
        logits, last = model(tokens, hiddens.get(name, hidden))
        hiddens[f"next {name}"] = last.detach()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(train, val):
        train, val = ("train", *train), ("val", *val)
        if alphas:
            if second_order:
                gradient = finite_difference(loss, w, alphas, zeros, learning_rate, train, val)
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
        for name in ("train", "val"):
            hiddens[name] = hiddens.get(f"next {name}", hidden)
        return value.detach()

    return step
