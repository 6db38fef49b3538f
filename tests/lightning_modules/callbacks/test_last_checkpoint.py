"""What a signal leaves of a run; see also test_resume.py and test_processes.py."""

from types import SimpleNamespace

import pytest

from common.errors import Interrupted
from lightning_modules.callbacks.last_checkpoint import LastCheckpoint, interrupting


@pytest.mark.parametrize("signum", [None, 15])
def test_only_a_failure_after_a_signal_is_an_interruption(tmp_path, signum):
    callback = LastCheckpoint(tmp_path)
    callback._signum = signum
    trainer = SimpleNamespace(callbacks=[object(), callback])
    with interrupting(trainer):
        pass
    with pytest.raises(Interrupted if signum else RuntimeError), interrupting(trainer):
        raise RuntimeError("Connection closed by peer")
