"The metrics of generated text beside the official programs: pycocoevalcap, and its Java tokenizer."

import random
import shutil
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlmadapt.core.seeding import np_stream
from vlmadapt.data.text_metrics import bleu, cider, rouge_l, words_of
from vlmadapt.mini.captions import caption
from vlmadapt.mini.scenes import singles

needs_coco = pytest.mark.skipif(
    find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed"
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")

# Captions and references: repeated words, one reference and five, a full match, too short and too
# long, and one that shares nothing.
SAMPLE = {
    "a small brown dog runs across the wet grass": [
        "a brown dog is running across wet grass",
        "the dog runs over a green lawn",
        "a small dog running outside",
        "dog on the grass",
        "a puppy runs across the wet grass",
    ],
    "two people ride bikes down a busy street": [
        "two people ride bikes down a busy street",
        "a couple on bicycles in city traffic",
        "cyclists in a street full of cars",
    ],
    "a man a man a man on a horse": [
        "a man on a horse",
        "a rider sits on a brown horse in a field",
    ],
    "a red bus": [
        "a red double decker bus drives past a clock tower on a cloudy day",
        "the bus is red",
    ],
    "there is a very large plate of food with a lot of different kinds of vegetables and some meat "
    "and a fork on the side of it": [
        "a plate of vegetables and meat",
        "food on a plate with a fork",
    ],
    "the cat's bowl isn't full, it's empty": [
        "the cat's bowl is empty",
        "an empty bowl that isn't for the dog",
        "the bowl of the cat",
    ],
    "a kitchen with a stove and a sink": [
        "a kitchen with a stove, a sink and a window",
        "a small kitchen with white cabinets",
    ],
    "three zebras": ["a group of children plays football"],
    "a clock on the wall shows 10:30": ["the wall clock reads 10:30", "a clock on a white wall"],
    "a woman in a blue dress holds an umbrella": [
        "a woman in a blue dress with an umbrella",
        "a lady in blue holds an open umbrella in the rain",
        "woman holding an umbrella",
        "a woman stands in the rain",
    ],
    "a train at the station": [
        "a train stops at the station",
        "a long train at a station platform",
        "the train is at the station",
    ],
}
WRITTEN = list(SAMPLE)
REFERENCES = list(SAMPLE.values())

# Apostrophes, numbers, abbreviations, brackets and signs.
ODD = [
    "A man's dog doesn't like the well-lit, 3.5-inch screen (at all)!",
    "It's 10:30 a.m. on Mt. Fuji.",
    "A U.S. flag & a no. 7 bus",
    "She cannot go; they'll wait...",
    "the 'old' sign reads \"STOP\"",
    "1,000 people / 50% off $5",
    "rock'n'roll y'all gonna wanna",
    "black-and-white cat",
    "the dogs' bowls",
    "1/2 of a pizza",
    "A woman , standing . With umbrella ?",
    "St. John's church, approx. 5 ft. tall",
    "5 o'clock",
    "It’s a dog’s life – really",
    "#1 dad mug",
    "t-shirt w/ logo",
    "lemme see that",
    "café table",
    "kid's toys [red] {blue}",
    "wasn't won't can't",
    "AT&T store",
    "and/or",
    "24/7",
    "the 70's and 1950's",
    "'70s car",
    "hors d'oeuvres",
    "rock 'n' roll",
    "mr. and mrs. jones",
    'a sign saying "St. Louis"',
    "lots of stuff etc.",
    "o'brien's bar",
    "children playing;ball",
    "a 2-1 score",
    "3 1/2",
    "ma'am",
    "c'mon",
    "J. Smith stands",
    "hi :-) there",
    "me@x.org",
    "a ½ eaten",
    "'tis",
    "ol' man",
    "it's '09",
    "<start>",
]


def spaced(text):
    return " ".join(words_of(text))


@pytest.fixture(scope="module")
def official():
    "BLEU-1 to 4, ROUGE-L and CIDEr of the sample by pycocoevalcap, in percent."
    bleu_module = import_module("pycocoevalcap.bleu.bleu")
    written = {i: [spaced(text)] for i, text in enumerate(WRITTEN)}
    references = {i: [spaced(ref) for ref in refs] for i, refs in enumerate(REFERENCES)}
    scores = list(bleu_module.Bleu(4).compute_score(references, written, verbose=0)[0])
    rouge = import_module("pycocoevalcap.rouge.rouge").Rouge()
    scores.append(rouge.compute_score(references, written)[0])
    scores.append(
        import_module("pycocoevalcap.cider.cider").Cider().compute_score(references, written)[0]
    )
    return [100 * score for score in scores]


@needs_coco
def test_metrics_equal_those_of_pycocoevalcap(official):
    ours = [bleu(WRITTEN, REFERENCES, order=n) for n in range(1, 5)]
    ours += [rouge_l(WRITTEN, REFERENCES), cider(WRITTEN, REFERENCES)]
    assert ours == pytest.approx(official, abs=1e-6)


@needs_coco
def test_other_words_and_other_captions_give_other_numbers(official):
    words = [text.split() for text in WRITTEN]
    references = [[ref.split() for ref in refs] for refs in REFERENCES]
    assert abs(bleu(words, references) - official[3]) > 1
    assert abs(cider(WRITTEN[1:] + WRITTEN[:1], REFERENCES) - official[5]) > 1


@needs_coco
def test_bleu_without_a_run_of_four_words():
    "BLEU-4 is 0 here; the package adds 1e-15 to its counts and reports hundredths of a percent."
    written, reference = "three zebras walk here", "three zebras stand there"
    assert bleu([written], [[reference]]) == 0
    program = import_module("pycocoevalcap.bleu.bleu").Bleu(4)
    theirs = program.compute_score({0: [reference]}, {0: [written]}, verbose=0)[0][3]
    assert 0 < 100 * theirs < 0.1


@needs_coco
@pytest.mark.parametrize(
    "text, references", [("", ["a dog"]), ("a dog", ["", "the dog"]), ("a dog", ["", ""])]
)
def test_rouge_of_texts_without_a_word(text, references):
    program = import_module("pycocoevalcap.rouge.rouge").Rouge()
    theirs = 100 * program.compute_score({0: references}, {0: [text]})[0]
    assert rouge_l([text], [references]) == pytest.approx(theirs, abs=1e-9)


@needs_coco
def test_rouge_of_two_empty_texts():
    "It is 0 here; the package takes two empty texts for one equal word."
    program = import_module("pycocoevalcap.rouge.rouge").Rouge()
    assert program.compute_score({0: [""]}, {0: [""]})[0] == 1
    assert rouge_l([""], [[""]]) == 0


def treebank(lines):
    "The words of each line by the Java program of pycocoevalcap."
    home = Path(next(iter(import_module("pycocoevalcap").__path__)), "tokenizer")
    module = import_module("pycocoevalcap.tokenizer.ptbtokenizer")
    program = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(
        ["java", "-cp", home / module.STANFORD_CORENLP_3_4_1_JAR, *program],
        input="\n".join(lines) + "\n",
        text=True,
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    found = done.stdout.split("\n")[: len(lines)]
    return [[w for w in line.split() if w not in module.PUNCTUATIONS] for line in found]


@needs_coco
@needs_java
def test_captions_are_split_as_by_the_official_program():
    scenes = singles(np_stream(3, "words"), 300)
    captions = [
        caption(s, random.Random(f"{i} {k}")) for i, s in enumerate(scenes) for k in range(3)
    ]
    captions += WRITTEN + [ref for refs in REFERENCES for ref in refs]
    assert [words_of(text) for text in captions] == treebank(captions)


@needs_coco
@needs_java
def test_most_oddities_are_split_as_by_the_official_program():
    pairs = zip(ODD, treebank(ODD), strict=True)
    other = [text for text, words in pairs if words_of(text) != words]
    assert len(other) < 0.2 * len(ODD), other
