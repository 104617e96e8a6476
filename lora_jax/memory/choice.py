"""Which policy fits and repeats least; and, if none does, the nearest step that has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from lora_jax.memory.prediction import predict
from lora_jax.memory.setup import POLICIES, Setup

SHORTEST = 128  # tokens; a model of texts shorter than that is another task


def device_bytes() -> int | None:
    """The memory that JAX may take of the first device; None where it has no limit of its own."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit")


def auto_remat(setup: Setup, limit: int | None = None) -> str:
    """The policy that repeats least of the forward pass and still fits.

    It begins with `"products"`, which repeats no product. To save more is to save what elementwise
    passes give: that costs more to write and to read than to compute.

    Args:
      setup: the step; its own policy counts for nothing.
      limit: bytes; by default those of the first device. If there is no limit, everything fits.

    Returns:
      What `DecoderConfig.remat` takes.

    Raises:
      ValueError: if no policy fits; the message names the nearest step that does.
    """
    limit = device_bytes() if limit is None else limit
    if limit is None:
        return POLICIES[0]
    for policy in POLICIES:
        if predict(dataclasses.replace(setup, remat=policy)).needed <= limit:
            return policy
    raise ValueError(refusal(dataclasses.replace(setup, remat=POLICIES[-1]), limit))


def fitting(setup: Setup, limit: int) -> Setup | None:
    """The nearest step that fits: this one, or with another policy, smaller parts, shorter rows.

    First it may repeat more of the forward pass, which changes nothing but its time. Then a batch
    may be computed in parts, which keeps what is learned from each batch. Last, rows are halved.

    Args:
      setup: the step that is wanted.
      limit: bytes.

    Returns:
      The step; None if even a single short row does not fit.
    """
    return next((one for one in _nearest(setup) if predict(one).needed <= limit), None)


def _nearest(setup: Setup) -> Iterator[Setup]:
    policies = (setup.remat, *_policies_below(setup.remat))
    length = setup.length
    while True:
        for parts in range(setup.accumulate, setup.batch + 1):
            if setup.batch % parts == 0:
                for policy in policies:
                    yield dataclasses.replace(setup, remat=policy, accumulate=parts, length=length)
        if length <= SHORTEST:
            return
        length = max(SHORTEST, length // 2)


def _policies_below(policy: str | None) -> tuple[str, ...]:
    if policy is None:
        return POLICIES
    return POLICIES[POLICIES.index(policy) + 1 :] if policy in POLICIES else ()


def refusal(setup: Setup, limit: int) -> str:
    """The sentence that says what does not fit, and what to write instead."""
    needed = predict(setup).needed
    sentence = f"this step needs {_shown(needed)} and there are {_shown(limit)}"
    nearest = fitting(setup, limit)
    if nearest is None:
        resident, other = _shown(predict(setup).resident), ""
        if setup.method != "qlora":
            other = ", or its base in 4 bits"
        return (
            f"{sentence}, of which what stays from step to step takes {resident}; "
            f"write a smaller model{other}"
        )
    changed = [
        name for name in ("accumulate", "length") if getattr(nearest, name) != getattr(setup, name)
    ]
    words = " and ".join(f"{name}={getattr(nearest, name)}" for name in ("remat", *changed))
    return f"{sentence}; write {words}, which needs {_shown(predict(nearest).needed)}"


def _shown(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
