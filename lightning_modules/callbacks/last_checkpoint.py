"""The checkpoint from which a run resumes bit for bit, however it was stopped."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from common.errors import STOPS, Interrupted, UserError
from lightning_modules.callbacks.metrics_file import MetricsFile

__all__ = ["LastCheckpoint", "between_epochs", "interrupting"]

# How the Trainer's loops look when a validation has begun and not come far: it is done again.
_VALIDATION_BEGUN = {
    "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
    "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
    "is_last_batch": False,
}


def between_epochs(trainer: L.Trainer) -> bool:
    """Tell whether no training epoch is under way, as when training has ended.

    A validation at such a time is not one of the schedule, and a run that was never stopped would
    not have had it.
    """
    progress = trainer.fit_loop.epoch_progress.current
    return progress.completed == progress.ready


class LastCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt` and ends the run cleanly on a signal.

    It is written before and after each validation, every few minutes of training, where training
    stops within an epoch, and on SIGTERM, SIGINT and the warnings of SLURM (SIGUSR1, SIGUSR2):
    within training after the step under way, within validation and test at once, since what was
    written before them is enough. A second SIGINT ends the run without waiting.

    Args:
        folder: the run folder.
        every_minutes: how much training a crash may cost; a validation may be hours away.

    Raises:
        UserError: `every_minutes` is not above 0.
    """

    def __init__(self, folder: str | Path, every_minutes: float = 15) -> None:
        if not every_minutes > 0:
            raise UserError(
                f"callbacks.last.every_minutes={every_minutes} must be above 0; 1e9 is never."
            )
        self.path = Path(folder) / "checkpoints" / "last.ckpt"
        self.interval = every_minutes * 60
        self._saved_at = time.monotonic()
        self._signum: int | None = None
        self._stopping = False
        self._saved_within_epoch = -1
        self._validated = False
        self._validation_begun = False
        self._batch_begun = False
        self._due = False
        self._limits: tuple[int | None, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self._validated}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        if self._validation_begun:
            loops["epoch_loop.val_loop.batch_progress"] = _VALIDATION_BEGUN
        if self._batch_begun:  # It is to be had again, also if it is the last one.
            batches = loops["epoch_loop.batch_progress"]
            batches["is_last_batch"] = False
            for progress in ("total", "current"):
                batches[progress]["ready"] -= 1

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A time limit is one of the command, not of all commands that continued the run.
        checkpoint["callbacks"].pop("Timer", None)
        # While it loads, the Trainer would take a finished epoch for one to go on with where steps
        # are limited, and skip the end of training where nothing is left to train.
        loop = trainer.fit_loop
        self._limits = (loop.max_epochs, loop.max_steps)
        loop.max_epochs = loop.epoch_loop.max_steps = -1
        own = checkpoint["callbacks"][self.state_key]
        for table in _tables(trainer):
            table.restore(checkpoint["global_step"], own["validated"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._limits is not None:
            loop = trainer.fit_loop
            loop.max_epochs, loop.epoch_loop.max_steps = self._limits
        self._listen(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._signum is not None:  # It came after the last step of training.
            raise Interrupted(self._signum)
        self._listen(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # One step later than it was decided, so that the last step's losses are logged.
        self._raise_if_stopping()
        if self._due:
            self._save(trainer, batch_begun=True)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loop = trainer.fit_loop
        if loop._should_accumulate():
            return
        due = time.monotonic() - self._saved_at >= self.interval
        # Clocks and signals differ between processes, and what follows must not.
        self._stopping, due = _any_process(trainer, self._signum is not None, due)
        if loop.epoch_loop.batch_progress.is_last_batch:
            return
        self._due = due
        out_of_steps = 0 <= trainer.max_steps <= trainer.global_step
        if self._stopping or out_of_steps or (trainer.should_stop and loop._can_stop_early):
            self._save(trainer)
            self._saved_within_epoch = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saves_around_validation(trainer):
            self._save(trainer, validation_begun=not between_epochs(trainer))
        self._raise_if_stopping()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saves_around_validation(trainer):
            self._save(trainer, validated=not between_epochs(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._stopping:
            self._save(trainer)
            self._raise_if_stopping()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # Within a validation the Trainer ends the loader processes of that alone, and those of
        # training would hold up the exit.
        if trainer.state.fn == TrainerFn.FITTING:
            trainer.fit_loop.teardown()

    def _saves_around_validation(self, trainer: L.Trainer) -> bool:
        # After a stop within an epoch, the state from which the epoch goes on must stay.
        within = self._saved_within_epoch == trainer.global_step
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not within

    def _save(
        self,
        trainer: L.Trainer,
        validated: bool = False,
        validation_begun: bool = False,
        batch_begun: bool = False,
    ) -> None:
        self._validated, self._validation_begun = validated, validation_begun
        self._batch_begun = batch_begun
        for table in _tables(trainer):
            table.write()
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            self._validation_begun = self._batch_begun = self._due = False
            self._saved_at = time.monotonic()

    def _listen(self, trainer: L.Trainer) -> None:
        """Take over from the Trainer's own handlers, which stop without a checkpoint."""

        def receive(signum: int, frame: Any) -> None:
            if self._signum == signum == signal.SIGINT and trainer.is_global_zero:
                raise KeyboardInterrupt
            if self._signum is None and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signum)
            self._signum = signum
            if not trainer.training:
                raise Interrupted(signum)

        if threading.current_thread() is threading.main_thread():
            for signum in (*STOPS, signal.SIGINT):
                signal.signal(signum, receive)

    def _raise_if_stopping(self) -> None:
        if self._stopping:
            # Another process may have been the one that the signal reached.
            raise Interrupted(self._signum or signal.SIGTERM)


@contextmanager
def interrupting(trainer: L.Trainer) -> Iterator[None]:
    """Take a failure after a signal for its consequence: another process may have gone first."""
    try:
        yield
    except RuntimeError as error:
        for callback in trainer.callbacks:
            if isinstance(callback, LastCheckpoint) and callback._signum is not None:
                raise Interrupted(callback._signum) from error
        raise


def _any_process(trainer: L.Trainer, *answers: bool) -> list[bool]:
    """Return for each question whether any process has answered yes."""
    if trainer.world_size == 1:
        return list(answers)
    votes = torch.tensor(answers, dtype=torch.float32, device=trainer.strategy.root_device)
    return [vote > 0 for vote in trainer.strategy.reduce(votes, reduce_op="sum").tolist()]


def _tables(trainer: L.Trainer) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
