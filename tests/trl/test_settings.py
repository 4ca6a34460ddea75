"""What cannot hold is one line, before a model is loaded."""

import re

import pytest

pytest.importorskip("trl.trainer", reason="TRL is not installed: make test-trl")

from trl import GRPOConfig

from softgrpo.trl import SoftConfig, SoftGRPOTrainer

# Of GRPOConfig, of SoftConfig, of the trainer; what the line has.
WRONG = [
    ({"use_vllm": True}, {}, {}, "use_vllm=True is not allowed here"),
    ({"repetition_penalty": 1.1}, {}, {}, "set repetition_penalty=1.0"),
    ({"min_p": 0.1}, {}, {}, "set min_p=None"),
    ({"generation_kwargs": {"num_beams": 2}}, {}, {}, "set generation_kwargs=None"),
    ({"entropy_coef": 0.1}, {}, {}, "set entropy_coef=0.0"),
    ({"cast_lm_head_to_fp32": True}, {}, {}, "set cast_lm_head_to_fp32=False"),
    ({}, {}, {"tools": [print]}, "tools is not allowed here"),
    ({}, {}, {"rollout_func": print}, "rollout_func is not allowed here"),
    ({}, {"noise": "none"}, {}, "rollout.soft.noise: 'none' cannot be trained"),
    ({}, {"top_k": 65}, {}, "soft top_k=65 is not allowed"),
    ({}, {}, {"objective": "exakt"}, "algorithm.objective: 'exakt' is not allowed"),
    ({}, {}, {"objective": "censored"}, "set rollout.soft.weight_floor"),
    ({}, {}, {"engine": "nativ"}, "no engine 'nativ'; did you mean 'native'?"),
    ({"beta": 0.1}, {}, {}, "beta=0.1: TRL's estimate of the KL (k3) has an infinite variance"),
    (
        {},
        {"noise": "multiplex", "tau": 1.0, "noise_scale": 3.0},
        {"objective": "per_slot"},
        "TRL one of a position: take another (exact",
    ),
]


@pytest.mark.parametrize(("config", "soft", "options", "said"), WRONG, ids=[w[3] for w in WRONG])
def test_a_wrong_setting_is_one_line(config, soft, options, said, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **config)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        # The model would be asked for next, and is not there.
        SoftGRPOTrainer("/nowhere", print, args, None, soft=SoftConfig(**soft), **options)
    assert "\n" not in str(error.value)


def test_an_entropy_bonus_goes_with_discrete_rollouts(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, entropy_coef=0.1)
    with pytest.raises(ValueError, match="no model '/nowhere'"):
        SoftGRPOTrainer("/nowhere", print, args, None, soft=SoftConfig(enabled=False))
