"""An estimator in a loop of one's own, with no other part of the library.

Logistic regression whose loss weights its two data sets, one clean and one mislabelled, by alpha.
Run it as `python examples/own_loop.py`.
"""

import jax
import jax.numpy as jnp
import optax

from darts_jax import hypergradient


def cross_entropy(w, x, y):
    return optax.sigmoid_binary_cross_entropy(x @ w, y)


def train_loss(w, alpha, batch):
    return sum(
        share * cross_entropy(w, *batch[name]).mean()
        for share, name in zip(jax.nn.softmax(alpha), ("clean", "mislabelled"), strict=True)
    )


def val_loss(w, alpha, batch):
    return cross_entropy(w, *batch).mean()


x = jax.random.normal(jax.random.key(0), (3, 100, 5))
y = (x[..., 0] > 0).astype(jnp.float32)
train_batch = {"clean": (x[0], y[0]), "mislabelled": (x[1], 1 - y[1])}

w_optimizer, alpha_optimizer = optax.sgd(0.5, momentum=0.9), optax.adam(0.1)
problem = hypergradient.Bilevel(train_loss, val_loss)
estimate = jax.jit(hypergradient.unrolled(problem, w_optimizer))
w, alpha = jnp.zeros(5), jnp.zeros(2)
w_state, alpha_state = w_optimizer.init(w), alpha_optimizer.init(alpha)
for _ in range(50):
    found = estimate(alpha, w, w_state, train_batch, (x[2], y[2]))
    updates, alpha_state = alpha_optimizer.update(found.gradient, alpha_state)
    alpha = optax.apply_updates(alpha, updates)
    updates, w_state = w_optimizer.update(jax.grad(train_loss)(w, alpha, train_batch), w_state)
    w = optax.apply_updates(w, updates)
print("weights of clean and mislabelled data:", jax.nn.softmax(alpha))
