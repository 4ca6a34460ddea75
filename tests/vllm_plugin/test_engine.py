"""The trainer's engine on vLLM: its weights, its groups, and what vLLM must be for it."""

import os

import pytest
import torch
from records import SEED, replay_error
from tiny_model import OPTIONS, random_model

from softgrpo_engine import SamplingParams, SoftParams

SAMPLING, SOFT = SamplingParams(top_k=5, max_tokens=10), SoftParams(end_of_thinking=None)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    from softgrpo_vllm.engine import VLLMEngine

    return VLLMEngine(
        model, tokenizer=tokenizer, dtype="float32", max_model_len=128, max_batch_size=4
    )


def generate(engine, groups, params=SAMPLING, soft=SOFT, **options):
    outputs = engine.iter_groups(iter(groups), params, soft, seed=SEED, **options)
    return [output for _, output in sorted(outputs, key=lambda pair: pair[0])]


def test_groups_are_those_of_our_engine(engine, ours, prompts):
    groups = [(prompts[0], [3, 9, 4]), (prompts[1], [1]), (prompts[2], [2**32 - 1, 0])]
    found, expected = generate(engine, groups), generate(ours, groups)
    for output, other in zip(found, expected, strict=True):
        assert output.prompt_token_ids == other.prompt_token_ids
        for sample, twin in zip(output.samples, other.samples, strict=True):
            assert sample.token_ids == twin.token_ids
            assert (sample.uid, sample.text) == (twin.uid, twin.text)
            assert sample.finish_reason == twin.finish_reason
            assert torch.equal(sample.soft.ids, twin.soft.ids)


def test_what_is_raised_between_steps_ends_the_samples(engine, prompts):
    steps = iter([0, 1])
    with pytest.raises(KeyError):
        generate(engine, [(prompts[0], [0, 1])], between_steps=lambda: {0: 0}[next(steps)])
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(generate(engine, [(prompts[0], [0])])) == 1


def test_a_prompt_that_does_not_fit_is_named(engine):
    with pytest.raises(ValueError, match="prompt 1 has 119 tokens; with max_tokens=10 the context"):
        engine.check_fits([[5], [5] * 119], SAMPLING)
    with pytest.raises(ValueError, match="end_of_thinking is 97, outside of 97 tokens"):
        generate(engine, [([5], [0])], soft=SoftParams(end_of_thinking=97))


def test_new_weights_are_those_that_it_draws_with(engine, prompts):
    """The head is tied: vLLM's packed copy of it must follow."""
    other = random_model(seed=1)
    engine.update_weights(other.named_parameters(), version=7)
    assert engine.weight_version == 7
    (output,) = generate(engine, [(prompts[2], [5])])
    assert replay_error(other, prompts[2], output.samples[0].soft, 5) < 1e-4


def test_no_block_of_old_weights_is_kept(engine, prompts, monkeypatch):
    """Where vLLM cannot drop them, later samples would silently be those of two policies."""
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="blocks that were computed with the old weights"):
        engine.update_weights(random_model(seed=1).named_parameters(), version=8)
    assert engine.weight_version == 7


def test_a_temperature_that_vllm_would_raise_is_refused(engine):
    with pytest.raises(ValueError, match=r"temperature=0\.002: vLLM takes it for"):
        engine.check_fits([[5]], SamplingParams(temperature=0.002, max_tokens=10))


def test_weights_leave_no_file_behind(engine, monkeypatch):
    """Nor would a kill -9 in the middle of an update."""
    seen, update = [], engine.llm.update_weights

    def watched(request):
        seen.extend(os.listdir("/dev/shm"))
        return update(request)

    monkeypatch.setattr(engine.llm, "update_weights", watched)
    engine.update_weights(random_model(seed=1).named_parameters(), version=9)
    assert not [name for name in seen if name.endswith(".safetensors")]


def test_weights_that_did_not_come_are_told(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    from softgrpo_vllm import weights

    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(weights, name, lambda *model: None)
    model = torch.nn.Linear(2, 3)
    model.load_weights = lambda tensors: {name for name, _ in tensors}
    update = object.__new__(weights.FileWeightTransferEngine)
    update.model = model
    save_file({"weight": torch.zeros(3, 2)}, tmp_path / "part")
    update.start_weight_update()
    update.receive_weights(weights.FileUpdate(str(tmp_path / "part")))
    with pytest.raises(ValueError, match="no new weights came for bias of Linear"):
        update.finish_weight_update()


def test_in_bfloat16_all_logits_are_those_of_fp32(model, tokenizer, prompts, monkeypatch):
    """Also with tensor parallelism, where no rank has the whole head: vLLM gathers these."""
    from softgrpo_vllm import sampler
    from softgrpo_vllm.engine import VLLMEngine

    steps, draw = [], sampler.SoftSampler._draw

    def kept(self, logits, batch, rows, *rest):
        product, row = self.model.head_product, torch.tensor(rows)
        steps.append((logits, product.hidden, product.head.weight, self._head(row)))
        return draw(self, logits, batch, rows, *rest)

    monkeypatch.setattr(sampler.SoftSampler, "_draw", kept)
    engine = VLLMEngine(model, tokenizer=tokenizer, max_model_len=128, max_batch_size=4)
    generate(engine, [(prompts[0], [0, 1])])
    assert steps
    for logits, hidden, weight, again in steps:
        assert (logits.dtype, hidden.dtype) == (torch.float32, torch.bfloat16)
        expected = hidden.float() @ weight.float().T
        torch.testing.assert_close(logits, expected[:, : logits.shape[1]], rtol=0, atol=1e-5)
        assert not again  # they need not be computed again


def test_its_processes_are_of_no_group_of_torchrun(monkeypatch):
    from softgrpo_vllm.engine import _own_process_group

    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    with _own_process_group(torch.device("cpu")):
        assert "RANK" not in os.environ
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["RANK"] == "3"
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"additional_config": {"softgrpo": "yes"}}, "softgrpo='yes' must be true or false"),
        ({"enable_lora": True}, "no soft thinking with LoRA: merge the adapter"),
        ({"scheduler_cls": "a.b"}, "with a scheduler of your own: leave out --scheduler-cls"),
        ({"pipeline_parallel_size": 2}, "with pipeline parallelism: take --tensor-parallel-size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "with speculative decoding: leave out --speculative-config",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message, model):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(model), **(OPTIONS | options)).create_engine_config()


def test_the_trainer_learns_of_it_in_one_line(model, tokenizer, monkeypatch):
    from softgrpo.cli.errors import is_for_the_user
    from softgrpo_vllm.engine import VLLMEngine

    monkeypatch.setattr("vllm.config.VllmConfig.use_v2_model_runner", False)
    with pytest.raises(ValueError, match=r"^softgrpo: no soft thinking with vLLM's V1.*$") as told:
        VLLMEngine(model, tokenizer=tokenizer, dtype="float32", max_model_len=128)
    assert is_for_the_user(told.value)


def test_the_v1_runner_is_refused(model, monkeypatch):
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", False)
    with pytest.raises(ValueError, match="with vLLM's V1 runner: it needs Model Runner V2"):
        EngineArgs(model=str(model), **OPTIONS).create_engine_config()


def test_without_the_setting_all_is_as_it_was(model):
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(model), **(OPTIONS | {"additional_config": {}}))
    config = config.create_engine_config()
    assert config.scheduler_config.scheduler_cls is None
    assert not config.model_config.logits_processors


def test_another_vllm_is_told_in_one_line(monkeypatch, model, tokenizer):
    import vllm

    import softgrpo_vllm
    from softgrpo_vllm.engine import VLLMEngine

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    softgrpo_vllm.register()
    with pytest.raises(ValueError, match=r"it knows vLLM 0\.32\.\* and this is 0\.33\.1"):
        VLLMEngine(model, tokenizer=tokenizer)
