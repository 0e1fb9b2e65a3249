"""syncbn.check(): start the ranks, hear how far they are, read what they left, judge it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report


def check(
    factory: str | Callable[[], Any],
    *,
    ranks: int = 2,
    batch: int = 4,
    steps: int = 3,
    input: Sequence[int] | None = None,
    data: str | Callable[[int], Any] | None = None,
    loss: str | Callable[..., Any] | None = None,
    dtype: str = "float64",
    convert: bool = False,
    lr: float = 0.01,
    seed: int = 0,
    timeout: float = 600.0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Does a model train over ranks as in one process with the whole batch? If not, from where on?

    Trains it on ``ranks`` processes of this machine, over gloo and the CPU, under
    DistributedDataParallel, and in one process whose batch norms are torch's, both from the same
    weights with the same data, and compares the outputs, their gradients, and the gradients,
    weights and running statistics of every layer, and the losses. docs/check.md says how.

    Starts processes that import what is named; a script calls it under ``if __name__ ==
    "__main__":``, in its main thread.

    Args:
        factory: makes the model without arguments: "package.module:name", or a function that other
            processes can import. It is called with the same seed everywhere.
        ranks, batch, steps: processes; samples of each step over all of them, which need not be
            divisible; steps of plain SGD.
        input: the shape of one sample, drawn from a normal distribution.
        data: instead of input, a function of the number of samples, called with the same seed
            everywhere. It returns what the model is called with: a tensor, a tuple (by position)
            or a dict (by keyword); with a loss, (that, target).
        loss: called with the model's output and the target of data; a mean over samples, ().
            Without: the output's own ``loss``, if it has one, else a fixed projection of it.
        dtype: float64, float32, bfloat16 or float16, of parameters and floating data.
        convert: call :func:`syncbn.convert` on what the factory makes.
        lr: learning rate.
        seed: of weights, data and dropout.
        timeout: seconds, after which the ranks are ended.
        on_progress: called with what is being done, how many steps are done and how many there are.

    Returns:
        A report with ``.ok``, ``.first`` (a layer's name or None), ``.rows``, ``.causes``,
        ``.as_json()``; ``str()`` of it is a table.

    Raises:
        ValueError: an option out of range, what cannot be imported, an input that does not fit, a
            factory, data or loss that raises, no result in time. No process is left.
        KeyboardInterrupt: no process is left then, either.

    Source: the judge is torch.nn.BatchNorm2d and its kin over the whole batch; docs/check.md says
    what is compared, and how closely.

    Example:
        >>> report = syncbn.check("torch.nn:Flatten", input=(3,), ranks=1, batch=2, steps=1)
        >>> report.ok, report.first
        (True, None)
    """
    from .options import Task
    from .supervise import supervised

    task = Task(
        factory=factory,
        ranks=ranks,
        batch=batch,
        steps=steps,
        input=None if input is None else tuple(input),
        data=data,
        loss=loss,
        dtype=dtype,
        convert=convert,
        lr=lr,
        seed=seed,
        timeout=timeout,
    )
    return supervised(task, on_progress)
