"""The decoder against transformers: every family, prefill and decode, and gradients."""

import pytest
import torch
from families import FAMILIES, SHAPE, make_pair
from transformers import AutoConfig

from softgrpo_engine.model.attention import PagedAttention
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.weights import load_weights, read_weights, save_pretrained
from softgrpo_engine.training.group_attention import GroupAttention


@pytest.fixture(params=FAMILIES)
def pair(request):
    return make_pair(request.param)


def paged(config, slots, seq_lens, query_starts, pages, page_size=4):
    per_sequence = pages[0].shape[1] // len(seq_lens)
    table = torch.arange(pages[0].shape[1], dtype=torch.int32).view(len(seq_lens), per_sequence)
    return PagedAttention(
        *pages,
        slot_mapping=slots,
        block_table=table,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        query_starts=query_starts,
        num_heads=config.num_heads,
    )


def test_packed_prefill_and_decode_equal_transformers(pair):
    theirs, ours = pair
    config = ours.config
    ours.pack()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 97, (n,), generator=generator) for n in (13, 1, 9)]
    expected = [theirs(x[None]).logits[0].detach() for x in ids]
    pages = [torch.full((3, 3 * 5, 2, 4, 8), float("nan")) for _ in range(2)]
    with torch.inference_mode():
        # All but the last token as one packed prefill (the second sequence has none) ...
        lens = [len(x) - 1 for x in ids]
        packed = torch.cat([x[:-1] for x in ids])
        positions = torch.cat([torch.arange(n) for n in lens])
        slots = torch.cat([torch.arange(n) + 20 * i for i, n in enumerate(lens)])
        starts = torch.tensor([0, 12, 12, 20], dtype=torch.int32)
        attention = paged(config, slots, lens, starts, pages)
        prefill = ours.logits(ours(ours.embed_weight[packed], positions, attention))
        # ... then one decode step for all three.
        last = torch.stack([x[-1] for x in ids])
        positions = torch.tensor(lens)
        slots = positions + 20 * torch.arange(3)
        attention = paged(config, slots, [n + 1 for n in lens], None, pages)
        decode = ours.logits(ours(ours.embed_weight[last], positions, attention))
    torch.testing.assert_close(prefill[:12], expected[0][:-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefill[12:], expected[2][:-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode, torch.stack([e[-1] for e in expected]), atol=1e-5, rtol=1e-5)


def test_packed_groups_equal_separate_sequences_with_gradients(pair):
    """[prompt | r1 | r2 | r3 (empty)], [prompt | r1]: logits and gradients as sample by sample."""
    theirs, ours = pair
    ours.train()
    generator = torch.Generator().manual_seed(2)

    def draw(n):
        return torch.randint(0, 97, (n,), generator=generator)

    groups = [(draw(7), [draw(5), draw(2), draw(0)]), (draw(3), [draw(6)])]
    packed = torch.cat([torch.cat([p, *r]) for p, r in groups])
    positions, rows, theirs_loss, row = [], [], 0.0, 0
    for prompt, responses in groups:
        positions.append(torch.arange(len(prompt)))
        row += len(prompt)
        for response in responses:
            positions.append(len(prompt) + torch.arange(len(response)))
            rows.append(torch.arange(row, row + len(response)))
            row += len(response)
            logits = theirs(torch.cat([prompt, response])[None]).logits[0, len(prompt) :]
            theirs_loss = theirs_loss + logits.square().sum()
    attention = GroupAttention(
        [len(p) for p, _ in groups], [[len(r) for r in rs] for _, rs in groups], 6, 2
    )
    embeds = torch.nn.functional.embedding(packed, ours.embed_weight)
    hidden = ours(embeds, torch.cat(positions), attention)
    loss = ours.logits(hidden[torch.cat(rows)]).square().sum()
    torch.testing.assert_close(loss, theirs_loss, rtol=1e-5, atol=0)
    loss.backward()
    theirs_loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = gradients[name].grad.abs().max()
        assert (parameter.grad - gradients[name].grad).abs().max() < 1e-5 * scale, name


def test_bf16_rounds_as_transformers_does():
    """Within the spread that bf16 itself gives against fp32."""
    theirs, ours = make_pair("llama-tied", torch.bfloat16)
    exact = make_pair("llama-tied")[0]
    load = {k: v.float() for k, v in theirs.state_dict().items()}
    exact.load_state_dict(load)
    ids = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        truth = exact(ids[None]).logits[0]
        attention = GroupAttention([40], [[]], 6, 2)
        ours.train()
        mine = ours.logits(ours(ours.embed_weight[ids], torch.arange(40), attention))
        error = (theirs(ids[None]).logits[0].float() - truth).abs().mean()
    assert (mine.float() - truth).abs().mean() < 1.2 * error


def test_unsupported_architecture_lists_the_supported_ones():
    config = AutoConfig.for_model("gpt2")
    config.architectures = ["GPT2LMHeadModel"]
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        DecoderConfig.from_hf(config)


def test_sliding_window_limits_the_context():
    config = AutoConfig.for_model("mistral", **SHAPE, sliding_window=32)
    config.architectures = ["MistralForCausalLM"]
    assert DecoderConfig.from_hf(config).max_position_embeddings == 32


def test_weights_that_do_not_fit_are_named():
    ours = Decoder(DecoderConfig.from_hf(AutoConfig.for_model("llama", **SHAPE)))
    with pytest.raises(ValueError, match="weights are missing"):
        load_weights(ours, iter(()))
    with pytest.raises(ValueError, match=r"model.norm.weight.*\[3\]"):
        load_weights(ours, iter([("model.norm.weight", torch.ones(3))]))


def test_a_fused_weight_is_the_memory_of_its_parts(hf_model, tmp_path, monkeypatch):
    """Where no other layout is faster: an update in place reaches it, packing again moves nothing,
    and the parts can still be saved."""
    monkeypatch.setattr("softgrpo_engine.model.projections.is_fastest", lambda dtype: False)
    ours = Decoder(DecoderConfig.from_hf(hf_model.config))
    load_weights(ours, iter(hf_model.state_dict().items()))
    ours.pack()
    addresses = [tensor.data_ptr() for tensor in ours.tensors()]
    (fused,) = ours.packed.layers[0].qkv.tensors()
    with torch.no_grad():
        ours.model.layers[0].self_attn.k_proj.weight.fill_(7.0)
    assert bool((fused[48:64] == 7.0).all())
    assert not bool((fused[:48] == 7.0).any())
    assert not bool((fused[64:] == 7.0).any())
    ours.pack()
    assert [tensor.data_ptr() for tensor in ours.tensors()] == addresses

    hf_model.save_pretrained(tmp_path / "source")
    weights = ours.named_parameters()
    save_pretrained(weights, tmp_path / "source", tmp_path / "target", torch.float32)
    saved = dict(read_weights(tmp_path / "target"))
    for name, parameter in ours.named_parameters():
        assert torch.equal(saved[name], parameter)
