"""How samples are shared out over passes and processes."""

import numpy as np
import pytest

from softgrpo.config import Config, ConfigError
from softgrpo.learner.microbatches import balanced, check_budget

LIMIT, SAMPLES = 8192, 8


def size(part, tokens, prompt_of, prompt_tokens):
    return sum(tokens[s] for s in part) + sum(
        prompt_tokens[p] for p in {prompt_of[s] for s in part}
    )


def reasoning_rollout(groups, cut, seed):
    """(tokens, prompt_of, prompt_tokens) of lengths as of reasoning models: lognormal with a spread
    of questions and of answers, about the share `cut` of which ends at the limit."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(0, 0.5, (groups, 1)) + rng.normal(0, 0.55, (groups, SAMPLES))
    tokens = np.exp(spread)
    tokens = np.minimum(LIMIT, LIMIT * tokens / np.quantile(tokens, 1 - cut)).astype(int)
    return (
        tokens.flatten().tolist(),
        np.repeat(np.arange(groups), SAMPLES).tolist(),
        rng.integers(100, 300, groups).tolist(),
    )


@pytest.mark.parametrize("groups", [64, 32])
@pytest.mark.parametrize("ranks", [8, 32, 64])
@pytest.mark.parametrize("cut", [0.1, 0.25])
def test_processes_are_busy_nine_tenths_of_the_time(groups, ranks, cut):
    """All wait in every pass for the one that has most; a prompt is computed for each part."""
    for seed, budget in ((0, 16384), (1, 32768)):
        tokens, prompt_of, prompt_tokens = reasoning_rollout(groups, cut, seed)
        assert tokens.count(LIMIT) > 0.9 * cut * len(tokens)
        parts = balanced(tokens, budget, ranks, prompt_of, prompt_tokens)
        assert sorted(s for part in parts for s in part) == list(range(len(tokens)))
        sizes = [size(part, tokens, prompt_of, prompt_tokens) for part in parts]
        assert max(sizes) <= budget
        busy = ranks * sum(max(sizes[i : i + ranks]) for i in range(0, len(sizes), ranks))
        assert (sum(tokens) + sum(prompt_tokens)) / busy >= 0.9
        # Hardly more passes than the tokens need.
        assert len(sizes) // ranks <= 1 + -(-sum(sizes) // (budget * ranks))


def test_the_longest_sample_bounds_what_many_processes_gain():
    tokens, prompt_of = [8000, *[500] * 15], [0] * 8 + [1] * 8
    parts = balanced(tokens, 16384, 8, prompt_of, [200, 100])
    assert len(parts) == 8
    assert parts[0] == [0]
    assert max(size(part, tokens, prompt_of, [200, 100]) for part in parts) == 8200


def test_samples_stay_with_their_prompt_where_they_can():
    """Long prompts and short answers: four groups for each process, none split."""
    prompt_of = [s // 8 for s in range(64)]
    parts = balanced([20] * 64, 4096, 2, prompt_of, [500] * 8)
    assert [len({prompt_of[s] for s in part}) for part in parts] == [4, 4]
    # One group for four: the prompt is computed by each.
    assert [len(part) for part in balanced([90] * 8, 4096, 4, [0] * 8, [10])] == [2, 2, 2, 2]


def test_every_process_has_as_many_passes_within_the_budget():
    tokens = [50, 10, 30, 20, 70, 5, 5, 60, 40]
    for ranks in (1, 2, 4):
        for budget in (70, 100, 1000):
            parts = balanced(tokens, budget, ranks)
            assert len(parts) % ranks == 0
            assert sorted(s for part in parts for s in part) == list(range(len(tokens)))
            assert all(sum(tokens[s] for s in part) <= budget for part in parts)
    # No more passes than needed, and none much longer than another.
    sizes = [sum(tokens[s] for s in part) for part in balanced(tokens, 80, 2)]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 10
    # A sample over the budget is the bound of all.
    assert balanced([500, 10, 10], 100, 1) == [[0], [1, 2]]
    assert balanced([10], 100, 4).count([]) == 3
    assert balanced([0], 100, 2) == [[0], []]


def test_a_budget_of_less_than_a_sample_is_refused():
    config = Config.load("demo", ["rollout.max_new_tokens=900", "optim.tokens_per_microbatch=1000"])
    check_budget(config, 100)
    with pytest.raises(ConfigError) as raised:
        check_budget(config, 101)
    assert str(raised.value) == (
        "optim.tokens_per_microbatch=1000 is less than one sample: the longest prompt has 101 "
        "tokens and rollout.max_new_tokens=900 may follow; set optim.tokens_per_microbatch=1001 "
        "or more"
    )
