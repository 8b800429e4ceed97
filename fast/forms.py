"""Which faster forms a run gets: from the flags of train.py and sample.py to functions.

The one place that chooses. --fast takes what helps on this device and leaves the loss and gradient
of the same batches as they are, but for rounding; the other flags ask for one form each. What is
asked for and impossible is an error, never the plain form without a word. README.md has what each
form is equal to, and what it gains.
"""
import sys

from data.batches import source_of
from data.pairs import dev_batches, pairs_of
from fast import tries
from fast.checkpointing import checkpoint_blocks
from fast.compiled import CompiledLoss
from fast.cuda_graph import RecordedGenerate, why_not_recordable
from fast.fp32_head import set_head
from fast.frozen_head import frozen_target_loss
from fast.packed import helps, pack
from fast.sdpa_attention import SDPAAttention
from prefix import target_loss

CLASHES = (("--compile", "--share-source", "tries come in too many shapes"),
           ("--compile", "--gradient-checkpointing", "a compiler decides what to keep itself"),
           ("--attention fused", "--share-source", "the kernel knows no tries"),
           ("--attention fused", "--compile", "the kernel cannot be compiled again"))


def refuse_clashes(settings):
    """Raises ValueError for flags of train.py that do not go together."""
    given = {"--compile": settings.compile, "--share-source": settings.share_source,
             "--gradient-checkpointing": settings.gradient_checkpointing,
             "--attention fused": settings.attention == "fused"}
    for one, other, why in CLASHES:
        if given[one] and given[other]:
            raise ValueError(f"got {one} with {other}; expected one of them: {why}; leave one out")


def set_attention(name, model):
    """Let `model` compute its attention as --attention says. Raises ValueError where it cannot."""
    if name == "sdpa":
        model.attention = SDPAAttention()
    elif name == "fused":
        from fast.triton_attention import TritonAttention  # triton behind it
        model.attention = TritonAttention(model.device, model.dtype)


def report(used):
    print(f"--fast: {', '.join(used) or 'nothing that helps here'}", file=sys.stderr)


def training_forms(settings, model, dev, batch_size):
    """(loss, collate, dev batches), as train.plain_forms has them; `model` is changed in place.

    dev: the pairs of the dev set, to be evaluated `batch_size` at a time. The attention is set
    already. Raises ValueError for what cannot be done here.
    """
    frozen = not any(weight.requires_grad for weight in model.parameters())
    loss, collate, to_batches, used = target_loss, pairs_of(model).collate, dev_batches, []
    if settings.compile:
        loss = CompiledLoss(settings.batch_size, model.device)
    elif settings.fast and frozen:
        loss, used = frozen_target_loss, ["frozen head"]
        if helps(model):
            pack(model, learning=True)
            used += ["packed weights"]
    if settings.fast and set_head(model):
        used += ["fp32 logits in one product"]
    if settings.gradient_checkpointing:
        checkpoint_blocks(model)
    if settings.share_source:
        collate = tries.collate
    if (settings.fast and model.attention.supports_tree
            and len(set(map(source_of, dev))) < len(dev)):      # else there is nothing to share
        to_batches = tries.dev_batches
        used += ["dev set in tries"]
    if settings.fast:
        report(used)
    return loss, collate, to_batches(dev, batch_size, model)


def decoding_form(settings, model, constraints, random):
    """A function like sample.generate for --graph, or None; `model` is changed in place.

    random: the generator that tokens are drawn from. Raises ValueError as `training_forms`.
    """
    if settings.attention == "fused" and settings.num_beams > 1:
        raise ValueError(f"got --attention fused and {settings.num_beams} beams; expected "
                         "--num-beams 1: the kernel knows no tree of texts; or use --attention "
                         "explicit")
    set_attention(settings.attention, model)
    if settings.fast:
        helped = helps(model, settings.num_beams * (settings.batch_size if settings.input else 1))
        report(["packed weights"] * helped + ["fp32 logits in one product"] * set_head(model))
        if helped:
            pack(model)
    if not settings.graph:
        return None
    reason = why_not_recordable(model, constraints, settings.num_beams)
    if reason:
        raise ValueError(f"got --graph, but {reason}; expected a CUDA GPU, --num-beams 1 and "
                         "nothing that only Python can decide; leave --graph out")
    return RecordedGenerate(random)
