"""Tunes a weight decay for each layer of a Flax model, by the exact hypergradient of five steps.

Run it as `python examples/tune_weight_decay.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from darts_jax import hypergradient

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
# A third of the training labels is wrong, so that the weights need decay.
noisy = jnp.where(jnp.arange(300) % 3 == 0, (labels[:300] + 1) % 10, labels[:300])
train, val, test = (images[:300], noisy), (images[300:900], labels[300:900]), images[900:]
model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])


def val_loss(w, alpha, batch):
    logits = model.apply({"params": w}, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train_loss(w, alpha, batch):
    """alpha: the logarithm of the decay of each layer."""
    norms = {name: optax.tree.norm(layer, squared=True) for name, layer in w.items()}
    return val_loss(w, alpha, batch) + sum(jnp.exp(alpha[name]) * norms[name] for name in w) / 2


w = model.init(jax.random.key(0), train[0])["params"]
alpha = dict.fromkeys(w, jnp.log(1e-3))
sgd, adam = optax.sgd(0.2, momentum=0.9), optax.adam(0.3)
problem = hypergradient.Bilevel(train_loss, val_loss)
estimate = jax.jit(hypergradient.unrolled(problem, sgd, num_steps=5))
batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (5, *x.shape)), train)
w_state, alpha_state = sgd.init(w), adam.init(alpha)
for _ in range(100):
    found = estimate(alpha, w, w_state, batches, val)
    updates, alpha_state = adam.update(found.gradient, alpha_state)
    alpha = optax.apply_updates(alpha, updates)
    updates, w_state = sgd.update(jax.grad(train_loss)(w, alpha, train), w_state, w)
    w = optax.apply_updates(w, updates)
accuracy = (model.apply({"params": w}, test).argmax(-1) == labels[900:]).mean()
decay = {name: float(jnp.exp(a)) for name, a in alpha.items()}
print(f"decay of each layer {decay}, validation loss {found.value:.3f}, test {accuracy:.1%}")
