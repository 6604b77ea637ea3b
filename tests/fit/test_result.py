"""`FitResult` says where to find what its trainer has."""

import copy
import pickle

import optimistix as optx
import pytest

from models import LineFit, line, line_batch


def test_what_the_trainer_has_is_told():
    result = LineFit(line()).solve(optx.BFGS(1e-6, 1e-6), line_batch())
    with pytest.raises(AttributeError, match=r"has: `result.trainer.intervals`"):
        _ = result.intervals
    with pytest.raises(AttributeError, match=r"no attribute 'wrong'.$"):
        _ = result.wrong
    assert not hasattr(result, "__array__")
    for again in (copy.copy(result), pickle.loads(pickle.dumps(result))):
        assert again.best_loss == result.best_loss
