"""The usual causes in plain words: what is wrong, and what to do about it."""

from __future__ import annotations

from typing import Any

_WORDS = {
    "eval": """
        {cls} is in eval mode {where}: it normalises by its running statistics, where
        model.train() of a training loop has it normalise the batch. Call model.train(); to freeze
        the layer for good, syncbn.freeze(model, where).""",
    "group": """
        It normalises over a group of {group} of {world} ranks (process_group or group_size). That
        equals no single process; where it is meant, it is no fault.""",
    "torch": """
        torch.nn.SyncBatchNorm runs on GPUs alone. syncbn.convert takes it (--convert).""",
    "left alone": """
        {cls} is a subclass of BatchNorm with behaviour of its own, which syncbn.convert leaves
        alone: it normalises each rank's samples by themselves{others}. Say what it becomes:
        syncbn.register_conversion({name}, …).""",
    "not converted": """
        {cls} is not converted: it normalises each rank's samples by themselves{others}. Use
        syncbn.convert(model), or check with --convert.""",
    "random": """
        Randomness ({operator}): ranks draw other numbers than one process does for the whole
        batch. That is no fault. To see past it, give the model dropout of probability 0.""",
    "function": """
        Its forward calls torch's {operator} itself, on each rank's samples: that is no layer that
        syncbn.convert could find. Use a layer, or syncbn.sync_batch_norm.""",
    "data": """
        One process and the ranks are given different data. Let data() draw from torch's, random's
        or NumPy's global generator, which are seeded, or return the same in every call.""",
    "half": """
        Half precision ({operator}): a difference of {relative:.0e} may be its rounding, and hides
        smaller faults. Check without autocast and half parameters, in float64.""",
    "rounding": """
        Rounding that grows (chaos): one process by itself departs as far when its input and
        weights are moved by one rounding. No fault of the ranks is shown, and none excluded. Take
        fewer steps, a smaller learning rate or, if it was not, float64.""",
    "calls": """
        One process called it {alone}, rank {rank} {there}, in all steps. How often may not depend
        on the number of samples or their values: ranks depart and, where layers synchronise,
        raise DesyncError.""",
    "desync": """
        The ranks call different layers: {text} Look for a branch that some of them take.""",
    "raises": """
        Rank {rank} raised {kind} in step {step}, where one process with the whole batch did not:
        {text}""",
    "backward": """
        Its output is equal, but not the gradient that it passes on: its backward takes something
        from one rank's samples alone.""",
    "forward": """
        Its input is equal, its output is not: it computes something of all samples that it is
        given (a mean, a norm, an order), or of what its process is.""",
    "weight": """
        Its input and output are equal, but not its own {quantity}: its backward, or a hook, is
        other on the ranks.""",
    "own weights": """
        The loss weighs uneven ranks ({split} samples) by itself. The check does so, too, and
        wants the plain mean over each rank's samples.""",
    "uneven": """
        The loss is averaged over uneven ranks ({split} samples) as if each had equally many.
        Weigh each rank's mean by n·ranks/batch, n its samples, before it is averaged.""",
    "sum": """
        The loss is a sum over samples, of which DistributedDataParallel takes the mean over
        ranks: gradients are ranks times too small. Divide by the number of samples.""",
    "no mean": """
        The loss of the whole batch is not the mean of the ranks' by their samples, though all
        outputs are equal: it divides by something else than samples (tokens, positives, pairs),
        or compares samples with each other.""",
}


def said(key: str, **fields: Any) -> str:
    """The sentence of that key."""
    return " ".join(_WORDS[key].split()).format(**fields)


def times(count: int) -> str:
    """How often."""
    return {0: "not at all", 1: "once", 2: "twice"}.get(count, f"{count} times")
