"""A whole vision-language model: Gemma 4, tiny, with an image among its tokens."""

import pytest
import torch

from normfuse.passes.recorder import Place
from normfuse.testing import capture

transformers = pytest.importorskip("transformers")

IMAGE = 60  # the token whose embedding is replaced by a part of the image


def gemma4():
    """One layer of text and one of vision, random weights."""
    widths = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    text = {
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 0,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        **widths,
    }
    vision = {
        "num_hidden_layers": 1,
        "patch_size": 2,
        "pooling_kernel_size": 2,
        "position_embedding_size": 16,
        **widths,
    }
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=61,
        audio_token_id=62,
        boi_token_id=58,
        eoi_token_id=59,
    )
    return transformers.Gemma4ForConditionalGeneration(config).eval().bfloat16()


def text_with_an_image():
    """Sixteen patches of 2 x 2 pixels, which become four tokens."""
    ids = torch.tensor([[1, 2, 58, IMAGE, IMAGE, IMAGE, IMAGE, 59, 5, 6]])
    axis = torch.arange(4)
    positions = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, 16, 2)
    return {
        "input_ids": ids,
        "pixel_values": torch.rand(1, 16, 3 * 2 * 2),
        "image_position_ids": positions,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "use_cache": False,
    }


def surface(model):
    """What others know a model by: names, types, and the tensors themselves."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()],
        {name: set(vars(module)) for name, module in model.named_modules()},
    )


@pytest.mark.guarantee
@torch.no_grad()
def test_language_and_vision_are_rewritten_and_the_model_stays_as_it_is():
    model, inputs, places = gemma4(), text_with_an_image(), set()

    def note_places(graph):
        places.update(
            Place.of(node).module for node in graph.nodes if "normfuse" in str(node.target)
        )

    expected = model(**inputs).logits
    compiled = capture(model, lowering="op", post_grad_custom_post_pass=note_places)
    before = surface(model)

    assert torch.equal(compiled(**inputs).logits, expected)
    assert surface(model) == before
    assert list(model.state_dict()) == [name for name, _ in before[1]]
    for part in ("encoder.layers.0.", "language_model.layers.0."):  # of vision, of language
        assert any(place.startswith(part) for place in places), places
