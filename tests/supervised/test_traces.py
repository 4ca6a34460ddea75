"""Rows as traces: every form of a target, and one line for everything that is wrong."""

import pytest

from softgrpo.config.supervised import SupervisedDataConfig
from softgrpo.data.sources import DataError
from softgrpo.supervised.traces import load_traces
from softgrpo_engine.model.config import DecoderConfig

A, B, C, END = 3, 4, 5, 1  # n0, n1, n2, </s>


@pytest.fixture
def read(tokenizer, hf_config):
    """read(row, **data): the trace of a row."""

    def traces(row, eos=1, **data):
        model = DecoderConfig.from_hf(hf_config(eos_token_id=eos))
        rows = [row] if isinstance(row, dict) else row
        return load_traces(rows, "a.jsonl", SupervisedDataConfig(**data), tokenizer, model)[0]

    return traces


def test_positions_of_every_form(read):
    target = ["n0", B, {"n0": 1, "n1": 3}, [[C, 2.0], ["n0", 1], [B, 5]], "</s>"]
    trace = read({"prompt_ids": [A, B], "target": target, "colour": "red"})
    assert trace.prompt_ids.tolist() == [A, B]
    assert trace.ids.tolist() == [
        [A, -1, -1], [B, -1, -1], [B, A, -1], [B, C, A], [END, -1, -1]
    ]  # fmt: skip
    assert trace.weights.tolist() == [
        [1, 0, 0], [1, 0, 0], [0.75, 0.25, 0], [0.625, 0.25, 0.125], [1, 0, 0]
    ]  # fmt: skip
    assert trace.trained.all()
    assert len(trace) == 6


def test_text_ends_the_sequence(read):
    trace = read({"prompt": "n0 n1", "target": "n2 n0"})
    assert trace.prompt_ids.tolist() == [A, B, 2]  # by the chat template
    assert trace.ids.tolist() == [[C], [A], [END]]
    assert read({"prompt_ids": [A], "target": ""}).ids.tolist() == [[END]]


def test_prompts_are_those_of_reinforcement_learning(read):
    messages = [{"role": "user", "content": "n1"}]
    trace = read({"prompt": messages, "target": [A]}, system_prompt="n0")
    assert trace.prompt_ids.tolist() == [A, B, 2]


def test_a_loss_mask_leaves_positions_out(read):
    trace = read({"prompt_ids": [A], "target": [A, B, C], "loss_mask": [0, 0, 1]})
    assert trace.trained.tolist() == [False, False, True]


def test_weights_of_any_size_are_normalised(read):
    trace = read({"prompt_ids": [A], "target": [{"n0": 1.5e308, "n1": 1.5e308}]})
    assert trace.weights.tolist() == [[0.5, 0.5]]


def row(**changes):
    return {"prompt_ids": [A], "target": [A], **changes}


BAD = {
    "no prompt": ({"target": "n0"}, "needs prompt or prompt_ids"),
    "two prompts": (row(prompt="n0"), "one of them"),
    "prompt of no text": ({"prompt": 7, "target": "n0"}, "must be text or chat messages"),
    "prompt_ids of no ids": (row(prompt_ids=["n0"]), "must be a list of token ids"),
    "empty prompt": (row(prompt_ids=[]), "must be a list of token ids"),
    "no target": ({"prompt_ids": [A]}, "target must be text or a list of positions, got None"),
    "empty target": (row(target=[]), "target must be text or a list of positions"),
    "two tokens": (row(target=["n0 n1"]), "target[0]: 'n0 n1' is 2 tokens"),
    "unknown text": (row(target=["n0", "n20"]), "target[1]: 'n20' is not in the vocabulary"),
    "id too large": (row(target=[23]), "token 23: the model has 0 .. 22"),
    "negative id": (row(prompt_ids=[-1]), "token -1"),
    "token of no kind": (row(target=[1.5]), "a text or an id, got 1.5"),
    "bool": (row(target=[True]), "a text or an id, got True"),
    "weight 0": (row(target=[{"n0": 0}]), "the weight of 'n0' must be > 0"),
    "weight no number": (row(target=[{"n0": "1"}]), "the weight of 'n0' must be > 0"),
    "weight nan": (row(target=[{"n0": float("nan")}]), "must be > 0 and finite"),
    "twice": (row(target=[[["n0", 1], [A, 1]]]), "3 (token 3) stands there twice"),
    "no pair": (row(target=[["n0", "n1"]]), "a mixture is {token: weight} or [[token"),
    "empty mixture": (row(target=[{}]), "a mixture has 1 to 64 tokens, this one 0"),
    "large mixture": (row(target=[[[A, 1]] * 65]), "this one 65"),
    "mask of another length": (row(loss_mask=[1, 0]), "one for each of the 1 positions"),
    "mask of numbers": (row(loss_mask=[0.5]), "loss_mask must be a list of 0 and 1"),
    "mask of nothing": (row(loss_mask=[0]), "leaves nothing to learn"),
    "too long for the model": (row(target=[A] * 64), "65 tokens, the model's context is 64"),
    "no rows": ([], "a.jsonl: the dataset is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_line(case, read):
    wrong, expected = BAD[case]
    with pytest.raises(DataError) as error:
        read(wrong)
    message = str(error.value)
    assert expected in message
    assert message.startswith("a.jsonl, row 0: " if wrong else "a.jsonl: ")
    assert "\n" not in message


def test_too_long_for_the_setting(read):
    with pytest.raises(DataError, match=r"3 tokens, data.max_tokens is 2"):
        read(row(target=[A, B]), max_tokens=2)


def test_a_text_needs_an_end_at_which_generation_stops(read):
    with pytest.raises(DataError, match="make them agree"):
        read({"prompt": "n0", "target": "n1"}, eos=2)
    read({"prompt": "n0", "target": ["n1"]}, eos=2)
