"""Small vision-language models of transformers with random weights, and inputs for them."""

import copy
from dataclasses import dataclass, field

import torch
import transformers as tf

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(SIZES, hidden_size=16, num_attention_heads=2, image_size=16, patch_size=8)
LLAMA = dict(SIZES, vocab_size=64, num_key_value_heads=2, pad_token_id=0)
T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
T5 |= dict(decoder_start_token_id=0, feed_forward_proj="gated-gelu", dropout_rate=0.0)
QFORMER = dict(SIZES, encoder_hidden_size=16, vocab_size=64, hidden_dropout_prob=0.0)
QFORMER |= dict(attention_probs_dropout_prob=0.0, cross_attention_frequency=1)
OPT = dict(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, dropout=0.0)
OPT |= dict(num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)
IMAGE = 3  # token that stands for an image


@dataclass
class Family:
    """How to make one model and its inputs."""

    model: type
    config: object
    targets: object = None  # of `AdapterConfig`; None: the default
    inputs: dict = field(default_factory=dict)  # beside token ids and pixels
    image_tokens: int = 4  # places for one image in the text
    image: int = IMAGE
    pixels: tuple = (3, 16, 16)
    text: bool = True
    generates: bool = True
    implementation: str = "sdpa"


def _qwen():
    vision = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4)
    vision |= dict(temporal_patch_size=2, spatial_merge_size=2, mlp_ratio=2)
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
    text = dict(LLAMA, rope_parameters=rope, max_position_embeddings=64, bos_token_id=1)
    names = dict(image_token_id=IMAGE, video_token_id=4)
    names |= dict(vision_start_token_id=5, vision_end_token_id=6, vision_token_id=7)
    return tf.Qwen2VLConfig(text_config=text | dict(eos_token_id=2), vision_config=vision, **names)


def _blip2(config, text):
    return config(
        vision_config=VISION, qformer_config=QFORMER, text_config=text, num_query_tokens=4,
        image_token_index=IMAGE,
    )  # fmt: skip


def _gemma(kind="gemma", **extra):
    text = dict(LLAMA, model_type=kind, head_dim=8, num_key_value_heads=1, **extra)
    names = dict(image_token_index=IMAGE, projection_dim=32, hidden_size=32, pad_token_id=0)
    vision = dict(VISION, model_type="siglip_vision_model", vision_use_head=False)
    return tf.PaliGemmaConfig(text_config=text, vision_config=vision, **names)


def _idefics():
    vision = dict(VISION, patch_size=4)
    text = dict(LLAMA, model_type="llama")
    return tf.Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2
    )


def _llava():
    vision = dict(VISION, model_type="clip_vision_model")
    text = dict(LLAMA, model_type="llama")
    return tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)


def _siglip():
    text = dict(SIZES, vocab_size=64, max_position_embeddings=16, projection_size=32)
    text |= dict(bos_token_id=1, eos_token_id=2)
    vision = dict(VISION, hidden_size=32, num_attention_heads=4)
    return tf.SiglipConfig(text_config=text, vision_config=vision)


def _blip():
    text = dict(SIZES, vocab_size=64, encoder_hidden_size=16, max_position_embeddings=32)
    text |= dict(bos_token_id=1, eos_token_id=2, sep_token_id=2, pad_token_id=0)
    vision = dict(VISION, hidden_dropout_prob=0.0)
    return tf.BlipConfig(text_config=text, vision_config=vision)


QFORMER_OPT = r".*(qformer.*output(_query)?\.dense|language_model.*(out_proj|fc2))"
QFORMER_T5 = r".*(qformer.*output(_query)?\.dense|language_model\.decoder.*\.(o|wo))"


def families():
    """Return the families by name; a configuration is made when it is needed."""
    questions = torch.randint(5, 60, (32, 6), generator=torch.Generator().manual_seed(4))
    grid = torch.tensor([[1, 4, 4]])
    return {
        "blip2": lambda: Family(
            tf.Blip2ForConditionalGeneration,
            _blip2(tf.Blip2Config, dict(OPT, model_type="opt")),
            QFORMER_OPT,
        ),
        "instructblip": lambda: Family(
            tf.InstructBlipForConditionalGeneration,
            _blip2(tf.InstructBlipConfig, dict(T5, model_type="t5")),
            QFORMER_T5,
            dict(qformer_input_ids=questions),
        ),
        "qwen2-vl": lambda: Family(
            tf.Qwen2VLForConditionalGeneration, _qwen(), inputs=dict(image_grid_thw=grid),
            pixels=(16, 96),
        ),
        "idefics3": lambda: Family(
            tf.Idefics3ForConditionalGeneration, _idefics(), pixels=(1, 3, 16, 16)
        ),
        "paligemma": lambda: Family(tf.PaliGemmaForConditionalGeneration, _gemma()),
        "llava": lambda: Family(tf.LlavaForConditionalGeneration, _llava()),
        "t5": lambda: Family(
            tf.T5ForConditionalGeneration, tf.T5Config(**T5), image_tokens=0, pixels=()
        ),
        "blip": lambda: Family(tf.BlipForConditionalGeneration, _blip(), image_tokens=0),
        "paligemma2": lambda: Family(
            tf.PaliGemmaForConditionalGeneration,
            _gemma("gemma2", query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
            implementation="eager",
        ),
        "siglip": lambda: Family(
            tf.SiglipModel, _siglip(), r".*layers.*(out_proj|fc2)", image_tokens=0, generates=False
        ),
    }  # fmt: skip


def prompt_readers():
    """Return families whose Q-Former or encoder reads prompts, by name, as `families` does."""
    opt = dict(OPT, model_type="opt")
    t5 = dict(T5, model_type="t5", pad_token_id=0, tie_word_embeddings=False)  # as Flan-T5
    llama = dict(LLAMA, model_type="llama", max_position_embeddings=64)
    blip2 = tf.Blip2ForConditionalGeneration
    instruct = tf.InstructBlipForConditionalGeneration
    return {
        "blip2-t5": lambda: Family(blip2, _blip2(tf.Blip2Config, t5)),
        "instructblip-opt": lambda: Family(instruct, _blip2(tf.InstructBlipConfig, opt)),
        "instructblip-llama": lambda: Family(instruct, _blip2(tf.InstructBlipConfig, llama)),
        "instructblip-t5": lambda: Family(instruct, _blip2(tf.InstructBlipConfig, t5)),
    }


def build(family, seed=0):
    """Make the model of a family with random weights of a usable size."""
    torch.manual_seed(seed)
    model = family.model(copy.deepcopy(family.config)).eval()
    if family.implementation != "sdpa":
        model.set_attn_implementation(family.implementation)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.1)
    return model


def inputs_of(family, count=4, length=6, pad=0):
    """Make token ids, labels and pixels; `pad` tokens on the left of every second text."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(8, 60, (count, length), generator=generator)
    images = torch.full((count, family.image_tokens), family.image)
    ids = torch.cat([texts[:, :1], images, texts[:, 1:]], 1)
    mask = torch.ones_like(ids)
    if pad:
        ids = torch.cat([torch.zeros(count, pad, dtype=ids.dtype), ids], 1)
        mask = torch.cat([torch.zeros(count, pad, dtype=ids.dtype), mask], 1)
        ids[::2] = ids[::2].roll(-pad, 1)
        mask[::2] = mask[::2].roll(-pad, 1)
    found = dict(input_ids=ids, attention_mask=mask)
    if family.pixels:
        pixels = torch.randn(count, *family.pixels, generator=generator)
        found["pixel_values"] = pixels.flatten(0, 1) if len(family.pixels) == 2 else pixels
    if isinstance(family.config, tf.Qwen2VLConfig):
        found["mm_token_type_ids"] = (ids == family.image).int()
    for name, value in family.inputs.items():
        found[name] = value[:count] if len(value) > 1 else value.repeat(count, 1)
    return found


def with_labels(family, inputs):
    """Add what makes a model return a loss."""
    if not family.generates:
        return inputs | dict(return_loss=True)
    if family.config.is_encoder_decoder or isinstance(family.config, tf.InstructBlipConfig):
        return inputs | dict(labels=inputs["input_ids"][:, -4:].clone())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= family.image, -100)
    found = inputs | dict(labels=labels)
    if isinstance(family.config, tf.PaliGemmaConfig):
        found["token_type_ids"] = (labels != -100).long()
    return found


def output_of(model, inputs):
    """Return logits, or the similarities of SigLIP."""
    out = model(**inputs)
    return out.logits_per_text if hasattr(out, "logits_per_text") else out.logits
