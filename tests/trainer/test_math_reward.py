"""The mathematical reward: what a box holds, and what counts as equal."""

import pytest

from softgrpo.rewards import extract_answer, math_reward, normalise_answer


def score(*completions, answer):
    return math_reward(["q"] * len(completions), list(completions), answer=list(answer))


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so \boxed{7}", "7", 1.0),
        (r"so \boxed{8}", "7", 0.0),
        ("the answer is 7", "7", 0.0),  # no box
        (r"\boxed{7} or \boxed{8}", "8", 1.0),  # the last box counts
        (r"\boxed{7} or \boxed{8}", "7", 0.0),
        (r"\boxed{7} and \boxed{8", "7", 0.0),  # the last one is not closed
        (r"\boxed{}", "7", 0.0),
        (r"\boxed{-37}", "-37", 1.0),
        (r"\boxed{37}", "-37", 0.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\dfrac{2}{4}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\sqrt{2}/2}", r"$\frac{1}{\sqrt{2}}$", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{x^2+2x+1}", r"the answer is \boxed{(x+1)^2}", 1.0),
        # Gold first: an assignment is unwrapped where the gold answer has none, not otherwise.
        (r"\boxed{x=5}", "5", 1.0),
        # What is left to compute is no answer, where that is an integer.
        (r"16 + 70 = 86 \boxed{16 + 70}", "86", 0.0),
        (r"\boxed{36 - 38}", "-2", 0.0),
        (r"\boxed{x = 2 \times (3+4)}", "14", 0.0),
        (r"\boxed{2\left(3+4\right) - 4 \div 2}", "12", 0.0),
        (r"\boxed{14/2}", "7", 0.0),
        (r"\boxed{16\,+\,70}", "86", 0.0),
        (r"\boxed{3 + 4 = 7}", "7", 1.0),
        (r"\boxed{-(7)}", "-7", 1.0),
        (r"\boxed{2^{10}}", "1024", 1.0),
        (r"\boxed{1 \times 10^3}", "1000", 1.0),
        (r"\boxed{7 / 2}", "3.5", 1.0),
        (r"\boxed{50\%}", "50", 1.0),
    ],
)
def test_math_reward(completion, answer, reward):
    assert score(completion, answer=[answer]) == [reward]


def test_math_reward_of_chat_completions():
    chat = [{"role": "assistant", "content": r"\boxed{7}"}]
    assert score(chat, r"\boxed{6}", answer=["7", "7"]) == [1.0, 0.0]


def test_an_answer_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="the answer '' cannot be read"):
        score(r"\boxed{7}", answer=[""])


def test_answers_in_normal_form_for_voting():
    assert extract_answer(r"\boxed{007}") == extract_answer(r"\boxed{7}") == normalise_answer("7")
    assert extract_answer(r"\boxed{\frac12}") == normalise_answer("1/2")
    assert extract_answer("7") is None
    assert extract_answer(r"\boxed{}") is None
