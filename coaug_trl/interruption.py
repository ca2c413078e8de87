"""Ctrl-C and SIGTERM: training finishes its step, saves, and says how to go on."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .distributed import largest


logger = logging.getLogger(__name__)

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# torchrun sends a Ctrl-C on to processes that have had it from the terminal: not yet the second one of the user.
SECONDS_OF_ONE_CTRL_C = 3.0


class StopOnSignal(TrainerCallback):
    """
    On Ctrl-C or SIGTERM, lets the running optimizer step end, saves a checkpoint and leaves, with the exit code of the
    signal (130 or 143). A second Ctrl-C interrupts at once.

    All processes leave together, whichever of them got the signal. An evaluation that is due at this step comes first,
    so that the resumed run is the same as one that was not interrupted.

    Launchers of several processes wait for a while before they kill: torchrun and `accelerate launch` 30 s, unless
    `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` says more. They send SIGTERM also when one process has died. The others then wait
    for it, in a step that never ends, until they are killed: the longer the timeout, the longer the machine stands
    still. For a single process `accelerate launch` passes no signal on; use `coaug train`, or signal the process.
    """

    def __init__(self):
        self.received = 0
        self._since = 0.0
        self._agreed = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handles the signals while the block runs. Only the main thread can, and what is ignored stays ignored."""
        self.received = self._agreed = 0
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    replaced[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)
        if self.received:  # after the last step, which nothing is left to save of
            signal.raise_signal(self.received)

    def _receive(self, number: int, frame) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            if int(os.environ.get("RANK", 0)) == 0:
                # Not by print or logging, which may be what was interrupted.
                more = ", if all processes are still there" * (int(os.environ.get("WORLD_SIZE", 1)) > 1)
                more += "; once more to stop at once" * (number == signal.SIGINT)
                os.write(2, f"\n{NAMES[number]}: saving when this step has ended{more}\n".encode())
            return
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        if number == signal.SIGINT and time.monotonic() - self._since > SECONDS_OF_ONE_CTRL_C * launched:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        self._agreed = largest(self.received)
        if self._agreed:
            args.save_only_model = False  # or nothing could go on from the checkpoint
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._agreed:
            if state.is_world_process_zero:
                checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                command = "--resume_from_checkpoint" if args.resume_from_checkpoint else "the same command"
                logger.warning(
                    f"Stopped by {NAMES[self._agreed]} after step {state.global_step}: {command} goes on from "
                    f"{checkpoint}."
                )
            raise SystemExit(128 + self._agreed)
