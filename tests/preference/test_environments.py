"""Environments have their mixture's shares, and rows for scoring that no preference is made of."""

from __future__ import annotations

import numpy as np
import pytest

from magmax import MagMaxError
from magmax.preference.mixtures import MIXTURES, draw_environments

TASK_OF = np.repeat(np.arange(5), [100, 80, 120, 90, 60])


def test_environments_have_the_shares_of_their_mixture():
    drawn = draw_environments(TASK_OF, draws=4)
    assert [e.mixture for e in drawn] == [name for name in MIXTURES for _ in range(4)]
    for environment in drawn:
        everything = np.concatenate([environment.target_rows, environment.scored_rows])
        assert len(set(everything.tolist())) == len(everything)
        shares = [(TASK_OF[everything] == task).mean() for task in environment.tasks]
        assert shares == pytest.approx(MIXTURES[environment.mixture], abs=0.02)
        targets = [(TASK_OF[environment.target_rows] == task).sum() for task in environment.tasks]
        wholes = [(TASK_OF[everything] == task).sum() for task in environment.tasks]
        assert targets == [max(1, round(0.1 * whole)) for whole in wholes]


def test_the_same_seed_draws_the_same():
    def drawn(seed):
        return [
            (e.tasks, e.target_rows.tolist(), e.scored_rows.tolist()) for e in draw_environments(TASK_OF, seed=seed)
        ]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("task_of", [[0, 0, 1, 1], [0, 0, 1, 1, 2]])
def test_too_little_data_is_refused(task_of):
    with pytest.raises(MagMaxError, match="need 3 tasks with two test samples"):
        draw_environments(np.array(task_of))
