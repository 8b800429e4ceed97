"""The state of a batch of prompts that are being continued, token by token, for any model here.

The prompts, of any lengths, each with a prefix of its own if need be, are read once. Then every
step reads one more token of each text, or one of each beam. Not here: which token comes next
(sample.py, beam.py), what differs between the models (their `start_decoding`). Letters as in
model.py; K beams, N tokens generated after the prompt by all beams together.
"""
import torch
from torch.nn import functional as F


def stack_prefixes(prefix, B):
    """Prefixes of different lengths stacked in (L, 2, B, H, P, D), and their mask (B, P), on the
    CPU.

    prefix: a list of B folded ones (L, 2, 1, H, P_b, D), or one (L, 2, 1 or B, H, P, D), which
    stays as it is. A shorter one stands on the right, next to the text, and the columns on its left
    are masked: so every row computes what it would compute alone. An encoder-decoder has three
    prefixes; then prefix and mask are tuples of three.
    """
    if not isinstance(prefix, list):
        if isinstance(prefix, tuple):
            return prefix, type(prefix)(*(stack_prefixes(part, B)[1] for part in prefix))
        return prefix, torch.ones(B, prefix.size(4), dtype=torch.bool)
    if isinstance(prefix[0], tuple):
        parts, masks = zip(*(stack_prefixes(list(part), B) for part in zip(*prefix)))
        return type(prefix[0])(*parts), type(prefix[0])(*masks)
    if len({len(p) for p in prefix}) > 1:
        raise ValueError(f"got prefixes of {sorted({len(p) for p in prefix})} layers in a batch; "
                         "expected the same layers in all; decode them apart")
    P = max(p.size(4) for p in prefix)
    padded = [F.pad(p, (0, 0, P - p.size(4), 0)) for p in prefix]       # (L, 2, 1, H, P, D)
    gaps = torch.tensor([[P - p.size(4)] for p in prefix])                      # (B, 1)
    return torch.cat(padded, 2), torch.arange(P) >= gaps        # (L, 2, B, H, P, D) and (B, P)


class DecodingState:
    """A batch of prompts, read. `logits` (B, V) are those of the first new token; `step` reads on.

    prompts: lists of tokens; of an encoder-decoder the sources. prefix: the model's, folded, one
    for all or a row each, or a list with one for each prompt, of any lengths; None: no prefix.
    max_new_tokens, num_beams: how much the cache has to hold. Raises ValueError for an empty
    prompt, and for one that fills all positions.
    """

    @torch.no_grad()
    def __init__(self, model, prompts, prefix=None, max_new_tokens=0, num_beams=1):
        if not prompts or not all(prompts):
            raise ValueError("got an empty prompt, or none; expected a token at least in each")
        prefix = model.empty_prefix() if prefix is None else prefix
        start = model.start_decoding(prompts, *stack_prefixes(prefix, len(prompts)),
                                     max_new_tokens, num_beams)
        self.model, self.cache, self.inputs = model, start.cache, start.inputs
        self.max_new_tokens = start.max_new_tokens
        self.prompts = start.prompts        # the tokens that the decoder has read of each text
        self.key_mask = start.key_mask                                          # (B, P+T)
        self.logits = self.read(start.ids, self.key_mask)[:, -1]                # (B, V)

    def read(self, ids, key_mask, tree=None):
        """Read ids (B, T). Logits of the last one (B, 1, V), or with a tree of all T (B, T, V).
        """
        hidden = self.model.hidden_states(ids, key_mask=key_mask, cache=self.cache, tree=tree,
                                          **self.inputs)                        # (B, T, C)
        return self.model.head(hidden[:, -1:] if tree is None else hidden)

    def all_done(self, done, step):
        """Whether all of done (B,) are True, as far as is known after step number `step`.

        Reading `done` makes Python wait for the GPU, so there it is read every 8 steps. A CPU
        reads it at every step: that is free, an extra step is not.
        """
        known = self.model.device.type == "cpu" or step % 8 == 7
        return known and bool(done.all())

    @torch.no_grad()
    def step(self, ids, tree=None):
        """Logits (B, K, V) of what follows each of the tokens ids (B, K).

        K = 1: the next token of the text. More: a token of each beam; tree (B, K, N) then says
        which of the N tokens read since the prompt, the last K of them these, are its own past.
        """
        if tree is not None:
            return self.read(ids, F.pad(self.key_mask, (0, tree.size(2)), value=True), tree)
        self.key_mask = F.pad(self.key_mask, (0, 1), value=True)                # (B, P+S)
        return self.read(ids, self.key_mask)
