"""The engine makes room for the update, and its KV cache has the size that the run needs."""

import gc

import pytest
import torch
from simulated_gpu.plugin import ON_THE_CPU

from softgrpo import Config, Trainer
from softgrpo_engine.execution import memory

PAGE = 2 * 2 * 16 * 8 * 4  # of the tiny model: k and v, 2 heads, 16 slots, 8 wide, 4 bytes


def tensor_bytes(device):
    """Memory of all tensors on the device that are alive, each storage once."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    plain = (torch.Tensor, torch.nn.Parameter)
    alive = [x for x in gc.get_objects() if type(x) in plain and not x.is_meta]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in alive)}.values())


def letters(prompts, completions, **columns):
    return [float(sum(map(ord, text))) for text in completions]


def equal(prompts, completions, **columns):
    return [1.0] * len(prompts)


def run(config, device, name, reward=letters, **rollout):
    """Batches of two steps, and the bytes that the update has less around it than the rollout."""
    settings = [f"run.name={name}", "rollout.kv_memory=null", "log.samples_every=0"]
    settings += [f"rollout.{key}={value}" for key, value in rollout.items()]
    trainer = Trainer(Config.load(config, settings), reward)
    batches, held, freed = [], [], []
    sample, update = trainer._sample, trainer.update

    def sampled(*arguments):
        drawn = sample(*arguments)
        held.append(tensor_bytes(device))
        return drawn

    class Watched:
        score_by, optimizer = update.score_by, update.optimizer

        def __call__(self, batch, *arguments):
            freed.append(held[-1] - tensor_bytes(device))
            batches.append(batch)
            return update(batch, *arguments)

    trainer._sample, trainer.update = sampled, Watched()
    trainer.step(1), trainer.step(2)
    return batches, freed, trainer.llm


@pytest.fixture
def run_as(tiny_config, device):
    return lambda *arguments, **options: run(tiny_config, device, *arguments, **options)


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.soft.ids, other.soft.ids)
        assert torch.equal(batch.soft.gprime, other.soft.gprime)
        assert torch.equal(batch.logprobs, other.logprobs)


def test_the_update_has_the_memory_that_the_engine_gives_back(run_as, device):
    expected, freed, llm = run_as("never", sleep="never")
    cache = llm.runner.k_pages.nbytes + llm.runner.v_pages.nbytes
    weights = sum(p.nbytes for p in llm.runner.decoder.parameters())
    assert min(cache, weights) > 15_000 > max(map(abs, freed))
    batches, freed, _ = run_as("auto", sleep="auto")
    assert_same(batches, expected)
    assert abs(min(freed) - (cache if device.type == "cuda" else 0)) < 15_000
    batches, freed, _ = run_as("always", sleep="always")
    assert_same(batches, expected)
    assert min(freed) > cache + weights - 15_000


@ON_THE_CPU
def test_weights_come_back_after_a_step_that_taught_nothing(run_as):
    expected, _, _ = run_as("never", equal, sleep="never")
    batches, freed, llm = run_as("always", equal, sleep="always")
    assert llm.weight_version == 0
    assert min(freed) > 10_000
    assert_same(batches, expected)


@ON_THE_CPU
def test_the_cache_is_what_the_run_needs_or_an_error(tiny_config, tmp_path, monkeypatch):
    free = 1 << 30
    monkeypatch.setattr(memory, "free_memory", lambda device: free)

    def pages(*settings):
        settings = ["rollout.kv_memory=null", *settings]
        return Trainer(Config.load(tiny_config, settings)).llm.pool.num_pages

    longest = len("u:say a;a:") + 1 + 10  # the prompt and ten tokens: two pages a sample
    assert 16 < longest <= 32
    assert pages() == 2 * 12  # of the samples of a step, though max_batch_size is 16
    assert pages("rollout.max_batch_size=5") == 2 * 5
    free = 24 * PAGE
    assert pages() == 2 * 12, "of a quarter of the free memory, not of all, it was"
    free -= 1
    message = (
        r"max_batch_size=12 samples of \d+ tokens needs 0.0 GiB, and 0.0 GiB are free: .*"
        r"rollout.max_batch_size, rollout.kv_memory"
    )
    with pytest.raises(ValueError, match=message):
        pages()
    assert pages("rollout.kv_memory=0.00001") < 24
