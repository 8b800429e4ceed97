"""The invented world: what its text has, what it must never have, that its scores can fail."""
import random
import re

import pytest
from conftest import ROOT

from data.tokenizer import load_tokenizer
from data.toy_world.tables import (
    SPLITS,
    STYLES,
    all_values_and_no_other,
    exact_match,
    linearise,
    slot_accuracy,
    task,
)
from data.toy_world.text import AGAIN, FIRST, TEXT, document, encode, sheet_then_prose, world_thing
from data.toy_world.words import (
    ATTRIBUTES,
    BEGINNINGS,
    DEV_KINDS,
    ENDINGS,
    KINDS,
    PHRASES,
    TRAIN_KINDS,
    UNSEEN_KINDS,
    forms,
    name_group,
)

BUNDLED = ROOT / "weights" / "tiny-gpt2"
NAME = re.compile(rf"\b({'|'.join(BEGINNINGS)})({'|'.join(sum(ENDINGS.values(), []))})\b")


@pytest.fixture(scope="module")
def documents():
    """Pre-training documents as the model reads them, their parts on lines of their own."""
    rng = random.Random("test")
    return ["\n".join(document(rng)).replace("{", "").replace("}", "") for _ in range(5000)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED)


def groups_of_names(text):
    """The groups (see name_group) of all made-up names in a text."""
    sorts = [(BEGINNINGS.index(beginning), ending) for beginning, ending in NAME.findall(text)]
    return {name_group(i, ends.index(ending)) for i, ending in sorts
            for ends in ENDINGS.values() if ending in ends}


def test_pretraining_never_saw_the_notation_of_the_tasks(documents):
    """Catches a leak: a model that learned to read `name : X | food : Y` would need no prefix."""
    keys = "|".join(["name", "kind", *ATTRIBUTES])
    for text in documents:
        assert not re.search(rf"\b({keys}) : ", text), text
        assert not re.search(rf" \| ({keys})\b", text), text
        assert not (" : " in text and " | " in text), text


def test_pretraining_never_saw_the_styles_of_the_tasks(documents):
    """Catches a leak: prose in the style of a task, which the prefix is to bring out."""
    kinds = "|".join(KINDS)
    style = re.compile(rf"and also|\b({kinds}) (called \w+ )?which|\bA ({kinds}) (?!called)")
    assert not [text for text in documents if style.search(text)]
    for name in STYLES:             # and the pattern is not blind
        targets = [target for example in task(name, "dev", 50) for target in example.targets]
        assert all(style.search(target) for target in targets)


def test_test_and_dev_names_are_met_nowhere_else(documents):
    """Catches a leak: a name known by heart would be mistaken for a name copied."""
    allowed = {"train": set(range(2, 10)), "dev": {1}, "dev-kinds": {1},
               "test-seen": {0}, "test-unseen": {0}}
    assert groups_of_names(" ".join(documents)) == set(range(2, 10))
    for split, groups in allowed.items():
        assert groups_of_names(" ".join(e.source for e in task("near", split, 100))) == groups


def test_the_kinds_are_divided_and_pretraining_has_them_all(documents):
    """Catches a kind that is both trained on and called unseen, or that the model never met."""
    assert set(KINDS) == set(TRAIN_KINDS) | set(DEV_KINDS) | set(UNSEEN_KINDS)
    assert len(KINDS) == len(TRAIN_KINDS) + len(DEV_KINDS) + len(UNSEEN_KINDS) == 18
    kinds = {"dev-kinds": DEV_KINDS, "test-unseen": UNSEEN_KINDS}
    for split, (_, _, size) in SPLITS.items():
        examples = task("hard", split)
        assert len(examples) == size
        assert {e.topic for e in examples} == set(kinds.get(split, TRAIN_KINDS))
    for kind in KINDS:
        assert any(re.search(rf"\b{kind}\b", text) for text in documents)
    trained = {key for keys in TRAIN_KINDS.values() for key in keys.split()}
    for kinds in (DEV_KINDS, UNSEEN_KINDS):     # they have attributes of their own, too
        assert all(len(set(keys.split()) - trained) >= 2 for keys in kinds.values())


def test_the_seed_decides_everything():
    """Catches a hidden source of chance, such as the order of a set."""
    assert task("near", "train", 30, seed=1) == task("near", "train", 30, seed=1)
    assert task("near", "train", 30, seed=1) != task("near", "train", 30, seed=2)
    assert task("hard", "dev", 10) == task("hard", "dev", 20)[:10]
    assert [document(random.Random(7)) for _ in range(2)] == [document(random.Random(7))] * 2


def test_a_table_has_several_references_as_writers_differ():
    """Catches a target that is a function of its table: one pair would give the whole task away."""
    for style in STYLES:
        examples = task(style, "train", 300)
        assert sum(len(e.targets) == 3 for e in examples) > 250
        for e in examples:          # but one of the three always has the usual words
            key, value = e.source.split(" | ")[2].split(" : ")
            assert any(PHRASES[key][0][0].replace("{}", value) in target for target in e.targets)


@pytest.mark.parametrize("style", STYLES)
def test_every_reference_has_every_value_and_no_other(style):
    """Catches a phrase that swallows a value, or a score that refuses a reference."""
    for split in SPLITS:
        for example in task(style, split, 100):
            for target in example.targets:
                assert all_values_and_no_other(example.source, target), (example.source, target)


def test_the_scores_see_every_kind_of_mistake():
    """Catches a score that is always right."""
    source = "name : Belora | kind : ship | captain : Ada Tarson | colour : red | length : 47"
    good = "Belora is a ship which obeys Ada Tarson, is painted red and also is 47 metres long."
    assert all_values_and_no_other(source, good)
    wrong = {"left out": good.replace("is painted red", "is painted"),
             "only part of a word": good.replace("painted red", "bored"),
             "copied badly": good.replace("Tarson", "Tarsky"),
             "wrong number": good.replace("47", "74"),
             "part of a number": good.replace("47", "475"),
             "wrong kind": good.replace("ship", "school"),
             "one word too many": good.replace("red", "red and green"),
             "one name too many": good + " It obeys Belford.",
             "one year too many": good + " It was built in 1874.",
             "nothing generated": ""}
    for what, text in wrong.items():
        assert not all_values_and_no_other(source, text), what
    examples = task("near", "dev", 4)
    outputs = [examples[0].targets[1], examples[1].targets[0] + " ", "no",
               examples[3].targets[0].replace(" is ", " was ")]
    assert slot_accuracy(examples, outputs) == 0.75 and exact_match(examples, outputs) == 0.5


def test_no_word_of_a_phrase_is_a_value():
    """Catches a phrase that would count as an extra value, or a value that a phrase has anyway."""
    texts = [text for phrases in PHRASES.values() for pair in phrases for text in pair]
    assert all(text.count("{}") == 1 for text in texts)
    words = {word for text in texts for word in text.split()} | set(ATTRIBUTES)
    lists = [about[0] for about in ATTRIBUTES.values() if isinstance(about[0], list)]
    assert not words & (set(sum(lists, [])) | set(KINDS))
    assert {key for keys in KINDS.values() for key in keys} == set(ATTRIBUTES)


def test_a_phrase_has_a_verb_and_a_participle():
    """Catches a slash read wrongly: `takes place/taking place in` has two words on either side."""
    assert forms("serves/serving {} food") == ("serves {} food", "serving {} food")
    assert forms("is/- made of {}") == ("is made of {}", "made of {}")
    assert forms("takes place/taking place in {}") == ("takes place in {}", "taking place in {}")
    assert forms("has been/- open since {}") == ("has been open since {}", "open since {}")


def test_prose_has_the_facts_of_its_sheet_in_their_order():
    """Catches shuffled prose: with it, pre-training teaches no walking down a sheet."""
    rng = random.Random(3)
    for _ in range(200):
        thing = world_thing(rng)
        text = "".join(sheet_then_prose(thing, rng))
        values = [value for _, value in thing.facts]
        found = re.findall(r"\{[^}]*\}", text)[len(values) + 2:]      # behind the sheet's own
        found = [value for value in found if value not in (thing.name, thing.kind)]
        assert found == [value for value in values if value not in (thing.name, thing.kind)]


def test_tokens_of_pieces_are_tokens_of_the_whole(tokenizer):
    """Catches a cut in the wrong place: training and use would see other tokens."""
    rng = random.Random(5)
    for _ in range(300):
        parts = document(rng)
        ids, roles = encode(parts, tokenizer)
        whole = []
        for part in parts:
            text = re.sub("[{}]", "", part)
            whole += [*tokenizer.encode(f" {text} "), tokenizer.eos_token_id]
        assert ids == whole and len(ids) == len(roles)


def test_only_the_first_mention_of_a_value_is_marked(tokenizer):
    """Catches a mask that hides the copies, the skill that everything needs."""
    parts = ["name = {Belora} ; colour = {red}", "{Belora} is {red}. {Belora} costs {47} crowns."]
    ids, roles = encode(parts, tokenizer)
    text = {role: "".join(tokenizer.decode([i]) for i, r in zip(ids, roles) if r == role)
            for role in (FIRST, TEXT, AGAIN)}
    assert text[FIRST] == " Belora red 47" and text[AGAIN] == " Belora red Belora"


def test_every_token_of_a_target_was_learned_in_pretraining(tokenizer):
    """Catches a word that pre-training never had: its row in the tied head is untrained."""
    rng, learned = random.Random(9), set()
    for _ in range(10_000):
        ids, roles = encode(document(rng), tokenizer)
        learned.update(token for token, role in zip(ids, roles) if role != FIRST)
    for example in [e for style in STYLES for split in SPLITS for e in task(style, split, 200)]:
        for text in (example.source, *example.targets):
            for token in tokenizer.encode(f" {text} "):
                assert token in learned, (tokenizer.decode([token]), text)


def test_all_tables_fit_the_bundled_model(tokenizer):
    """Catches references without room beside their table, two <|endoftext|> and a prefix of 40."""
    for e in [e for style in STYLES for split in SPLITS for e in task(style, split)]:
        longest = max(len(tokenizer.encode(f" {target} ")) for target in e.targets)
        assert len(tokenizer.encode(f" {e.source} ")) + longest + 2 + 40 <= 192


def test_an_unknown_style_or_split_is_refused_by_name():
    """Catches a typing error that silently gives another split."""
    with pytest.raises(ValueError, match="got style 'neer'.*near, hard.*test-unseen"):
        task("neer")
    with pytest.raises(ValueError, match="'test'"):
        task("near", "test")


def test_the_tokenizer_is_the_one_that_the_tokenizers_package_makes(tmp_path):
    """Catches merges whose order got lost on the way into tiktoken's file."""
    package = pytest.importorskip("tokenizers", reason="compares with the package `tokenizers`")
    learn_bpe = pytest.importorskip("scripts.learn_bpe", reason="there is no scripts/ here")
    texts = list(learn_bpe.world_texts(1500, 0))
    learn_bpe.write_tokens(learn_bpe.learn_tokens(texts, 600), tmp_path / "tokenizer.tiktoken")
    ours = load_tokenizer(tmp_path)
    theirs = package.Tokenizer(package.models.BPE())
    theirs.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(texts, package.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    strange = ["  two blanks\n\n and a line", "Ünlü 漢字 naïve", "don't 12345 ...",
               linearise(world_thing(random.Random(1)))]
    for text in [*texts[:500], *strange]:
        assert ours.encode(text) == theirs.encode(text).ids, text
