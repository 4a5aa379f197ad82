"""Checkpoints of a training: which one to resume, and callbacks whose state is kept in them and comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState


CHECKPOINT = "checkpoint-"
STATE = "trainer_state.json"


class KeptCallback(TrainerCallback, ExportableState):
    """A callback that says what of it belongs into a checkpoint.

    `Trainer` keeps the states of callbacks that it got when it was made, and gives none back; this one may be added
    later. There may be one of each class.
    """

    def keep(self) -> dict[str, Any]:
        """The state now, as JSON can hold it."""
        raise NotImplementedError

    def restore(self, kept: dict[str, Any] | None, step: int) -> None:
        """Takes a state at the begin of a resumed training, before its first step.

        Args:
            kept: what `keep` gave; `None` if the checkpoint was made without this callback.
            step: of the checkpoint.
        """
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step:
            self.restore_from(state)
        # Trainer only writes the states of callbacks that stand here
        state.stateful_callbacks[type(self).__name__] = {"args": {}, "attributes": {}}

    def restore_from(self, state: TrainerState) -> None:
        """Takes what a checkpoint's state holds of this callback."""
        states: Any = state.stateful_callbacks
        saved = states.get(type(self).__name__) or {}
        self.restore(saved.get("attributes") or None, state.global_step)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.keep()}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that was written to its end."""
    found = [
        path
        for path in folder.glob(f"{CHECKPOINT}*")
        if path.name.removeprefix(CHECKPOINT).isdigit() and (path / STATE).is_file()
    ]
    return max(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)), default=None)


def checkpoint_to_resume(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on with; `None` to begin.

    Raises:
        ValueError: if the folder holds a checkpoint and is not to be resumed.
    """
    newest = last_checkpoint(folder)
    if newest is not None and not resume:
        raise ValueError(
            f"The folder {folder.name} holds the checkpoint {newest.name} of another run: resume it (`--resume`), "
            "remove it, or name another folder."
        )
    return newest


def how_to_resume(folder: Path) -> str:
    """What to say of a training that was interrupted."""
    newest = last_checkpoint(folder)
    return "nothing was kept" if newest is None else f"{newest} is complete, go on behind it with --resume"


def train_from(trainer: Trainer, newest: Path | None) -> None:
    """Trains from the begin, or behind a checkpoint; one that was the last is loaded and not trained further.

    `Trainer` itself makes one step before it sees that none was left.
    """
    if newest is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(newest / STATE))
    if state.global_step < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=str(newest))
        return
    trainer._load_from_checkpoint(str(newest))
    trainer.state = state
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, KeptCallback):
            callback.restore_from(state)
