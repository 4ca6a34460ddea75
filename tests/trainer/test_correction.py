"""Importance weights against plain numpy, and that they make up for a wrong engine."""

import numpy as np
import pytest
import torch

from softgrpo.algorithm.correction import importance_weights
from softgrpo.config.sections import CorrectionConfig

SAMPLE = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
LOG_RATIO = np.log([1.0, 1.5, 0.7, 3.0, 0.9, 0.2, 1.1, 0.9, 4.0])


def numpy_weights(mode, level, bound):
    weights, beyond = [], []
    for t in range(len(SAMPLE)):
        if level == "token":
            ratio = np.exp(LOG_RATIO[t])
        else:
            ratio = np.prod([np.exp(LOG_RATIO[s]) for s in range(9) if SAMPLE[s] == SAMPLE[t]])
        outside = ratio > bound or (mode != "truncate" and ratio < 1 / bound)
        beyond.append(outside)
        if mode == "none":
            weights.append(1.0)
        elif mode == "truncate":
            weights.append(min(ratio, bound))
        else:
            weights.append(0.0 if outside else ratio)
    return weights, beyond


@pytest.mark.parametrize("mode", ["none", "truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bound", [1.2, 2.0])
def test_weights_equal_numpy(mode, level, bound):
    config = CorrectionConfig(mode, level, bound)
    weights, beyond = importance_weights(
        torch.tensor(LOG_RATIO), torch.tensor(SAMPLE), max(SAMPLE) + 1, config
    )
    expected, outside = numpy_weights(mode, level, bound)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert beyond.tolist() == outside
    assert 0 < sum(outside) < 9


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_tokens_have_no_weights(level):
    empty = torch.empty(0)
    config = CorrectionConfig("mask", level)
    weights, beyond = importance_weights(empty, empty.long(), 0, config)
    assert len(weights) == len(beyond) == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("log_ratio", [100.0, 1e4, -100.0, -1e4])
def test_no_weight_overflows(log_ratio, level):
    for mode, above in (("none", 1.0), ("truncate", 2.0), ("mask", 0.0)):
        weights, beyond = importance_weights(
            torch.full((3,), log_ratio), torch.zeros(3).long(), 1, CorrectionConfig(mode, level)
        )
        below = 1.0 if mode == "none" else 0.0
        assert weights.tolist() == pytest.approx([above if log_ratio > 0 else below] * 3)
        assert beyond.tolist() == [log_ratio > 0 or mode != "truncate"] * 3


def test_truncation_moves_the_gradient_towards_the_trainer_s_own():
    """Tokens drawn from an engine that is off: the weighted score has the trainer's mean."""
    rng = np.random.default_rng(0)
    engine, trainer, reward = rng.normal(size=(3, 6))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (engine, trainer))
    score = np.eye(6) - q  # d log q[token] / d logits
    true = (q * reward) @ score
    uncorrected = (p * reward) @ score
    log_ratio = torch.tensor(np.log(q / p))
    off = np.abs(uncorrected - true).max()
    for bound, limit in ((1e6, 1e-12), (2.0, off)):
        config = CorrectionConfig("truncate", "token", bound)
        weights, _ = importance_weights(log_ratio, torch.arange(6), 6, config)
        assert np.abs((p * weights.numpy() * reward) @ score - true).max() < limit
