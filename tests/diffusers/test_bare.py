"""``unet.set_attn_processor(ToDoProcessor())`` without ``apply_todo``."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from todo_attn import ToDoConfig, ToDoProcessor, apply_todo, remove_todo
from todo_attn.diffusers import grid


def capped(tokens):
    """The default with few keys, so that small images exceed it."""
    return ToDoProcessor(ToDoConfig(max_kv_tokens=tokens))


def smallest_factor(height, width, cap):
    return next(f for f in range(1, 100) if (height // f) * (width // f) <= cap)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_it_works_alone_at_any_size(make_unet, call, reference, caplog, kind):
    """9 x 16 is 16:9 and as many tokens as 12 x 12; one model takes them one after the other."""
    unet, other = make_unet(kind), make_unet(kind)
    unet.set_attn_processor(capped(40))
    for size in [(9, 16), (12, 12), (16, 9), (13, 22), (6, 6), (9, 16)]:
        grid_of = {level: (-(-size[0] // level), -(-size[1] // level)) for level in (1, 2, 4)}
        factors = {level: smallest_factor(*of, 40) for level, of in grid_of.items()}
        with reference(other, size, factors):
            assert (call(unet, size) - call(other, size)).abs().max() < 1e-5, size
    assert "not known" not in caplog.text


def test_the_real_cap_at_16_9(make_unet, call, reference):
    """90 x 160 tokens, 1280 x 720 pixels in Stable Diffusion: 14400 = 120 * 120 tokens, and factor 2."""
    unet = make_unet("small")
    unet.set_attn_processor(ToDoProcessor())
    actual = call(unet, (90, 160), batch=1)
    with reference(unet, (90, 160), {1: 2}):
        assert (actual - call(unet, (90, 160), batch=1)).abs().max() < 1e-5


def test_under_the_cap_it_is_bit_equal_to_dense(unet, call):
    dense = call(unet)
    unet.set_attn_processor(ToDoProcessor())
    assert torch.equal(call(unet), dense)


def test_the_model_is_looked_up_once(unet, call, monkeypatch):
    looked_up = []

    def counting(attn, tokens):
        looked_up.append(attn)
        return adopt(attn, tokens)

    adopt = grid.adopt_from_call_stack
    monkeypatch.setattr("todo_attn.diffusers.processor.adopt_from_call_stack", counting)
    unet.set_attn_processor(ToDoProcessor())
    for size in [(8, 8), (16, 4)]:
        call(unet, size)
    assert len(looked_up) == 1


def test_below_hooks_checkpoints_and_subclasses(unet, call, reference):
    """Other frames between the transformer and the attention do not matter."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    with reference(unet, (16, 16), {1: 3, 2: 2}):
        expected = call(unet)
    for module in list(unet.modules()):
        if type(module).__name__ in ("Transformer2DModel", "BasicTransformerBlock", "Attention"):
            add_hook_to_module(module, ModelHook())
    unet.train().enable_gradient_checkpointing()
    unet.set_attn_processor(capped(40))
    with torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 8, generator=generator)
        out = unet(sample.requires_grad_(), 500, text).sample
        assert (out.detach() - expected).abs().max() < 1e-5
        out.square().sum().backward()
    assert sample.grad.isfinite().all()


def test_an_image_is_its_own_grid(pipe, monkeypatch):
    """A VAE's attention gets images: 72 x 60 latents are 4320 tokens, read as 36 x 30."""
    reads = []
    attn = pipe.vae.decoder.mid_block.attentions[0]
    attn.to_k.register_forward_hook(lambda module, args, out: reads.append(args[0].shape[1]))
    attn.set_processor(ToDoProcessor())
    with torch.no_grad():
        pipe.vae.decode(torch.randn(1, 4, 72, 60))
        pipe.vae.decode(torch.randn(1, 4, 40, 60))
    assert reads == [36 * 30, 40 * 60]


def test_where_no_grid_can_be_known_it_is_dense_and_says_so_once(unet, call, caplog):
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 14400, 8)  # a square number that must not be taken for a square
    with torch.no_grad():
        dense = attn(x[:, :4900])
        processor = ToDoProcessor()
        attn.set_processor(processor)
        for _ in range(3):
            assert torch.equal(attn(x[:, :4900]), dense)
    assert [(r.name, r.levelname) for r in caplog.records] == [("todo_attn", "WARNING")]
    assert "apply_todo" in caplog.text


def test_another_attention_of_the_transformer_is_not_taken_for_attn1(unet, call, caplog):
    """GLIGEN's fuser attends over image and object tokens together, inside the same transformer."""
    expected = call(unet)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    fuser = block.attn1

    class Attn1(torch.nn.Module):
        only = fuser

        def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return self.only(hidden_states)

    block.attn1 = Attn1()
    fuser.set_processor(capped(10))
    assert torch.equal(call(unet), expected)
    assert "apply_todo" in caplog.text


def test_removing_it_gives_diffusers_default_processors(make_unet, call, hooks):
    unet = make_unet()
    dense = call(unet, (80, 80), batch=1)
    unet.set_attn_processor(ToDoProcessor())
    call(unet, (80, 80), batch=1)
    assert hooks(unet) > 0
    remove_todo(unet)
    assert hooks(unet) == 0
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert torch.equal(call(unet, (80, 80), batch=1), dense)


def test_removing_respects_scale_qk(unet):
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.scale_qk, attn.scale = False, 1.0
    unet.set_attn_processor(ToDoProcessor())
    remove_todo(unet)
    assert type(attn.processor) is AttnProcessor


def test_apply_todo_takes_over(unet, call, hooks, reference):
    unet.set_attn_processor(ToDoProcessor())
    call(unet, (8, 8))
    apply_todo(unet, ToDoConfig(factor=2))
    actual = call(unet)
    remove_todo(unet)
    assert hooks(unet) == 0
    assert not any(isinstance(p, ToDoProcessor) for p in unet.attn_processors.values())
    with reference(unet, (16, 16), {1: 2, 2: 2, 4: 2}):
        assert (actual - call(unet)).abs().max() < 1e-5


def test_after_apply_todo_it_keeps_to_that_configuration(unet, call):
    before = dict(unet.attn_processors)
    apply_todo(unet, ToDoConfig(factor=2))
    expected = call(unet)
    unet.set_attn_processor(ToDoProcessor())
    assert torch.equal(call(unet), expected)
    remove_todo(unet)
    after = unet.attn_processors
    assert all(after[name] is before[name] for name in before if ".attn1." in name)
    assert not any(isinstance(p, ToDoProcessor) for p in after.values())
