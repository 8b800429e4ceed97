"""What may be said, and beam search: the K likeliest texts are kept alive, not only the best one.

The paper decodes tables with 5 beams and summaries with 6 (Li & Liang 2021, section 5.3). All beams
of a source live in ONE row of the batch: the K newest tokens are K queries, and the keys are the
prefix, the prompt and every token that any beam ever said. A mask, the tree, says which of those
are a beam's own past. So the prefix's and the prompt's keys are there once, and when a beam is
dropped and another goes on twice, nothing is copied or sorted: only the tree changes.
Called by sample.py, which brings the `reader`; nothing here knows a model. Letters as in model.py;
K beams, N tokens said after the prompt by all beams together.
"""
import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Rules:
    """What may be said, whatever the model thinks."""
    eos: int                        # the token that ends a text
    max_new: int = 100              # tokens at most, the end included
    min_new: int = 0                # tokens before the end is allowed
    banned: tuple = ()              # tokens that are never said
    no_repeat: int = 0              # no n tokens follow each other twice, prompt included; 0: may
    first: int | None = None        # the token that every text begins with
    last: int | None = None         # the token that a text of max_new tokens ends with

    def forbid(self, scores, n, read):
        """Set to -inf, in place, what may not be the token number `n` of each row.

        scores: (N, V), logits or log-probabilities. read: for each row the list of all tokens that
        the decoder has read, prompt and own; looked at only for `no_repeat`.
        """
        forced = self.last if n == self.max_new - 1 and self.last is not None else (
            self.first if n == 0 else None)
        if forced is not None:
            # It was no choice, so it weighs nothing beside other texts: 0, whatever the model says.
            scores.fill_(float("-inf"))[:, forced] = 0
            return
        scores[:, list(self.banned)] = float("-inf")
        if n < self.min_new:
            scores[:, self.eos] = float("-inf")
        if self.no_repeat:
            for row, tokens in enumerate(read):
                scores[row, list(seen_after(tokens, self.no_repeat))] = float("-inf")


def seen_after(tokens, n):
    """The tokens that once followed what are now the last n - 1 of `tokens`."""
    end = tokens[len(tokens) - n + 1:]
    return {tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tokens[i:i + n - 1] == end}


@dataclasses.dataclass(frozen=True)
class Text:
    """One text that a beam has said so far, or that is finished."""
    tokens: tuple = ()
    chosen: float = 0.0             # sum of log p of the tokens chosen; texts compete by it
    log_p: float = 0.0              # sum of log p of all, forced ones included: what is returned
    parent: int = 0                 # the beam of the step before that it goes on

    def worth(self, length_penalty):
        """log p a token, where the penalty is 1; more than 1 favours long texts."""
        return self.chosen / len(self.tokens) ** length_penalty


@dataclasses.dataclass
class Beams:
    """The texts of one source: K that go on and the best K that are finished, best first."""
    running: list
    finished: list = dataclasses.field(default_factory=list)
    done: bool = False

    def step(self, candidates, rules, size, length_penalty, stop):
        """Take the best 2K continuations, best first: at most K of them end, so K can go on."""
        n = len(candidates[0].tokens)
        ends = [t.tokens[-1] == rules.eos or n == rules.max_new for t in candidates]
        self.running = [t for t, end in zip(candidates, ends) if not end][:size]
        if self.done:
            return                  # its neighbours in the batch are not; what it says is not kept
        # Only what is among the best K may end: an end further down was not worth a beam.
        self.finished += [t for t, end in zip(candidates[:size], ends)
                          if end and t.chosen > float("-inf")]
        self.finished.sort(key=lambda t: -t.worth(length_penalty))
        del self.finished[size:]
        if n == rules.max_new:
            self.done = True
        elif len(self.finished) == size:
            # The best that a running text can reach. "likely" takes its worth now for it, although
            # with a penalty above 0 a longer text may still rise: "sure" takes the longest text.
            length = rules.max_new if stop == "sure" and length_penalty > 0 else n
            hope = self.running[0].chosen / length ** length_penalty
            self.done = stop == "full" or hope <= self.finished[-1].worth(length_penalty)


def continuations(scores, log_p, beams, size):
    """The best 2K one-token continuations of each source's running texts, best first.

    scores, log_p: (B, K, V), log-probabilities with and without the rules.
    """
    V = scores.size(2)
    so_far = torch.tensor([[t.chosen for t in b.running] for b in beams], dtype=scores.dtype,
                          device=scores.device)                                 # (B, K)
    total = (scores + so_far[:, :, None]).flatten(1)                            # (B, K*V)
    best, where = total.topk(2 * size)                                          # (B, 2K) each
    true = log_p.flatten(1).gather(1, where)                                    # (B, 2K)
    for b, *row in zip(beams, best.tolist(), true.tolist(), where.tolist()):
        yield [Text((*b.running[at // V].tokens, at % V), chosen,
                    b.running[at // V].log_p + more, at // V) for chosen, more, at in zip(*row)]


@torch.no_grad()
def search(reader, rules, size=5, length_penalty=1.0, stop="likely"):
    """The best text for each prompt of `reader`, and its log-probability.

    reader: the batch, its prompts read (reader.py), with room for K texts each. size: K.
    length_penalty: texts compete by log p / length ** penalty, the end counted. stop: when to look
    for no more: "full", as soon as K texts are finished; "likely", when no running one is better
    now than the worst of these; "sure", when none can become better. transformers calls these
    early_stopping True, False and "never".
    Returns [(tokens without the end, log p of all that was said, the end included)].
    """
    rules = dataclasses.replace(rules, max_new=min(rules.max_new, reader.room))
    logits = reader.logits[:, None]                                             # (B, 1, V)
    if 2 * size > logits.size(2):
        raise ValueError(f"got {size} beams and a vocabulary of {logits.size(2)}; expected at most "
                         "half of it; use fewer beams")
    beams = [Beams([Text()]) for _ in reader.prompts]
    tree = logits.new_zeros(len(beams), 1, 0, dtype=torch.bool)                 # (B, 1, 0)
    own = torch.eye(size, dtype=torch.bool, device=logits.device).expand(len(beams), -1, -1)
    for n in range(rules.max_new):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))    # bf16 is too coarse
        log_p = logits.log_softmax(-1)                                          # (B, K, V)
        scores = log_p.clone()
        read = ([*prompt, *t.tokens] for prompt, b in zip(reader.prompts, beams) for t in b.running)
        rules.forbid(scores.view(-1, scores.size(2)), n, read)
        for b, candidates in zip(beams, continuations(scores, log_p, beams, size)):
            b.step(candidates, rules, size, length_penalty, stop)
        if all(b.done for b in beams):
            break
        # A beam's past is its parent's past and itself.
        parents = torch.tensor([[t.parent for t in b.running] for b in beams], device=tree.device)
        newest = torch.tensor([[t.tokens[-1] for t in b.running] for b in beams],
                              device=tree.device)                               # (B, K)
        past = tree.gather(1, parents[:, :, None].expand(-1, -1, tree.size(2)))     # (B, K, N)
        tree = torch.cat((past, own), 2)                                        # (B, K, N+K)
        logits = reader.read(newest, tree)                                      # (B, K, V)
    best = [b.finished[0] if b.finished else Text() for b in beams]
    return [(list(t.tokens[:-1] if t.tokens[-1:] == (rules.eos,) else t.tokens), t.log_p)
            for t in best]
