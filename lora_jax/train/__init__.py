"""Training: a loss, an optimizer, a step, and the loop around it, each to be used alone.

    loss_fn = lj.train.next_token_loss(model)
    tx = lj.train.make_optimizer(lj.train.OptimizerConfig(steps=200, learning_rate=1e-3))
    fitted = lj.train.fit(loss_fn, base, adapters, tx, batches, key=key, steps=200)

What `fit` does in its loop is `make_step`, and any loop may:

    step, state = lj.train.make_step(loss_fn, tx), lj.train.init_state(key, adapters, tx)
    for batch in batches:
        state, metrics = step(state, base, batch)
"""

from lora_jax.train.checkpoints import Checkpoints, Found, Store
from lora_jax.train.cross_entropy import chunked_cross_entropy, token_losses
from lora_jax.train.evaluation import Nll, evaluate_nll, label_likelihoods
from lora_jax.train.fit import Fitted, fit
from lora_jax.train.loss import LossFn, Perturb, neftune, next_token_loss
from lora_jax.train.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from lora_jax.train.step import Diverged, State, Transform, init_state, make_step, train_step

__all__ = [
    "Checkpoints",
    "Diverged",
    "Fitted",
    "Found",
    "LossFn",
    "Nll",
    "OptimizerConfig",
    "Perturb",
    "State",
    "Store",
    "Transform",
    "chunked_cross_entropy",
    "evaluate_nll",
    "fit",
    "init_state",
    "label_likelihoods",
    "learning_rate_schedule",
    "make_optimizer",
    "make_step",
    "neftune",
    "next_token_loss",
    "token_losses",
    "train_step",
]
