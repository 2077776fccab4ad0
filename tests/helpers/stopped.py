"""A fit that is stopped on its way."""

from contextlib import contextmanager

import pytest

from probdiff.fitting import checkpoints


@contextmanager
def stopped_after(check):
    """The fit inside is interrupted as soon as the checkpoint of that check is saved."""
    save = checkpoints.Checkpoints.save

    def save_and_stop(self, at, tree):
        save(self, at, tree)
        if at == check:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            yield
