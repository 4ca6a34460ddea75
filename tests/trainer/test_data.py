"""Datasets of every kind, the order of training, and one clear line for every mistake."""

import json
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pyarrow
import pyarrow.parquet
import pytest
from chat_tokenizer import ChatTokenizer, text_of

from softgrpo.config import Config
from softgrpo.config.sections import DataConfig
from softgrpo.data.examples import Example, load_examples
from softgrpo.data.sources import DataError
from softgrpo.data.training import TrainingData, round_indices
from softgrpo.distributed import World

ROWS = [
    {"prompt": "What is 1 + 1?", "answer": "2", "level": 1},
    {"prompt": "What is 2 + 2?", "answer": 4, "level": 2},
]
CHAIN_SUM = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&size=20"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def failure(spec, **data):
    with pytest.raises(DataError) as error:
        load_examples(str(spec), DataConfig(**data))
    assert "\n" not in str(error.value)
    return str(error.value)


def config(train, *overrides):
    """The demo configuration on other data."""
    return Config.load("demo", [f"data.train={train}", "data.prompt_template=null", *overrides])


# --- files ------------------------------------------------------------------------------------


def test_jsonl_json_and_parquet_give_the_same_examples(tmp_path):
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [
        Example("What is 1 + 1?", "2", {"answer": "2", "level": 1}),
        Example("What is 2 + 2?", "4", {"answer": "4", "level": 2}),
    ]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert load_examples(str(tmp_path / name), DataConfig()) == expected


def test_a_line_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "What?", "answer": "2"}\n{"prompt": "caf\xe9", "answer": "2"}\n')
    assert f"{path}, line 2: not JSON" in failure(path)


def test_named_columns_and_templates(tmp_path):
    rows = [{"q": "1 + 1", "gold": 2, "unit": "m"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = DataConfig(prompt_key="q", answer_key="gold", prompt_template="{q} in {unit}, \\boxed{}")
    (example,) = load_examples(path, data)
    assert example.prompt == "1 + 1 in m, \\boxed{}"
    assert example.answer == "2"
    assert example.columns["gold"] == 2
    assert example.columns["answer"] == "2"
    leak = failure(path, prompt_key="q", answer_key="gold", prompt_template="{gold}")
    assert "no column 'gold' (data.prompt_template); columns: q, unit" in leak


def test_the_layout_of_verl_is_recognised(tmp_path):
    """The schema that verl's examples/data_preprocess/gsm8k.py writes."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": 'What is 1 + 1? Answer after "####".'}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {
                "split": "train",
                "index": 0,
                "answer": "1 + 1 = 2 #### 2",
                "question": "What is 1 + 1?",
            },
        }
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (example,) = load_examples(str(tmp_path / "a.parquet"), DataConfig())
    assert example.prompt == rows[0]["prompt"]
    assert example.answer == "2"
    columns = {key: value for key, value in rows[0].items() if key != "prompt"}
    assert example.columns == {**columns, "answer": "2"}


def test_the_layouts_of_trl_are_recognised(tmp_path):
    """`prompt` as text or as messages, and whatever columns the rewards ask for."""
    standard = {"prompt": "The sky is", "ground_truth": "blue", "level": 3}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"}]
    conversational = {"prompt": turns, "ground_truth": "blue", "level": 3}
    data = DataConfig(answer_key=None)
    for name, row in (("a", standard), ("b", conversational)):
        table = pyarrow.Table.from_pylist([row])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
        for file in (f"{name}.parquet", f"{name}.jsonl"):
            (example,) = load_examples(str(tmp_path / file), data)
            columns = {"ground_truth": "blue", "level": 3}
            assert example == Example(row["prompt"], "", columns)
    named = DataConfig(answer_key="ground_truth")
    (example,) = load_examples(str(tmp_path / "b.jsonl"), named)
    assert example.columns == {"ground_truth": "blue", "level": 3, "answer": "blue"}
    assert failure(tmp_path / "a.jsonl").endswith(
        "no column 'answer' (data.answer_key); columns: prompt, ground_truth, level; "
        "data.answer_key=null where no reward needs one"
    )


def test_mistakes_in_files(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert failure(tmp_path / "no.jsonl") == f"no such file: {tmp_path / 'no.jsonl'}"
    assert failure(path, prompt_key="question") == (
        f"{path}, example 0: no column 'question' (data.prompt_key); columns: prompt, answer, level"
    )
    assert "no column 'gold' (data.answer_key); columns: prompt" in failure(path, answer_key="gold")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert failure(tmp_path / "empty.jsonl").endswith("the dataset is empty")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": \n')
    assert "broken.jsonl, line 3: not JSON (" in failure(tmp_path / "broken.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    assert "list.jsonl, line 1: not a JSON object" in failure(tmp_path / "list.jsonl")
    (tmp_path / "object.json").write_text("{}")
    assert "not a JSON list of objects" in failure(tmp_path / "object.json")
    (tmp_path / "bad.parquet").write_text("no parquet")
    assert "bad.parquet: not a parquet file" in failure(tmp_path / "bad.parquet")
    assert "is no dataset: give reasoning_gym:NAME" in failure("train.csv")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "", "answer": "1"}, "the prompt must be text or chat messages, got ''"),
        ({"prompt": 3, "answer": "1"}, "the prompt must be text or chat messages, got 3"),
        ({"prompt": ["hi"], "answer": "1"}, "needs role and content"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}, "the last of role"),
        ({"prompt": "a", "answer": None}, "the answer must be text or a number, got None"),
    ],
)
def test_mistakes_in_rows_name_the_row(tmp_path, row, expected):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], row])
    error = failure(path)
    assert f"{path}, example 1: " in error
    assert expected in error


# --- the hub ----------------------------------------------------------------------------------


def test_hub_datasets(monkeypatch):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        if name == "org/offline":
            raise ConnectionError("cannot\nreach the hub")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(load_examples("org/name", DataConfig())) == 2
    assert len(load_examples("org/name:test[:5]", DataConfig())) == 2
    assert calls == [("org/name", "train"), ("org/name", "test[:5]")]
    assert failure("org/offline").startswith(
        "cannot load org/offline from the hub (cannot reach the hub); check the name"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert failure("org/name").endswith("hub datasets need: pip install 'softgrpo[datasets]'")


# --- reasoning_gym ----------------------------------------------------------------------------


@pytest.mark.demo
def test_reasoning_gym_items_with_parameters_and_template():
    spec = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=9&seed=5"
    examples = load_examples(spec, DataConfig(prompt_template="What is {expression}?"))
    assert len(examples) == 9
    for example in examples:
        expression = example.columns["expression"]
        assert example.prompt == f"What is {expression}?"
        assert int(example.answer) == eval(expression)
        assert example.columns["answer"] == example.answer
        assert expression in example.columns["question"]
    shifted = load_examples(spec.replace("seed=5", "seed=6"), DataConfig())
    assert [e.answer for e in shifted[:-1]] == [e.answer for e in examples[1:]]


@pytest.mark.demo
def test_reasoning_gym_without_a_seed_is_reproducible():
    assert load_examples(CHAIN_SUM, DataConfig()) == load_examples(CHAIN_SUM, DataConfig())


@pytest.mark.demo
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("chain_sun", "no task 'chain_sun'; did you mean 'chain_sum'?"),
        ("chain_sum?min_term=2", "chain_sum has no parameter 'min_term'; did you mean 'min_terms'"),
        ("chain_sum?min_terms=3&max_terms=2", "max_terms must be >= min_terms"),
        ("chain_sum?min_terms=two", "not supported between instances of 'str' and 'int'"),
        ("chain_sum?min_terms", "'min_terms' is not of the form key=value"),
        ("chain_sum?size=[1", "cannot read the value of 'size=[1'"),
    ],
)
def test_mistakes_in_reasoning_gym_specs(spec, expected):
    error = failure(f"reasoning_gym:{spec}")
    assert error.startswith(f"reasoning_gym:{spec}: ")
    assert expected in error


def test_reasoning_gym_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    assert failure(CHAIN_SUM).endswith("needs reasoning-gym: pip install 'softgrpo[demo]'")


@pytest.mark.demo
def test_what_reasoning_gym_needs_is_not_installed(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zss", None)
    assert "softgrpo[demo]' (import of zss halted" in failure(CHAIN_SUM)


@pytest.mark.demo
def test_the_demo_data_is_held_out_and_without_the_worked_example():
    data = TrainingData(Config.load("demo"))
    held_out = {example.text for example in data.held_out}
    assert len(data.held_out) == 64
    assert not held_out & {example.text for example in data.train}
    assert data.removed + len(data.train) == 10_000
    assert data.removed > 0
    (shot,) = data.config.data.few_shot
    assert shot.prompt in {e.text for e in load_examples(data.config.data.eval, data.config.data)}
    assert shot.prompt not in held_out | {example.text for example in data.train}


# --- what training takes ---------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_found_before_the_run(tmp_path):
    rows = [*ROWS, {"prompt": "x" * 300, "answer": "1"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    overrides = ["data.eval=null", "data.few_shot=[]", "data.max_prompt_tokens=120"]
    data = TrainingData(config(path, *overrides))
    with pytest.raises(DataError, match=r"a\.jsonl, example 2: the prompt has \d+ tokens, data\."):
        data.prepare(ChatTokenizer())
    held_out = write_jsonl(tmp_path / "b.jsonl", [rows[2]])
    short = write_jsonl(tmp_path / "c.jsonl", ROWS)
    data = TrainingData(config(short, f"data.eval={held_out}", *overrides[1:]))
    with pytest.raises(DataError, match=r"b\.jsonl, example 0: the prompt has"):
        data.prepare(ChatTokenizer())


def test_long_training_prompts_can_be_left_out(tmp_path):
    rows = [ROWS[0], {"prompt": "x" * 300, "answer": "1"}, ROWS[1]]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    overrides = ["data.eval=null", "data.few_shot=[]", "data.drop_long_prompts=true"]
    data = TrainingData(config(path, *overrides, "data.max_prompt_tokens=120"))
    data.prepare(ChatTokenizer())
    assert [example.text for example in data.train] == [row["prompt"] for row in ROWS]
    assert data.too_long == 1
    none_left = TrainingData(config(path, *overrides, "data.max_prompt_tokens=2"))
    with pytest.raises(DataError, match=r"every prompt is longer than data\.max_prompt_tokens"):
        none_left.prepare(ChatTokenizer())


def test_a_prompt_that_cannot_be_encoded_is_named_where_long_ones_are_left_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    overrides = ["data.eval=null", "data.few_shot=[]", "data.drop_long_prompts=true"]
    tokenizer = ChatTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"a\.jsonl, example 0: the tokenizer has no chat templ"):
        TrainingData(config(path, *overrides)).prepare(tokenizer)


def test_processes_check_their_share_and_keep_what_one_keeps(tmp_path):
    """In two threads, each a process."""
    texts = ["a" * n for n in (3, 300, 7, 11, 250, 2, 9)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": t, "answer": "1"} for t in texts])
    overrides = ["data.eval=null", "data.few_shot=[]", "data.drop_long_prompts=true"]
    settings = config(path, *overrides, "data.max_prompt_tokens=120")
    one, both = TrainingData(settings), [TrainingData(settings) for _ in range(2)]
    (longest, _) = one.prepare(ChatTokenizer())
    values, barrier, seen = [None, None], Barrier(2), []

    class Process(World):
        def gather(self, value):
            values[self.rank] = value
            barrier.wait(30)
            seen.append(len(value.lengths))
            return list(values)

    with ThreadPoolExecutor(2) as threads:
        worlds = [Process(0, 2), Process(1, 2)]
        largest = list(threads.map(lambda d, w: d.prepare(ChatTokenizer(), w), both, worlds))
    assert sorted(seen) == [3, 4]
    assert largest[0] == largest[1]
    assert max(map(len, largest[0])) == len(longest)
    for data in both:
        assert data.train == one.train
        assert data.too_long == one.too_long == 2
    wrong = [TrainingData(config(path, *overrides[:2], "data.max_prompt_tokens=120")) for _ in "ab"]
    with ThreadPoolExecutor(2) as threads:
        pairs = zip(wrong, worlds, strict=True)
        errors = [threads.submit(data.prepare, ChatTokenizer(), w) for data, w in pairs]
    assert [str(e.exception()) for e in errors] == [str(errors[0].exception())] * 2
    assert "example 1: the prompt has" in str(errors[0].exception())


def test_held_out_texts_are_removed_from_training(tmp_path):
    train, held_out = write_jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "b.jsonl"
    write_jsonl(held_out, ROWS[1:])
    data = TrainingData(config(train, f"data.eval={held_out}"))
    assert [example.text for example in data.train] == ["What is 1 + 1?"]
    assert data.removed == 1
    with pytest.raises(DataError, match="every example is also held out in"):
        TrainingData(config(held_out, f"data.eval={held_out}"))


# --- order ------------------------------------------------------------------------------------


def test_the_order_is_a_pure_function_of_seed_and_step():
    size, count = 10, 4
    first = [round_indices(size, step, count, seed=7) for step in range(5)]
    assert first == [round_indices(size, step, count, seed=7) for step in range(5)]
    assert first != [round_indices(size, step, count, seed=8) for step in range(5)]
    stream = [index for step in first for index in step]
    # Two epochs of 10, the boundary inside step 2: each runs through everything, in its own order.
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert round_indices(3, 1, 4, seed=None) == [1, 2, 0, 1]  # a step longer than an epoch


def test_prompts_of_round(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    overrides = ["data.eval=null", "data.few_shot=[]", "data.shuffle=false"]
    data = TrainingData(config(path, *overrides))
    data.prepare(ChatTokenizer())
    prompts = data.prompts_of_round(1, 3)
    assert [p.example.answer for p in prompts] == ["4", "2", "4"]
    assert text_of(prompts[1].token_ids).endswith("<user>What is 1 + 1?<assistant>")
    assert data.eval_prompts() == []
