"""Cross-entropy to mixtures: against plain PyTorch, and against transformers' model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from softgrpo.supervised.loss import PackedTraces, cross_entropy
from softgrpo.supervised.traces import Trace
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.weights import load_weights


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def models(request, hf_config):
    """transformers' model, and our decoder with its weights."""
    torch.manual_seed(0)
    config = hf_config(tie_word_embeddings=request.param)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    decoder = Decoder(DecoderConfig.from_hf(config)).train()
    load_weights(decoder, iter(theirs.state_dict().items()))
    return theirs, decoder


def mixtures(generator, positions, slots, vocabulary=23):
    """ids and weights of random mixtures of 1 to `slots` tokens, the heaviest first."""
    ids = torch.stack(
        [torch.randperm(vocabulary, generator=generator)[:slots] for _ in range(positions)]
    )
    weights = torch.rand(positions, slots, generator=generator).sort(-1, descending=True)[0]
    used = torch.arange(slots) < torch.randint(1, slots + 1, (positions, 1), generator=generator)
    weights = torch.where(used, weights, 0.0)
    return torch.where(used, ids, -1).int(), weights / weights.sum(-1, keepdim=True)


@pytest.fixture
def traces():
    """Of several lengths and slots, one with positions that are not trained."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for prompt, positions, slots in ((3, 5, 4), (6, 1, 1), (1, 7, 2), (4, 4, 1)):
        ids, weights = mixtures(generator, positions, slots)
        prompt_ids = torch.randint(23, (prompt,), generator=generator).int()
        trained = torch.ones(positions, dtype=torch.bool)
        trained[1:3] = slots != 2
        made.append(Trace(prompt_ids, ids, weights, trained))
    return made


def dense(trace, dtype):
    """What is read and what is predicted, both as distributions [.., V]."""

    def rows(ids, weights):
        out = torch.zeros(len(ids), 23, dtype=dtype)
        return out.scatter_add(1, ids.clamp(min=0).long(), weights.to(dtype) * (ids >= 0))

    prompt = rows(trace.prompt_ids[:, None], torch.ones(len(trace.prompt_ids), 1))
    target = rows(trace.ids, trace.weights)
    return torch.cat([prompt, target[:-1]]), target


def plain_losses(model, traces):
    """Of the trained positions, by transformers' model over a padded batch: [P]."""
    dtype = model.lm_head.weight.dtype
    pairs = [dense(trace, dtype) for trace in traces]
    width = max(len(read) for read, _ in pairs)
    read_BTV = torch.stack(
        [torch.nn.functional.pad(read, (0, 0, 0, width - len(read))) for read, _ in pairs]
    )
    mask_BT = torch.tensor([[i < len(read) for i in range(width)] for read, _ in pairs])
    logits = model(
        inputs_embeds=read_BTV @ model.get_input_embeddings().weight, attention_mask=mask_BT.long()
    ).logits
    losses = []
    for logits_TV, trace, (read, target) in zip(logits, traces, pairs, strict=True):
        logq = logits_TV[len(trace.prompt_ids) - 1 : len(read)].log_softmax(-1)
        losses.append(-(target * logq).sum(-1)[trace.trained])
    return torch.cat(losses)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients_are_those_of_a_padded_batch(models, traces, dtype):
    theirs, decoder = (model.to(dtype) for model in models)
    expected = plain_losses(theirs, traces)
    losses, _ = cross_entropy(decoder, PackedTraces.of(traces), dtype)
    assert losses.dtype == dtype
    # In float64 too the norms of transformers, and everybody's RoPE, are float32.
    close = {"rtol": 1e-5, "atol": 1e-6 if dtype == torch.float64 else 5e-6}
    torch.testing.assert_close(losses, expected, **close)
    ours, wanted = gradients(losses.mean(), decoder), gradients(expected.mean(), theirs)
    assert ours.keys() == wanted.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], wanted[name], **close)
        assert ours[name].abs().max() > 0


def test_a_mixture_of_one_is_a_token(models, traces):
    """Its loss is the cross-entropy of PyTorch, to the last bit that of the token alone."""
    _, decoder = models
    tokens = [Trace(t.prompt_ids, t.ids[:, :1], torch.ones(len(t.ids), 1), t.trained)
              for t in traces]  # fmt: skip
    wide = [
        Trace(
            t.prompt_ids,
            torch.nn.functional.pad(t.ids, (0, 3), value=-1),
            torch.nn.functional.pad(t.weights, (0, 3)),
            t.trained,
        )
        for t in tokens
    ]
    alone, right = cross_entropy(decoder, PackedTraces.of(tokens), torch.float32)
    padded, same = cross_entropy(decoder, PackedTraces.of(wide), torch.float32)
    assert torch.equal(alone, padded)
    assert right == same
    theirs, labels, hits = [], [], 0
    for trace in tokens:
        ids = torch.cat([trace.prompt_ids, trace.ids[:, 0]]).long()
        logits = models[0](ids[None, :-1]).logits[0, len(trace.prompt_ids) - 1 :][trace.trained]
        labels = trace.ids[trace.trained, 0].long()
        theirs.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        hits += int((logits.argmax(-1) == labels).sum())
    torch.testing.assert_close(alone, torch.cat(theirs), rtol=1e-5, atol=5e-6)
    assert int(right) == hits


def test_accuracy_is_that_of_positions_with_one_token(models, traces):
    theirs, decoder = models
    packed = PackedTraces.of(traces)
    _, right = cross_entropy(decoder, packed, torch.float32)
    tokens = torch.cat([(trace.ids >= 0).sum(-1)[trace.trained] == 1 for trace in traces])
    assert packed.tokens.tolist() == tokens.nonzero()[:, 0].tolist()
    with torch.no_grad():
        hits = 0
        for trace in traces:
            read, _ = dense(trace, torch.float32)
            embeds = (read @ theirs.get_input_embeddings().weight)[None]
            logits = theirs(inputs_embeds=embeds).logits[0, len(trace.prompt_ids) - 1 :]
            one = ((trace.ids >= 0).sum(-1) == 1) & trace.trained
            hits += int((logits.argmax(-1) == trace.ids[:, 0])[one].sum())
    assert int(right) == hits


def test_the_loss_is_at_least_the_entropy(models, traces):
    packed = PackedTraces.of(traces)
    losses, _ = cross_entropy(models[1], packed, torch.float32)
    weights = torch.cat([t.weights[t.trained].flatten() for t in traces]).double()
    assert packed.entropy == pytest.approx(float(-(weights * weights.log()).nansum()))
    assert 0 < packed.entropy < float(losses.detach().sum())


def test_passes_add_up(models, traces):
    """The gradient of two passes is that of one over all traces."""
    _, decoder = models
    whole, _ = cross_entropy(decoder, PackedTraces.of(traces), torch.float32)
    expected = gradients(whole.sum(), decoder)
    decoder.zero_grad()
    for part in (traces[:1], traces[1:]):
        cross_entropy(decoder, PackedTraces.of(part), torch.float32)[0].sum().backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_with_master_weights_in_float32(models, traces):
    _, decoder = models
    exact, _ = cross_entropy(decoder, PackedTraces.of(traces), torch.float32)
    rounded, _ = cross_entropy(decoder, PackedTraces.of(traces), torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1
    rounded.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in decoder.parameters())
