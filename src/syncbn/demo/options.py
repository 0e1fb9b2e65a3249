"""What is run: the options of the demonstration, and its three arms."""

from __future__ import annotations

from dataclasses import dataclass

TRAINING_IMAGES = 1437  # of the 1,797 digits; the other 360, a fifth, validate


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: which BatchNorm, and whether in one process or on all ranks."""

    key: str
    label: str
    synchronised: bool = False
    one_process: bool = False


PLAIN = Arm(key="batchnorm", label="BatchNorm per rank")
SYNCBN = Arm(key="syncbn", label="syncbn", synchronised=True)
WHOLE = Arm(key="one-process", label="one process", one_process=True)
ARMS = (PLAIN, SYNCBN, WHOLE)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Everything that determines a run.

    Args:
        ranks: number of processes of the first two arms.
        batch_per_rank: images per rank and step; the one process takes ranks × batch_per_rank.
        epochs: passes over the training images.
        seed: of the initial weights, the split into training and validation, and the order.
        train_images: take only the first so many training images (tests).
        check_steps: float64 steps after which the arms' weights are compared.
        evaluations_per_epoch: points per epoch on the validation curve.

    Raises:
        ValueError: a value out of range, or one step's batch larger than the training set.
    """

    ranks: int = 4
    batch_per_rank: int = 1
    epochs: int = 3
    seed: int = 0
    train_images: int = TRAINING_IMAGES
    check_steps: int = 20
    evaluations_per_epoch: int = 6

    def __post_init__(self) -> None:
        for name in ("ranks", "batch_per_rank", "epochs", "check_steps", "evaluations_per_epoch"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} ≥ 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected 0 ≤ seed < 2³², got {self.seed}")
        if not 1 <= self.train_images <= TRAINING_IMAGES:
            raise ValueError(
                f"expected 1 to {TRAINING_IMAGES} train_images, got {self.train_images}"
            )
        if self.global_batch > self.train_images:
            raise ValueError(
                f"{self.ranks} ranks × {self.batch_per_rank} images per rank = "
                f"{self.global_batch} images per step, but the training set has only "
                f"{self.train_images}; take fewer ranks or a smaller batch"
            )

    @property
    def global_batch(self) -> int:
        """Images per step over all ranks."""
        return self.ranks * self.batch_per_rank

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches per epoch; what is left over is dropped, in every arm alike."""
        return self.train_images // self.global_batch
