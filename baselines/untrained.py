"""Baselines without training: a template written by hand, and asking an instruction-tuned model.

Compared with a prefix they show what training is worth. Both take the source as the paper's
official code writes it (data/formats.py).
"""
import re

INSTRUCTIONS = {
    "e2e": "Write one or two sentences that tell everything in this table about a restaurant, and "
           "nothing else:",
    "webnlg": "Write one short text that tells all of these facts (subject : property : object), "
              "and nothing else:",
    "scitldr": "Summarize this abstract of a paper in one sentence:"}


def e2e_template(source):
    """A table of E2E as one or two sentences. Written with a look at the dev set only."""
    row = dict(re.split(" : ", field, maxsplit=1) for field in source.split(" | "))
    family = {"yes": "family friendly ", "no": "non family friendly "}
    words = (family.get(row.get("family friendly"), "")
             + (f"{row['food']} " if "food" in row else "") + row.get("Type", "place"))
    text = f"{row['name']} is {'an' if words[0] in 'AEIOaeio' else 'a'} {words}"
    if "area" in row:
        text += f" in the {row['area']}" + (" area" if row["area"] == "riverside" else "")
    text += f" near {row['near']}" if "near" in row else ""
    more = []
    if "price" in row:
        more.append(f"a price range of {row['price']}" if re.search(r"\d", row["price"]) else
                    f"a {row['price']} price range")
    if "customer rating" in row:
        more.append(f"a customer rating of {row['customer rating']}"
                    if re.match(r"\d", row["customer rating"]) else
                    f"a {row['customer rating']} customer rating")
    return f"{text}. It has {' and '.join(more)}." if more else f"{text}."


def webnlg_template(source):
    """Triples as sentences: the property's words between its subject and its object."""
    sentences = []
    for triple in source.strip(" |").split(" | "):
        subject, relation, value = re.split(" : ", triple, maxsplit=2)
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", relation).lower()
        subject, value = (part.replace("_", " ").strip('"') for part in (subject, value))
        sentences.append(f"The {words} of {subject} is {value}.")
    return " ".join(sentences)


TEMPLATES = {"e2e": e2e_template, "webnlg": webnlg_template}


def chat_prompt(tokenizer, instruction, source):
    """The tokens of a question in ChatML, as SmolLM2-Instruct was taught to be asked.

    Raises ValueError where the tokenizer has no <|im_start|>: the model knows no chat.
    """
    start, end = (tokenizer.encoding.token_to_id(mark) for mark in ("<|im_start|>", "<|im_end|>"))
    if start is None or end is None:
        raise ValueError("got a model whose vocabulary has no <|im_start|>; expected one that was "
                         "taught to answer in ChatML, as smollm2; leave this baseline out")
    turns = (("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
             ("user", f"{instruction}\n{source}"))
    ids = [i for who, text in turns
           for i in (start, *tokenizer.encode(f"{who}\n{text}"), end, *tokenizer.encode("\n"))]
    return [*ids, start, *tokenizer.encode("assistant\n")]
