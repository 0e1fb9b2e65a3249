"""Checkpoints with odd buffers: python -m hostile.states FIRST COUNT

A state dict with something odd in it is loaded into a layer and into torch's. Both take it or
refuse it; where both take it, eval mode gives the same, and a step in training runs or is refused.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from hostile import judge
from hostile.cases import free

CHANNELS = 3
ODD: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda t: t,
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "integers": lambda t: t.long(),
    "complex": lambda t: t.cfloat(),
    "of another size": lambda t: torch.cat((t.view(-1), t.view(-1))),
    "of two dimensions": lambda t: t.view(1, -1),
    "of one number": lambda t: t.view(-1)[:1],
    "scalar": lambda t: t.view(-1)[0],
    "expanded": lambda t: t.view(-1)[:1].expand(t.numel() or 1),
    "strided": lambda t: t.view(-1).repeat_interleave(2)[::2],
    "negative": lambda t: -t - 1,
    "nan": lambda t: t * float("nan") if t.is_floating_point() else t,
    "infinite": lambda t: t + float("inf") if t.is_floating_point() else t,
    "huge": lambda t: t + 1e38 if t.is_floating_point() else t + 2**62,
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.view(-1).to_sparse(),
    "freed": lambda t: free(t.clone()),
    "a list": lambda t: t.tolist(),
    "None": lambda t: None,
    "text": lambda t: "state",
}


def odd_state(pick: random.Random, layer: nn.Module) -> tuple[dict[str, Any], str]:
    """The layer's state with one entry changed, or missing, or one too many."""
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    name, how = pick.choice(sorted(state)), pick.choice(("missing", "more", *ODD))
    if how == "missing":
        del state[name]
    elif how == "more":
        state["running_median"] = torch.zeros(CHANNELS)
    else:
        state[name] = ODD[how](state[name])
    return state, f"{name} {how}"


def outcome(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def try_case(seed: int) -> str:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    theirs, x = nn.BatchNorm1d(CHANNELS), torch.randn(5, CHANNELS)
    ours = syncbn.convert(copy.deepcopy(theirs))
    state, what = odd_state(pick, theirs)
    strict, assign = pick.random() < 0.7, pick.random() < 0.3
    assign = assign or what.endswith("freed")  # torch's own copy of such a tensor crashes
    loads = [
        outcome(lambda layer=layer: layer.load_state_dict(state, strict=strict, assign=assign))
        for layer in (theirs, ours)
    ]
    refused = [type(error) for _, error in loads]
    judge.require(refused[0] is refused[1], f"{what}: torch {loads[0]}, ours {loads[1]}")
    if loads[1][1] is not None:
        return "refused"
    evals = [outcome(lambda layer=layer: layer.eval()(x)) for layer in (theirs, ours)]
    if evals[0][1] is None and evals[1][1] is None:
        close = torch.allclose(*(y for y, _ in evals), rtol=1e-4, atol=1e-5, equal_nan=True)
        judge.require(close, f"{what}: eval gives {evals[1][0][0]}, torch's {evals[0][0][0]}")
    before = {n: t.clone() for n, t in ours.named_buffers() if not t.is_meta and judge.is_held(t)}
    for _, error in (evals[1], outcome(lambda: ours.train()(x).sum().backward())):
        if error is not None:
            kinds = isinstance(error, (*judge.REFUSALS, AttributeError))
            judge.require(kinds, f"{what}: {type(error).__name__}: {error}")
            for name, old in before.items():
                same = torch.equal(old.nan_to_num(7), ours.get_buffer(name).nan_to_num(7))
                judge.require(same, f"{what}: {name} moved though it raised: {error}")
            return "refused"
    return "right"


def main(first: int, count: int) -> None:
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for seed in range(first, first + count):
        counts[judged(seed)] += 1
    print("counts", dict(counts), flush=True)


def judged(seed: int) -> str:
    try:
        return try_case(seed)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"seed {seed}: {words[:300]}", flush=True)
        return "wrong"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
