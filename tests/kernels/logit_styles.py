"""Rows of logits on which a selection can go wrong."""

import torch


def logits_of(style, rows, vocabulary, dtype=torch.float32):
    x = 3 * torch.randn(rows, vocabulary)
    if style == "peaked":
        x[:, vocabulary // 2] += 60
    elif style == "equal":
        x[:] = 1.5
    elif style == "integers":  # many ties
        x = x.round()
    elif style == "signed zeros":  # all tied, though the bits differ
        x = torch.where(x > 0, 0.0, -0.0)
    elif style == "masked":
        x[torch.rand(rows, vocabulary) < 0.9] = -torch.inf
        x[:, -1] = 0.5
    elif style == "one":
        x[:, :-1] = -torch.inf
    elif style == "negative":  # a zero out of nowhere would win
        x -= 100
    return x.to(dtype)
