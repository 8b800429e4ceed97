"""Which tokens may come next, whatever the model predicts. fast/cuda_graph.py repeats some of it.

Letters as in model.py.
"""
import dataclasses
import functools
import itertools
import operator

import torch


@functools.lru_cache
def on_device(tokens, device):
    """`tokens`, a tuple, as a tensor on `device`, made once."""
    return torch.tensor(tokens, dtype=torch.long).to(device, non_blocking=True)


def ngram_continuations(tokens, n):
    """The tokens that would repeat an n-gram: each followed an earlier copy of the last n - 1."""
    end = tokens[len(tokens) - n + 1:]
    return {tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tokens[i:i + n - 1] == end}


@dataclasses.dataclass(frozen=True)
class Constraints:
    """Names as in transformers' generation config."""
    eos_token_id: int               # the token that ends a text
    max_new_tokens: int = 100       # tokens at most, the end included
    min_new_tokens: int = 0         # tokens before the end is allowed
    banned_tokens: tuple = ()       # tokens that are never generated
    no_repeat_ngram_size: int = 0   # no n-gram occurs twice, prompt included; 0: off
    forced_bos_token_id: int | None = None      # the token that every text begins with
    forced_eos_token_id: int | None = None      # that a text of max_new_tokens tokens ends with
    more_ends: tuple = ()           # tokens that end a text, too

    def ended(self, token):
        """Whether a token ends a text; of a tensor of tokens, which of them."""
        return functools.reduce(operator.or_, (token == end for end in self.ends()))

    def ends(self):
        return [self.eos_token_id, *self.more_ends]

    def until_end(self, tokens):
        """The tokens up to the first end, a list."""
        return list(itertools.takewhile(lambda token: not self.ended(token), tokens))

    def forced_token(self, step):
        """The token that number `step` of a text has to be, or None where there is a choice."""
        if step == self.max_new_tokens - 1 and self.forced_eos_token_id is not None:
            return self.forced_eos_token_id
        return self.forced_bos_token_id if step == 0 else None

    def apply(self, scores, step, sequences):
        """Set to -inf, in place, the tokens that are not allowed at `step`; a forced one to 0.

        scores: (rows, V), logits or log-probabilities. sequences: for each row the list of all
        tokens that the decoder has read, prompt and own; used for `no_repeat_ngram_size` only.
        """
        forced = self.forced_token(step)
        if forced is not None:
            # It was no choice, so it must not count when texts compete: 0, whatever the model says.
            scores.fill_(float("-inf"))[:, forced] = 0
            return
        scores.index_fill_(1, on_device(self.banned_tokens, scores.device), float("-inf"))
        if self.no_repeat_ngram_size:
            # But never an end: GPT-2's source and target both end in a space and <|endoftext|>, so
            # the prompt may have that n-gram already, and the text could not end.
            for row, tokens in enumerate(sequences):
                repeats = ngram_continuations(tokens, self.no_repeat_ngram_size)
                scores[row, list(repeats.difference(self.ends()))] = float("-inf")
        if step < self.min_new_tokens:
            scores.index_fill_(1, on_device(tuple(self.ends()), scores.device), float("-inf"))
            # Where nothing is left the text ends, too short: any other token would be forbidden.
            stuck = scores.amax(1) == float("-inf")                             # (rows,)
            scores[:, self.eos_token_id].masked_fill_(stuck, 0)


def banned_tokens(tokenizer, texts):
    """The tokens of `texts`, as `Constraints` take them; a mark without text is none of them."""
    return tuple(sorted({i for x in texts for i in tokenizer.encode(x) if tokenizer.decode([i])}))


def constraints_of(model, tokenizer, ban=(), **settings):
    """The `Constraints` of a model: its end token, what its makers force or end a text with, and
    the fields `settings`. ban: texts whose tokens are never generated.

    Rows of the word embedding without a token in the vocabulary, as in a resized model, are never
    generated either.
    """
    makers = model.generation_config
    ends = makers.get("eos_token_id", [])
    ends = dict.fromkeys(ends if isinstance(ends, list) else [ends])        # each once, in order
    ends.pop(tokenizer.eos_token_id, None)
    nameless = set(range(model.config.vocab_size)).difference(tokenizer.ids, ends)
    return Constraints(
        tokenizer.eos_token_id, more_ends=tuple(ends),
        banned_tokens=tuple(sorted(nameless.union(banned_tokens(tokenizer, ban)))),
        forced_bos_token_id=makers.get("forced_bos_token_id"),
        forced_eos_token_id=makers.get("forced_eos_token_id"), **settings)
