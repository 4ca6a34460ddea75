"""Requests of clients that cannot send soft keys: the default of the server."""

import json

import pytest
from records import SEED, asked, generate, records, same
from tiny_model import OPTIONS

from softgrpo_engine import SoftParams

SOFT = SoftParams(tau=0.7, top_k=4, end_of_thinking="ab", noise_clip=(-1.5, 3.0))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """exported(text): a directory of the model with such a softgrpo.json."""

    def with_settings(text):
        folder = tmp_path_factory.mktemp("exported")
        for file in model.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "softgrpo.json").write_text(text)
        return folder

    return with_settings


@pytest.fixture(scope="module")
def by_default(exported):
    from vllm import LLM

    folder = exported(json.dumps({"soft": SOFT.to_dict()}))
    return LLM(str(folder), **(OPTIONS | {"additional_config": {"softgrpo": {"default": True}}}))


def keyed(**keys):
    """A request with these keys alone."""
    params = asked(0)
    params.extra_args = keys
    return params


def test_a_request_without_keys_thinks_as_the_model_was_exported(
    by_default, vllm, prompts, tokenizer
):
    (end,) = tokenizer.encode("ab", add_special_tokens=False)
    settings = {"tau": 0.7, "top_k": 4, "end_of_thinking": end, "noise_clip": (-1.5, 3.0)}
    noise = {"soft_seed": SEED, "soft_uid": 0}
    (expected,) = records(vllm, prompts[:1], [asked(0, **settings)])
    (found,) = records(by_default, prompts[:1], [keyed(**noise)])
    assert expected.soft.kind.any()
    assert same(found.soft, expected.soft, atol=1e-5)
    # Some of the settings are the request's.
    (expected,) = records(vllm, prompts[:1], [asked(0, **settings | {"tau": 0.2})])
    (found,) = records(by_default, prompts[:1], [keyed(**noise, soft_tau=0.2)])
    assert same(found.soft, expected.soft, atol=1e-5)
    # Without any key, twice: the noise is each request's own, and the caller's request as it was.
    nothing = asked(0)
    nothing.extra_args = None
    first, second = records(by_default, [prompts[1]] * 2, [nothing, nothing])
    assert first.soft.kind[0] == second.soft.kind[0] == 1
    assert not same(first.soft, second.soft, atol=1e-5)
    assert nothing.extra_args is None


def test_soft_0_is_a_request_like_any_other(by_default, vllm, prompts):
    from vllm import SamplingParams

    greedy = {"temperature": 0.0, "max_tokens": 8}
    (expected,) = generate(vllm, prompts[:1], [SamplingParams(**greedy)])
    params = SamplingParams(**greedy, extra_args={"soft": 0})
    (found,) = generate(by_default, prompts[:1], [params])
    assert found.token_ids == expected.token_ids


def test_what_the_default_cannot_do_is_refused(by_default, prompts):
    params = keyed(soft_seed=1)
    params.n = 2
    with pytest.raises(Exception, match="n=2 with soft_seed: the samples would be equal"):
        generate(by_default, prompts[:1], [params])


@pytest.mark.parametrize(
    ("setting", "file", "message"),
    [
        ({"default": "yes"}, None, 'must be true or false, or {"default": true}'),
        ({"default": True, "tau": 1}, None, 'must be true or false, or {"default": true}'),
        ({"default": True}, None, "has no softgrpo.json: give the soft keys in the place of true"),
        ({"default": True}, "{", "softgrpo.json cannot be read: "),
        ({"default": True}, '{"soft": {"topk": 3}}', "cannot be read: unknown soft setting 'topk'"),
        ({"default": True}, '{"soft": {"switch_window": 9}}', "vLLM knows no rules of entropy"),
        ({"default": True}, '{"soft": {"end_of_thinking": "aabb"}}', "'aabb' is 2 tokens"),
        ({"default": {"soft_tua": 1}}, None, "unknown soft setting 'soft_tua'"),
        ({"default": {"soft_tau": 1e-42}}, None, "gumbel_tau must be > 0, not denormal"),
        ({"default": {"soft": 0}}, None, "soft=0: leave the default out"),
    ],
)
def test_a_bad_default_is_one_line_at_the_start(setting, file, message, model, exported):
    from vllm.engine.arg_utils import EngineArgs

    from softgrpo_vllm.alive import starting

    folder = model if file is None else exported(file)
    options = OPTIONS | {"additional_config": {"softgrpo": setting}}
    with pytest.raises(ValueError, match="softgrpo") as raised, starting():
        EngineArgs(model=str(folder), **options).create_engine_config()
    assert message in str(raised.value)
    if "must be" not in message:
        assert str(raised.value).startswith("softgrpo: no default for requests: ")
        assert "\n" not in str(raised.value)


def test_the_keys_may_stand_in_the_configuration(model):
    from vllm.engine.arg_utils import EngineArgs

    from softgrpo_vllm.config import default_keys

    setting = {"softgrpo": {"default": {"soft_tau": 0.5}}}
    options = OPTIONS | {"additional_config": setting}
    config = EngineArgs(model=str(model), **options).create_engine_config()
    assert default_keys(config) == {"soft": 1, "soft_tau": 0.5}
    assert setting == {"softgrpo": {"default": {"soft_tau": 0.5}}}
