"""What the model reads: turns in the order of its chat template, and nothing else."""

import json
import types

import pytest
from chat_tokenizer import ChatTokenizer, text_of

from softgrpo.config import Config, ConfigError
from softgrpo.config.sections import FewShot
from softgrpo.data.examples import Example
from softgrpo.data.prompts import build_prompt
from softgrpo.data.sources import DataError
from softgrpo.data.training import TrainingData
from softgrpo_engine.requests.prompts import thinking_end_id


def test_build_prompt_orders_system_shots_and_question():
    shots = [FewShot("1 + 1?", "2")]
    text = Example("2 + 2?", "4", {})
    assert text_of(build_prompt(text, ChatTokenizer(), "Box it.", shots)) == (
        "<system>Box it.<user>1 + 1?<assistant>2<user>2 + 2?<assistant>"
    )
    chat = Example([{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "4", {})
    assert text_of(build_prompt(chat, ChatTokenizer(), None, shots)) == (
        "<system>S<user>1 + 1?<assistant>2<user>Q<assistant>"
    )
    with pytest.raises(DataError, match="a system message of its own"):
        build_prompt(chat, ChatTokenizer(), "Box it.")
    with pytest.raises(DataError, match="no chat template"):
        build_prompt(text, types.SimpleNamespace(chat_template=None))


def test_the_template_alone_writes_the_bos():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "hi": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    assert tokenizer("hi").input_ids == [0, 1]  # by itself it adds one
    assert build_prompt(Example("hi", "", {}), tokenizer) == [0, 1]


# As DeepSeek-R1 distills have it: the answer opens with <think>, past thoughts are left out, and
# there is no room for a second system message.
THINKING = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{% if not loop.first %}"
    "{{ raise_exception('one system message only') }}{% endif %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<user>' + m.content }}"
    "{% else %}{{ '<assistant>' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}"
)


@pytest.fixture
def thinking_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "</s>", "<user>", "<assistant>", "<think>", "</think>"]
    words = [*marks, "be", "brief", "one", "two", "three", "hm", "?"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": marks[2:]})
    tokenizer.chat_template = THINKING
    return tokenizer


def test_a_template_that_opens_think_ends_the_prompt_with_it(thinking_tokenizer):
    shots = [FewShot("one ?", "<think> hm </think> two")]
    ids = build_prompt(Example("two ?", "three", {}), thinking_tokenizer, "be brief", shots)
    text = "<s> be brief <user> one ? <assistant> two </s> <user> two ? <assistant> <think>"
    assert " ".join(thinking_tokenizer.convert_ids_to_tokens(ids)) == text
    # Soft thinking begins right there, and ends with the token that `auto` finds.
    assert thinking_end_id("auto", thinking_tokenizer) == 5


def test_filler_thoughts_end_every_prompt(thinking_tokenizer, tmp_path):
    """Of training and of held-out questions; they count as tokens of the prompt."""
    paths = {}
    for name, question in (("train", "one ?"), ("eval", "two ?")):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text(json.dumps({"prompt": question, "answer": "two"}) + "\n")
    plain = [*(f"{k}={v}" for k, v in paths.items()), "prompt_template=null"]
    plain += ["system_prompt=null", "few_shot=[]"]
    overrides = [*(f"data.{x}" for x in plain), "rollout.soft.enabled=false"]
    filler = ["rollout.filler_thoughts.count=3", "rollout.filler_thoughts.token=hm"]

    def texts(*more):
        data = TrainingData(Config.load("demo", [*overrides, *more]))
        data.prepare(thinking_tokenizer)
        prompts = data.prompts_of_round(0, 1) + data.eval_prompts()
        return [" ".join(thinking_tokenizer.convert_ids_to_tokens(p.token_ids)) for p in prompts]

    plain = texts()
    assert texts(*filler) == [f"{text} hm hm hm </think>" for text in plain]
    no_end = "rollout.soft.end_of_thinking=null"
    assert texts(*filler, no_end) == [f"{text} hm hm hm" for text in plain]
    assert texts(filler[0], "rollout.filler_thoughts.token=11", no_end) == texts(*filler, no_end)
    length = len(plain[0].split())
    with pytest.raises(DataError, match=f"has {length + 4} tokens, data.max_prompt_tokens allows"):
        texts(*filler, f"data.max_prompt_tokens={length + 3}")
    for token, says in (("be brief", "'be brief' is 2 tokens"), ("13", "=13 is outside the voc")):
        with pytest.raises(DataError, match=says):
            texts(filler[0], f"rollout.filler_thoughts.token={token}")
    with pytest.raises(ConfigError, match=r"rollout\.soft\.enabled=false"):
        texts(*filler, "rollout.soft.enabled=true")


def test_a_template_that_refuses_a_role_is_one_clear_line(thinking_tokenizer, tmp_path):
    turns = [{"role": "user", "content": "one"}, {"role": "system", "content": "be brief"}]
    train = tmp_path / "t.jsonl"
    train.write_text(json.dumps({"prompt": [*turns, turns[0]], "answer": "two"}) + "\n")
    plain = ["prompt_template=null", "eval=null", "system_prompt=null", "few_shot=[]"]
    data = TrainingData(Config.load("demo", [f"data.{x}" for x in (f"train={train}", *plain)]))
    with pytest.raises(DataError) as error:
        data.prepare(thinking_tokenizer)
    assert str(error.value) == (
        f"{train}, example 0: the model's chat template refuses user, system, user: "
        "one system message only"
    )


@pytest.mark.demo
def test_the_demo_prompt_of_the_real_tokenizer():
    from transformers import AutoTokenizer

    from softgrpo_engine.model.source import resolve_model

    data = Config.load("demo").data
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    example = Example("What is 67 - 57?", "10", {})
    ids = build_prompt(example, tokenizer, data.system_prompt, data.few_shot)
    assert len(ids) == 67
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nPut the final answer in \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is 5 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n5 + 2 = 7\n\\boxed{7}<|im_end|>\n"
        "<|im_start|>user\nWhat is 67 - 57?<|im_end|>\n<|im_start|>assistant\n"
    )
