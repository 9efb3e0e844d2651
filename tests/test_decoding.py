"Searches on toy languages that can be enumerated."

import itertools

import pytest
import torch

from vlmadapt.core.seeding import stream
from vlmadapt.models.adapted_models import thin_copy
from vlmadapt.models.backbones import load_backbone
from vlmadapt.models.decoding import stepper
from vlmadapt.models.searches import beam_search, greedy_search, without_padding
from vlmadapt.models.vocabulary import distinct_columns

END = 1
WORDS = range(2, 6)


class ToyStepper:
    "Logits of six tokens (padding, end and four words), drawn from the text so far."

    def __init__(self, seed):
        self.seed = seed
        self.tokens = torch.zeros(0)

    def __call__(self, tokens):
        self.tokens = torch.cat([self.tokens, tokens], 1) if len(self.tokens) else tokens
        logits = []
        for row in self.tokens.tolist():
            generator = stream(self.seed, *map(str, row))
            logits.append(2 * torch.randn(6, generator=generator))
        return torch.stack(logits)

    def select(self, rows):
        self.tokens = self.tokens[rows]


def likelihood(seed, prompt, text):
    "Log-probability of a text after a prompt."
    step = ToyStepper(seed)
    tokens = torch.tensor([prompt])
    total = 0.0
    for word in text:
        total += without_padding(step(tokens)).log_softmax(-1)[0, word].item()
        tokens = torch.tensor([[word]])
    return total


def best_text(seed, prompt, length_penalty, length=4):
    "The best of all texts of at most `length` tokens, with its score."
    texts = [[*words, END] for n in range(length) for words in itertools.product(WORDS, repeat=n)]
    texts += [list(words) for words in itertools.product(WORDS, repeat=length)]
    return max((likelihood(seed, prompt, t) / len(t) ** length_penalty, t) for t in texts)


PROMPTS = torch.tensor([[2, 3], [4, 0]])


@pytest.mark.parametrize(
    "seed, length_penalty", [(1, 1.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 0.5), (6, 1.0)]
)
def test_with_enough_beams_the_best_text_is_found(seed, length_penalty):
    settings = dict(num_beams=85, max_new_tokens=4, length_penalty=length_penalty, end=END)
    texts, scores = beam_search(ToyStepper(seed), PROMPTS, **settings)
    for row, score, prompt in zip(texts.tolist(), scores, ([2, 3], [4]), strict=True):
        expected, text = best_text(seed, prompt, length_penalty)
        assert score.item() == pytest.approx(expected, abs=1e-5)
        assert [word for word in row if word] == prompt + text


@pytest.mark.parametrize("num_beams", [2, 3])
@pytest.mark.parametrize("seed", range(1, 7))
def test_an_end_token_in_a_prompt_ends_nothing(seed, num_beams):
    quoted = torch.tensor([[2, END, 3], [4, 0, 0]])
    settings = dict(num_beams=num_beams, max_new_tokens=4, end=END)
    together, scores = beam_search(ToyStepper(seed), quoted, **settings)
    alone, score = beam_search(ToyStepper(seed), quoted[:1], **settings)
    text = [word for word in alone[0].tolist() if word]
    assert [word for word in together[0].tolist() if word] == text
    assert scores[0].item() == pytest.approx(score.item(), abs=1e-6)
    new = text[3:]
    expected = likelihood(seed, [2, END, 3], new) / len(new)
    assert score.item() == pytest.approx(expected, abs=1e-5)


def test_one_beam_is_greedy_and_may_miss_the_best_text():
    missed = 0
    for seed in range(20):
        settings = dict(num_beams=1, max_new_tokens=4, end=END)
        one = beam_search(ToyStepper(seed), PROMPTS[:1], length_penalty=0.0, **settings)[0]
        greedy = greedy_search(ToyStepper(seed), PROMPTS[:1], max_new_tokens=4, end=END)
        assert torch.equal(one, greedy)
        score = beam_search(ToyStepper(seed), PROMPTS[:1], **settings)[1]
        best = beam_search(ToyStepper(seed), PROMPTS[:1], **settings | dict(num_beams=85))[1]
        missed += score.item() < best.item() - 1e-6
    assert missed > 2


def test_no_end_before_min_new_tokens():
    settings = dict(num_beams=6, max_new_tokens=4, min_new_tokens=3, end=END)
    texts, _ = beam_search(ToyStepper(3), PROMPTS, **settings)
    assert (texts[0, 2:5] != END).all()


def test_equal_texts_share_their_states_and_give_the_same_logits():
    backbone = load_backbone("mini", device="cpu")
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    cached, plain = (stepper(backbone.model, x, cache) for cache in (True, False))
    words = torch.tensor([[9, 8], [9, 7], [9, 8], [9, 8], [9, 7], [9, 7]])
    following = torch.tensor([[5], [5], [6], [5], [6], [6]])
    rows = torch.tensor([5, 0, 0, 1])
    for tokens, texts in ((words, 2), (following, 4), (following[rows], 3)):
        if len(tokens) == len(rows):
            cached.select(rows)
            plain.select(rows)
        assert torch.allclose(cached(tokens), plain(tokens), atol=1e-3)
        assert {len(cached.cache[block].keys) for block in cached.shared} == {texts}


def test_thin_copies_share_the_distinct_columns_of_the_vocabulary():
    model = load_backbone("mini", device="cpu").model
    first = distinct_columns(model.text_decoder.text_projection)
    assert distinct_columns(thin_copy(model).text_decoder.text_projection) is first
    other = torch.nn.Parameter(model.text_decoder.text_projection.detach().clone())
    assert distinct_columns(other) is not first
