"""What one rank does: its share of the ranks' training, and rank 0 the whole batch by itself first.

Every step is a file in the folder that the ranks share; syncbn.diagnose.check.compare reads them.
"""

from __future__ import annotations

import json
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from ...batches.nested import mapped
from ...comm import waiting
from ...comm.errors import DesyncError
from ...launch import joined
from ...models.convert import convert
from . import build
from .capture import Capture
from .observe import Observations, facts_of
from .options import Task, Unusable, spoken

REFERENCE, PERTURBED, RESEEDED, RANKS = "reference", "perturbed", "reseeded", "rank"
ALONE = (REFERENCE, PERTURBED, RESEEDED)
_WAIT = 120.0  # seconds that a layer waits for a rank


@dataclass
class Place:
    """Where a rank is, for the report of an error."""

    phase: str = "factory"
    step: int = 0
    capture: Capture | None = None


@dataclass(frozen=True)
class Progress:
    """What rank 0 begins, and how many steps of all runs it has done."""

    phase: str
    steps: int


@dataclass(frozen=True)
class Raised:
    """An error in a rank.

    modules: those that were running, from the model to the innermost. said: of a DesyncError, what
    each rank called.
    """

    rank: int
    phase: str
    step: int
    modules: tuple[str, ...]
    kind: str
    text: str
    usage: bool
    said: tuple[str, ...]
    trace: str
    time: float


def run_rank(rank: int, task: Task, folder: Path, send: Callable[[Progress], None]) -> None:
    """Run ``task`` as one rank of it. ``folder`` is shared by the ranks; only rank 0 sends."""
    place = Place()
    try:
        _run(rank, task, folder, send, place)
    except (Exception, SystemExit) as error:  # a module that runs a script's main() when imported
        raised = _raised(rank, place, error)
        partial = folder / f"raised-{rank}.part"
        partial.write_text(json.dumps(asdict(raised)), encoding="utf-8")
        partial.rename(partial.with_suffix(".json"))  # whole, or not there: it may be ended here
        raise


def _raised(rank: int, place: Place, error: BaseException) -> Raised:
    return Raised(
        rank=rank,
        phase=place.phase,
        step=place.step,
        modules=tuple(place.capture.running) if place.capture else (),
        kind=type(error).__name__,
        text=" ".join(str(error).split()),
        usage=isinstance(error, Unusable),
        said=tuple(error.ranks.values()) if isinstance(error, DesyncError) else (),
        trace=traceback.format_exc(),
        time=time.time(),
    )


def _run(
    rank: int, task: Task, folder: Path, send: Callable[[Progress], None], place: Place
) -> None:
    # Factories may make groups of ranks, and their models call collectives of their own: the first
    # want all ranks, in a process that trains by itself the second want none.
    send(Progress(place.phase, 0))
    with joined(rank, task.ranks, folder / "rendezvous", timeout=task.timeout):
        model = _built(task)
        if rank == 0:
            build.localised(model)
    if rank == 0:
        _train_alone(model, task, folder, send, place)
    del model
    place.phase, place.step, place.capture = "factory", 0, None
    with joined(rank, task.ranks, folder / "rendezvous-ranks", timeout=task.timeout):
        model = _built(task)
        _load(model, torch.load(folder / "initial.pt", weights_only=True), task)
        if rank == 0:
            send(Progress(RANKS, task.steps * len(ALONE)))
        _train_ranks(rank, model, task, folder, send, place)


def _built(task: Task) -> nn.Module:
    model = build.model_of(task)
    return convert(model) if task.convert else model


def _load(model: nn.Module, state: dict[str, Tensor], task: Task) -> None:
    missing, surplus = model.load_state_dict(state, strict=False)
    # A layer that counts what it skips has a buffer that torch's lacks.
    missing = [name for name in missing if not name.endswith("num_batches_skipped")]
    if missing or surplus:
        raise Unusable(
            f"factory {spoken(task.factory)}: expected the same model from every call, got other "
            f"weights: {', '.join([*missing, *surplus][:3])}"
        )


def _train_alone(
    model: nn.Module, task: Task, folder: Path, send: Callable[[Progress], None], place: Place
) -> None:
    store = HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    # As it is after lazy layers have their sizes, and before anything has moved.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = build.modes_of(model)
    torch.save(state, folder / "initial.pt")
    (folder / "facts-reference.json").write_text(json.dumps(facts_of(model)))
    for number, variant in enumerate(ALONE):
        place.phase = variant
        model.load_state_dict(state)
        build.set_modes(model, modes)
        if variant == PERTURBED:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.copy_(_perturbed(weight))
        done = number * task.steps
        _train(model, model, task, slice(0, task.batch), folder, variant, place, send, done)
    dist.destroy_process_group()


def _train_ranks(
    rank: int,
    model: nn.Module,
    task: Task,
    folder: Path,
    send: Callable[[Progress], None],
    place: Place,
) -> None:
    trained = any(weight.requires_grad for weight in model.parameters())
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts_of(model)))
    place.phase = RANKS
    # Which weights are left unused is the model's business: it is no fault, nor is their presence.
    warnings.filterwarnings("ignore", message="find_unused_parameters")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if trained else model
    done, name = task.steps * len(ALONE), f"{RANKS}-{rank}"
    # Shorter than the whole check, so that a layer that some rank never calls is named.
    with waiting.timeout(min(task.timeout / 2, _WAIT)):
        _train(wrapped, model, task, task.share(rank), folder, name, place, send, done)


def _train(
    model: nn.Module,
    bare: nn.Module,
    task: Task,
    part: slice,
    folder: Path,
    name: str,
    place: Place,
    send: Callable[[Progress], None],
    done: int,
) -> None:
    """Steps of plain SGD. ``bare`` is what ``model`` wraps, ``part`` this process's samples."""
    weights = [weight for weight in bare.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=task.lr) if weights else None
    share = (part.stop - part.start) * (task.ranks if name.startswith(RANKS) else 1) / task.batch
    for step in range(task.steps):
        place.step, place.capture = step, Capture(bare)
        whole = build.batch_of(task, step)
        if name == PERTURBED:
            whole = mapped(_perturbed, whole[0]), whole[1]
        inputs, target = build.share_of(whole, task, part)
        build.seed(task.seed + 1 + step + (10_000 if name == RESEEDED else 0))
        observations = Observations(place.capture)
        bare.zero_grad()
        with place.capture.watching():
            with observations if name == RESEEDED and step == 0 else nullcontext():
                output = build.called(model, inputs)
            loss = build.loss_of(task, output, target, part)
        if loss.requires_grad:
            # DistributedDataParallel takes the mean over ranks, of samples it is to be.
            (loss * share).backward()
        if optimizer is not None:
            optimizer.step()
        place.capture.save(folder / f"{name}-step-{step}.pt", loss=loss)
        if name == RESEEDED and step == 0:
            (folder / "seen.json").write_text(json.dumps(observations.seen))
        send(Progress(name.partition("-")[0], done + step + 1))


def _perturbed(leaf: Any) -> Any:
    """Floating values moved by one rounding, up or down at random."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    generator = torch.Generator().manual_seed(leaf.numel())
    signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.dtype) * 2 - 1
    return leaf.detach() * (1 + torch.finfo(leaf.dtype).eps * signs)
