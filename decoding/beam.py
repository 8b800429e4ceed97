"""Beam search: the K likeliest texts are continued, not only the best one.

The paper decodes tables with 5 beams and summaries with 6 (Li & Liang 2021, section 5.3). All beams
of a source live in ONE row of the batch: the K newest tokens are K queries, and the keys are the
prefix, the prompt and every token that any beam ever generated. A mask, the tree, says which of
those are a beam's own past. So the keys of prefix and prompt are stored once, and when a beam is
dropped and another is continued twice, nothing is copied or sorted: only the tree changes.
Not here: how a model is read (state.py). Letters as in model.py; K beams, N tokens generated after
the prompt by all beams together.
"""
import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """The text that a beam has generated so far, or one that is finished."""
    tokens: tuple = ()
    score_sum: float = 0.0          # sum of log p of the tokens chosen; texts compete by it
    log_p: float = 0.0              # sum of log p of all, forced ones included: what is returned
    parent: int = 0                 # the beam of the step before that it continues

    def score(self, length_penalty):
        """At penalty 1 the mean log p of a token; a larger penalty favours long texts."""
        return self.score_sum / len(self.tokens) ** length_penalty


@dataclasses.dataclass
class Beams:
    """The texts of one source: K that are continued and the best K finished ones, best first."""
    running: list
    finished: list = dataclasses.field(default_factory=list)
    done: bool = False

    def step(self, candidates, constraints, num_beams, length_penalty, early_stopping):
        """Take the best continuations, best first, K of which or more can go on."""
        n = len(candidates[0].tokens)
        last = n == constraints.max_new_tokens
        ends = [last or constraints.ended(t.tokens[-1]) for t in candidates]
        self.running = [t for t, end in zip(candidates, ends) if not end][:num_beams]
        if self.done:
            return                  # other sources of the batch are not; nothing more is finished
        # Only the best K candidates may end: a worse one would not have become a beam.
        self.finished += [t for t, end in zip(candidates[:num_beams], ends)
                          if end and t.score_sum > float("-inf")]
        self.finished.sort(key=lambda t: -t.score(length_penalty))
        del self.finished[num_beams:]
        if last:
            self.done = True
        elif len(self.finished) == num_beams:
            # The best score that a running text can reach. "false" takes its score now, although
            # with a penalty above 0 a longer text may do better: "never" takes the longest length.
            longest = early_stopping == "never" and length_penalty > 0
            length = constraints.max_new_tokens if longest else n
            best_possible = self.running[0].score_sum / length ** length_penalty
            self.done = (early_stopping == "true" or
                         best_possible <= self.finished[-1].score(length_penalty))


def continuations(scores, log_p, beams, count):
    """The best `count` one-token continuations of each source's running texts, best first.

    scores, log_p: (B, K, V), log-probabilities with and without the constraints.
    """
    V = scores.size(2)
    so_far = torch.tensor([[t.score_sum for t in b.running] for b in beams], dtype=scores.dtype
                          ).to(scores.device, non_blocking=True)                # (B, K)
    total = (scores + so_far[:, :, None]).flatten(1)                            # (B, K*V)
    best, indices = total.topk(count)                                           # (B, count) each
    true = log_p.flatten(1).gather(1, indices)                                  # (B, count)
    # One tensor, so Python waits for the GPU only once; fp32 holds integers exactly to 2^24.
    found = torch.stack((best, true, indices // V, indices % V)).tolist()
    for b, *row in zip(beams, *found):
        yield [Hypothesis((*b.running[int(at)].tokens, int(token)), score,
                          b.running[int(at)].log_p + more, int(at))
               for score, more, at, token in zip(*row)]


@torch.no_grad()
def beam_search(state, constraints, num_beams=5, length_penalty=1.0, early_stopping="false"):
    """The best text for each prompt of `state`, and its log-probability.

    state: a `DecodingState`, its prompts read, with a cache for K texts each. num_beams: K.
    length_penalty: texts compete by log p / length ** penalty, the end counted. early_stopping, as
    in transformers, says when to stop: "true", as soon as K texts are finished; "false", when no
    running text is better now than the worst of these; "never", when none can become better.
    Returns [(tokens without the end, log p of all that was generated, the end included)].
    """
    constraints = dataclasses.replace(constraints, max_new_tokens=min(
        constraints.max_new_tokens, state.max_new_tokens))
    logits = state.logits[:, None]                                              # (B, 1, V)
    # With E end tokens, at most K * E of K * (1 + E) candidates end, so K can go on.
    each = 1 + len(constraints.ends())
    if num_beams * each > logits.size(2):
        raise ValueError(f"got {num_beams} beams and a vocabulary of {logits.size(2)}; expected at "
                         f"most {logits.size(2) // each}; use fewer beams")
    beams = [Beams([Hypothesis()]) for _ in state.prompts]
    tree = logits.new_zeros(len(beams), 1, 0, dtype=torch.bool)                 # (B, 1, 0)
    own = torch.eye(num_beams, dtype=torch.bool, device=logits.device).expand(len(beams), -1, -1)
    for step in range(constraints.max_new_tokens):
        log_p = logits.log_softmax(-1)                                          # (B, K, V)
        scores = log_p.clone()
        sequences = ([*prompt, *t.tokens] for prompt, b in zip(state.prompts, beams)
                     for t in b.running)
        constraints.apply(scores.view(-1, scores.size(2)), step, sequences)
        for b, candidates in zip(beams, continuations(scores, log_p, beams, num_beams * each)):
            b.step(candidates, constraints, num_beams, length_penalty, early_stopping)
        if all(b.done for b in beams):
            break
        # A beam's past is its parent's past and itself.
        chosen = torch.tensor([[(t.parent, t.tokens[-1]) for t in b.running] for b in beams])
        parents, newest = chosen.to(tree.device, non_blocking=True).unbind(2)   # (B, K) each
        past = tree.gather(1, parents[:, :, None].expand(-1, -1, tree.size(2)))     # (B, K, N)
        tree = torch.cat((past, own), 2)                                        # (B, K, N+K)
        logits = state.step(newest, tree)                                       # (B, K, V)
    best = [b.finished[0] if b.finished else Hypothesis() for b in beams]
    return [(constraints.until_end(t.tokens), t.log_p) for t in best]
