"""A round of prompts: who draws what, and when rewards come, changes nothing."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
import torch.distributed as dist

from softgrpo import Config, Trainer, distributed
from softgrpo.distributed import World
from softgrpo.rewards import RewardError
from softgrpo.rollout.sampling import Sampling, iter_samples
from softgrpo.run.round import Stopped


@pytest.fixture
def device():
    """What is decided here, the host decides."""
    return torch.device("cpu")


@pytest.fixture
def make_trainer(tiny_config):
    made = []

    def make(*overrides, functions=None):
        config = Config.load(tiny_config, ["rollout.prompts_per_step=5", *overrides])
        made.append(Trainer(config, functions))
        return made[-1]

    yield make
    for trainer in made:
        trainer.rewards.close()


class Process(World):
    """One of several in as many threads, which draws the prompts that it is given."""

    def set(self, numbers, values, barrier):
        vars(self).update(numbers=numbers, values=values, barrier=barrier)
        return self

    def queue(self, count):
        return iter(vars(self)["numbers"])

    def gather(self, value):
        values, barrier = vars(self)["values"], vars(self)["barrier"]
        values[self.rank] = value
        barrier.wait(30)
        everyones = list(values)
        barrier.wait(30)
        return everyones


def sampled(trainer, world):
    trainer.world = world
    drawn = trainer._round(0, trainer.config.rollout)
    drawn.sample()
    return drawn


def scored(drawn):
    drawn.wait()
    drawn.gather()
    return drawn.scored()


def shared_letters(prompts, completions, **columns):
    """A reward that sees all completions of a call."""
    together = "".join(completions)
    return [float(sum(together.count(x) for x in text)) for text in completions]


@pytest.mark.parametrize("functions", [None, shared_letters], ids=["in workers", "callable"])
def test_any_assignment_of_prompts_gives_the_same_batch(make_trainer, functions):
    trainer, batches = make_trainer(functions=functions), []
    for shares in ([[0, 1], [2, 3, 4]], [[4, 1], [3, 0, 2]], [[], [2, 1, 0, 3, 4]]):
        meeting = ([None, None], Barrier(2))
        processes = [Process(r, 2).set(share, *meeting) for r, share in enumerate(shares)]
        rounds = [sampled(trainer, process) for process in processes]
        with ThreadPoolExecutor(2) as threads:
            batches += threads.map(scored, rounds)
    expected = batches[0]
    assert len(set(expected.rewards_S.tolist())) > 3
    for batch in batches:
        assert batch.prompts == expected.prompts
        assert torch.equal(batch.rewards_S, expected.rewards_S)
        for output, other in zip(batch.outputs, expected.outputs, strict=True):
            assert output.prompt_token_ids == other.prompt_token_ids
            for sample, same in zip(output.samples, other.samples, strict=True):
                assert (sample.uid, sample.token_ids) == (same.uid, same.token_ids)
                torch.testing.assert_close(sample.soft.gprime, same.soft.gprime)
    alone = scored(sampled(trainer, World()))
    assert [o.prompt_token_ids for o in alone.outputs] == [
        o.prompt_token_ids for o in expected.outputs
    ]
    # A callable sees what a process has: all, or an equal share whoever drew it.
    assert torch.equal(alone.rewards_S, expected.rewards_S) == (functions is None)


def test_rewards_are_computed_while_other_groups_are_sampled(make_trainer, tmp_path):
    last, path = tmp_path / "last", tmp_path / "waiting.py"
    path.write_text(
        "import pathlib, time\n"
        "def waiting(completions, **columns):\n"
        "    while not pathlib.Path(" + repr(str(last)) + ").exists():\n"
        "        time.sleep(0.01)\n"
        "    return [1.0] * len(completions)\n"
    )
    functions = f'reward.functions=[{{path: "{path}:waiting"}}]'
    trainer = make_trainer(functions, "rollout.max_batch_size=4", "reward.timeout_s=60")
    start = trainer.rewards.start

    def start_and_tell(*arguments):
        tell.append(None)
        if len(tell) == 5:
            last.touch()
        return start(*arguments)

    tell, trainer.rewards.start = [], start_and_tell
    assert scored(sampled(trainer, World())).rewards_S.tolist() == [1.0] * 20


def test_a_wrong_reward_ends_the_sampling(make_trainer):
    trainer, started = make_trainer("rollout.max_batch_size=4"), []

    def fail(*_):
        started.append(Future())
        started[-1].set_exception(RewardError("wrong"))
        return started[-1]

    trainer.rewards.start = fail
    with pytest.raises(RewardError, match="wrong"):
        sampled(trainer, World())
    assert len(started) == 1
    assert not trainer.llm.scheduler.has_work


def test_a_round_that_is_stopped_leaves_nothing_in_the_engine(make_trainer):
    trainer = make_trainer()
    drawn = trainer._round(0, trainer.config.rollout)
    drawn.stop()
    with pytest.raises(Stopped):
        drawn.sample()
    assert not trainer.llm.scheduler.has_work
    trainer.llm.update_weights(trainer.policy.decoder.state_dict().items(), version=1)


class Greedy:
    """An engine that has room for everything."""

    def iter_groups(self, groups, *settings, **keys):
        yield from enumerate(list(groups))


def test_a_process_that_comes_first_leaves_the_others_their_share(monkeypatch, tiny_config):
    store = dist.HashStore()
    monkeypatch.setattr(distributed, "_get_default_store", lambda: store)
    config, numbers = Config.load(tiny_config), range(10)
    sampling = Sampling.of_step(config, config.rollout)
    worlds = [World(rank, 3) for rank in range(3)]
    for _ in range(2):  # queues do not mix
        queues = [world.queue(10) for world in worlds]
        draw = partial(iter_samples, Greedy(), numbers, numbers, sampling)
        parts = [draw(queue=queue, at_once=4) for queue in queues]
        firsts = [next(part)[0] for part in parts]
        assert firsts == [0, 4, 8]  # 8 and 9 are all that is left
        rest = [[index for index, _ in part] for part in parts]
        assert rest == [[1, 2, 3], [5, 6, 7], [9]]
        late = [world.queue(10) for world in worlds]
        parts = [[index for index, _ in draw(queue=queue, at_once=4)] for queue in late]
        assert parts == [list(range(10)), [], []]
        assert store.num_keys() == 0  # a long run leaves nothing behind
