"""Sweeps: many runs in one program, each as it would be alone.

    @dataclasses.dataclass(frozen=True)
    class Run:
        rank: int = 8
        learning_rate: float = 1e-3
        seed: int = 0

    def make_adapters(run):
        rule = lj.LoraRule("kernel", rank=run.rank, alpha=16)
        return lj.init_adapters(jax.random.key(run.seed), base, rule)

    def make_tx(run):
        return optax.adamw(run.learning_rate)

    runs = lj.sweep.grid(Run(), rank=[1, 2, 4, 8], learning_rate=[3e-4, 1e-3], seed=range(3))
    plan = lj.sweep.plan(runs, make_adapters, make_tx, at_once=8)
    print(plan)
    fitted = lj.sweep.fit(
        loss_fn, base, plan, batches, make_key=lambda run: jax.random.key(run.seed), steps=200
    )

`loss_fn(adapters, base, batch, key)` is that of `lj.train.fit`. What differs between runs by a
number (rank, alpha, learning rate, seed, dropout, targets, ...) is batched into one program with
`jax.vmap` over the small tree, beside one shared base; what changes the program makes groups. A run
does not depend on those beside it, and equals the same run alone. With `folder=` a sweep that was
killed goes on where it was; with `executor=` its groups are trained by other threads or machines.
"""

from lora_jax.sweep.fields import grid
from lora_jax.sweep.groups import Group, Plan, plan
from lora_jax.sweep.padding import stack
from lora_jax.sweep.places import Batches, Stopped
from lora_jax.sweep.ray import ray_executor
from lora_jax.sweep.stages import Fitted, Halving, fit
from lora_jax.sweep.work import Executor

__all__ = [
    "Batches",
    "Executor",
    "Fitted",
    "Group",
    "Halving",
    "Plan",
    "Stopped",
    "fit",
    "grid",
    "plan",
    "ray_executor",
    "stack",
]
