"""Small processors of transformers for the models of hf_families, made here."""

import transformers as tf
from hf_families import IMAGE, build, families, prompt_readers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["is", "it", "red", "blue", "green", "dark", "light", "what", "colour", "yes", "no", "a"]
WORDS += ["the", "picture", "shows", "user", "assistant", "USER", "ASSISTANT", *":?.,"]
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def tokenizer(image="<image>", extra=(), newline=False):
    """Make a tokenizer of words with 64 tokens, the image's among them."""
    special = ["<pad>", "<s>", "</s>", image, *extra]
    words = WORDS + (["\n"] if newline else [])
    names = special + words
    names += [f"w{n}" for n in range(63 - len(names))] + ["<unk>"]
    inner = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>"))
    split = pre_tokenizers.Split("\n", "isolated") if newline else pre_tokenizers.WhitespaceSplit()
    spaces = pre_tokenizers.Split(" ", "removed")
    marks = pre_tokenizers.Punctuation()
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, spaces, marks])
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip
    made.add_special_tokens(dict(additional_special_tokens=[image, *extra]))
    assert made.convert_tokens_to_ids(image) == IMAGE
    return made


def llava():
    """Make a processor of LLaVA with a chat template."""
    images = tf.CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=16)
    return tf.LlavaProcessor(
        images, tokenizer(extra=("<|start|>", "<|end|>")), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip


def qwen():
    """Make a processor of Qwen2-VL: images keep their shape, and its chat template."""
    images = tf.Qwen2VLImageProcessor(
        size=dict(shortest_edge=64, longest_edge=1024), patch_size=4, merge_size=2,
        temporal_patch_size=2,
    )  # fmt: skip
    names = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|start|>", "<|end|>")
    videos = tf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=2)
    return tf.Qwen2VLProcessor(
        images, tokenizer("<|image_pad|>", names), videos,
        chat_template=CHAT.replace("IMAGE", QWEN_IMAGE),
    )  # fmt: skip


def blip2():
    """Make a processor of BLIP-2, which has no chat template."""
    images = tf.BlipImageProcessor(size=dict(height=16, width=16))
    return tf.Blip2Processor(images, tokenizer(), num_query_tokens=4)


def paligemma():
    """Make a processor of PaliGemma, which adds tokens of its own."""
    images = tf.SiglipImageProcessor(size=dict(height=16, width=16), image_seq_length=4)
    return tf.PaliGemmaProcessor(images, tokenizer(newline=True))


def with_end(made, template="$A </s>"):
    """Let a tokenizer add special tokens to each text, as those of T5 and BERT do."""
    special = [(name, made.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    inner = made._tokenizer
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return made


def bert():
    """Make the tokenizer of a Q-Former, which numbers words in its own way."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *reversed(WORDS)]
    inner = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    inner.pre_tokenizer = pre_tokenizers.Sequence(split)
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    made = tf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    return with_end(made, "<s> $A </s>")


def blip2_t5():
    """Make a processor of BLIP-2 with the tokenizer of a T5."""
    images = tf.BlipImageProcessor(size=dict(height=16, width=16))
    return tf.Blip2Processor(images, with_end(tokenizer()), num_query_tokens=4)


def instructblip(t5=False):
    """Make a processor of InstructBLIP, which has a tokenizer for the Q-Former."""
    images = tf.BlipImageProcessor(size=dict(height=16, width=16))
    own = with_end(tokenizer()) if t5 else tokenizer()
    return tf.InstructBlipProcessor(images, own, bert(), num_query_tokens=4)


def pair(name):
    """Make a model with random weights and its processor."""
    family = (families() | prompt_readers())[name]()
    family.config.get_text_config().eos_token_id = 2
    family.config.tie_word_embeddings = False
    family.config.get_text_config().tie_word_embeddings = False
    processor = (PROCESSORS | PROMPT_READERS)[name]()
    family.config.get_text_config().vocab_size = len(processor.tokenizer)
    core = build(family)
    core.generation_config.eos_token_id = 2
    return core, processor


PROCESSORS = {"llava": llava, "qwen2-vl": qwen, "blip2": blip2, "paligemma": paligemma}
PROMPT_READERS = {
    "blip2-t5": blip2_t5,
    "instructblip-opt": instructblip,
    "instructblip-llama": instructblip,
    "instructblip-t5": lambda: instructblip(t5=True),
}
