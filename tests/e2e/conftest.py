"""A tiny model on disk with a tokenizer and a chat template, a task that it can learn on, and an
evaluation of it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from simulated_gpu.found import REAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))  # evaluations
from evaluations import small

from softgrpo.cli.eval import main as evaluate

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A directory that `model.path` takes: one layer, 64 characters."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    letters = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789:;+-=? .,{}\\ABCDEFGHIJKLMN"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"say {c}", "answer": c} for c in "abcdefghijklmnop"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory):
    """A reward in a file: the share of letters a to m, so that every answer has another value."""
    path = tmp_path_factory.mktemp("reward") / "letters.py"
    path.write_text(
        "def early_letters(prompts, completions, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [sum('a' <= x <= 'm' for x in t) / max(1, len(t)) for t in texts]\n"
    )
    return path


@pytest.fixture
def rounding(device):
    """The largest difference of log-probabilities that `tiny_config`'s dtype excuses, nats."""
    return 1.0 if device.type == "cuda" and REAL else 1e-4


@pytest.fixture
def tiny_config(tmp_path, tiny_model, tiny_data, tiny_reward, device, request):
    """A YAML file of a run that takes a second or two, on the CPU and on a GPU."""
    dtype = "float32"
    if device.type == "cuda" and REAL:
        dtype = "bfloat16"  # flash attention takes no float32
    elif device.type == "cuda":
        request.getfixturevalue("float32_attention")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
run: {{name: tiny, output_dir: {tmp_path}/runs, max_steps: 6, seed: 3, deterministic: true}}
model: {{path: {tiny_model}, dtype: {dtype}}}
data: {{train: {tiny_data}, eval: null, max_prompt_tokens: 64}}
rollout:
  prompts_per_step: 3
  group_size: 4
  max_new_tokens: 10
  kv_memory: 0.01
  max_batch_size: 16
reward:
  functions: [{{path: "{tiny_reward}:early_letters"}}]
  require_eos: false
algorithm: {{objective: exact}}
optim: {{lr: 3e-3, minibatch_prompts: 2}}
checkpoint: {{every: 2, keep: 2}}
eval: {{samples: 2, k: [1, 2]}}
log: {{samples_every: 2}}
"""
    )
    yield path
    torch.use_deterministic_algorithms(False)  # which the run had for the whole process


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "say.jsonl"
    rows = [{"prompt": f"say {c} please", "answer": c} for c in "abcdefghij"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def command(tiny_model, questions):
    """The arguments of a run that takes a second."""
    return lambda output, *more: [*small(tiny_model, questions, output), *more]


@pytest.fixture(scope="session")
def finished(tiny_model, questions, tmp_path_factory):
    """The folder of that run."""
    folder = tmp_path_factory.mktemp("eval") / "finished"
    assert evaluate(small(tiny_model, questions, folder)) == 0
    return folder
