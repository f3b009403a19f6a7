"""The second task of the text encoder: what it measures, and that its gradient tells left from right."""

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from examples.landscapes import naming, train
from examples.landscapes.model import tokenize, write_tokenizer
from examples.landscapes.scenes import MOUNTAINS, random_scene

WIDTHS = (8, 16, 32, 32)


@pytest.fixture
def tokenizer(tmp_path) -> CLIPTokenizer:
    return write_tokenizer(tmp_path)


def pooled(model, tokenizer, captions):
    return model["unet"].add_embedding(model["text_encoder"](tokenize(tokenizer, captions))[0])


def test_heads_that_know_nothing_cost_the_logarithm_of_their_choices(tokenizer):
    model = train.build_model(tokenizer, WIDTHS, None)
    heads = naming.build_heads(4 * WIDTHS[0])
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    loss, _ = naming.naming_loss(model, heads, tokenizer, np.random.default_rng(0))
    choices = [len(values) for values in naming.ATTRIBUTES.values()]
    assert loss.item() == pytest.approx(sum(np.log(choices)), rel=1e-5)


def test_right_answers_are_counted_of_the_place(tokenizer):
    model, heads = train.build_model(tokenizer, WIDTHS, None), naming.build_heads(4 * WIDTHS[0])
    torch.nn.init.zeros_(heads["place"].weight)
    heads["place"].bias.data.copy_(torch.tensor([0.0, 9.0, 0.0]))
    _, share = naming.naming_loss(model, heads, tokenizer, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    places = [random_scene(rng).place for _ in range(naming.CAPTIONS)]
    assert share == pytest.approx(places.count("center") / naming.CAPTIONS)


def test_it_sets_left_and_right_apart(tokenizer):
    torch.manual_seed(0)
    model, heads = train.build_model(tokenizer, WIDTHS, None), naming.build_heads(4 * WIDTHS[0])
    optimizer = torch.optim.AdamW([*model["text_encoder"].parameters(), *heads.parameters()], 3e-3)
    optimizer.add_param_group({"params": list(model["unet"].add_embedding.parameters())})
    rng, shares = np.random.default_rng(0), []
    for _ in range(150):
        loss, share = naming.naming_loss(model, heads, tokenizer, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(share)
    assert np.mean(shares[:10]) < 0.5 and np.mean(shares[-10:]) > 0.95
    sides = [f"{MOUNTAINS[0]} by day with a lake, a clear sky, the sun on the {side}" for side in ("left", "right")]
    left, right = pooled(model, tokenizer, sides)
    assert (left - right).norm() > 0.1 * left.norm()
