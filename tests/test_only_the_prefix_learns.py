"""The proof, and prefix-tuning on one page: only the prefix learns.

The language model is frozen. In front of the keys and values of every layer stand P more, the
prefix. A table and an MLP compute them, and only these two learn (Li & Liang 2021, section 4).
A GPT-2 has one prefix. A BART has three: in its encoder, in its decoder, and in the attention from
decoder to encoder. A Llama has one, for its few key-value heads. Every test here is run with
all three, on random weights in float64.
"""
import pytest
import torch
from conftest import (
    batch_of,
    random_bart,
    random_gpt2,
    random_llama,
    some_pairs,
    some_prefix,
    some_trainer,
)
from torch import nn

from data.batches import Pair
from prefix import Prefix, target_loss, tensors_of

MODELS = {"gpt2": random_gpt2, "bart": random_bart, "llama": random_llama}
TINY = {    # so small that every derivative can be checked one by one
    "gpt2": dict(vocab_size=17, n_positions=16, n_embd=4, n_layer=2, n_head=2),
    "bart": dict(vocab_size=17, positions=16, d_model=4, encoder_layers=1, decoder_layers=2),
    "llama": dict(vocab_size=17, n_layer=2, heads=2, kv_heads=1, head_dim=2, width=4)}


@pytest.fixture(params=MODELS)
def architecture(request):
    if request.param != "gpt2":
        pytest.importorskip(f"{request.param}.model",
                            reason=f"the folder {request.param}/ is not here")
    return request.param


@pytest.fixture
def model(architecture):
    return MODELS[architecture]()


def tensors_in(model):
    """Every weight and every buffer of a model, by its name: copies."""
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(),
                                                      *model.named_buffers())}


def logits(model, prefix=None):
    """The logits of a batch of texts: (B, T, V)."""
    return model.head(model.hidden_states(**batch_of(model, some_pairs(4)).inputs, prefix=prefix))


# ---- what is frozen, and what learns

def test_the_frozen_model_is_bit_identical_after_training(model):
    """Five steps, with weight decay. No weight moves, none has a gradient or could get one.

    Would catch: a weight that was left trainable, an optimiser that decays frozen weights, a
    buffer that counts what it sees, gradients that take memory and are never used.
    """
    before, output = tensors_in(model), logits(model)
    trainer = some_trainer(model, weight_decay=0.1)
    for _ in range(5):
        trainer.train_step(some_pairs(4))
    for name, tensor in tensors_in(model).items():
        assert torch.equal(tensor, before[name]), name
    for name, weight in model.named_parameters():
        assert weight.requires_grad is False and weight.grad is None, name
    assert torch.equal(logits(model), output)       # without the prefix nothing has changed


def test_everything_in_the_prefix_learns(model):
    """The tables and both layers of the MLPs; they are all that the optimiser knows.

    Would catch: an optimiser that got the model too, a bias or one of BART's places that was
    forgotten, state of the optimiser for weights that never move.
    """
    trainer = some_trainer(model)
    before, prefix = tensors_in(trainer.learner), dict(trainer.learner.named_parameters())
    trainer.train_step(some_pairs(4))
    for name, parameter in prefix.items():
        assert not torch.equal(parameter, before[name]), f"{name} has learned nothing"
    optimized = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(optimized) == sorted(map(id, prefix.values()))
    assert {id(p) for p in trainer.optimizer.state} == set(optimized)
    assert len(prefix) == 5 * len(tensors_of(model.empty_prefix()))     # table, weights, biases


def test_the_loss_falls(model):
    """On four pairs, learned by heart. Would catch: a gradient with the wrong sign, a prefix that
    is trained and never put in front of the text.
    """
    trainer = some_trainer(model, steps=40, lr=3e-2)
    losses = [trainer.train_step(some_pairs(4)).item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


# ---- the gradient

def test_the_gradient_reaches_every_key_and_every_value(model):
    """In every layer, every head, every position; and from there it reaches tables and MLPs.

    Would catch: a layer that is given no prefix, keys without values, a prefix that is hidden from
    the text by the mask, one of BART's three that is computed and not used.
    """
    learner = some_prefix(model)
    prefix = learner()
    gradients = torch.autograd.grad(target_loss(model, prefix, batch_of(model, some_pairs(4))),
                                    tensors_of(prefix), retain_graph=True)
    for tensor, gradient in zip(tensors_of(prefix), gradients, strict=True):
        assert gradient.shape == tensor.shape                                   # (L, 2, 1, H, P, D)
        assert (gradient.abs().amax(5) > 0).all()
    torch.autograd.backward(tensors_of(prefix), gradients)
    for name, parameter in learner.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_gradient_is_the_slope_of_the_loss(architecture):
    """Finite differences, in float64, through the whole model, for each number of table and MLP.

    Would catch: a prefix detached in one layer, a gradient summed over the wrong dimension.
    """
    model = MODELS[architecture](**TINY[architecture])
    batch = batch_of(model, [Pair([3, 5, 7, 2, 16], 2), Pair([1, 16, 4], 1)])
    learner = some_prefix(model, length=2, mid_dim=1)
    names, theta = zip(*learner.named_parameters())

    def loss(*theta):
        prefix = torch.func.functional_call(learner, dict(zip(names, theta)))
        return target_loss(model, prefix, batch)

    assert torch.autograd.gradcheck(loss, theta)            # its own tolerances: 1e-6 and 1e-3


# ---- what it costs

def layers_with_saved_input(model, step):
    """The names of the linear layers whose input autograd saves for backward while `step` runs."""
    inputs, saved = {}, []          # the tensors themselves, so that no address is used twice

    def head(hidden):               # no module of its own: its weight is the word embedding
        inputs["head"] = hidden
        return type(model).head(model, hidden)

    model.head = head
    hooks = [layer.register_forward_pre_hook(
                 lambda layer, args, name=name: inputs.update({name: args[0]}))
             for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        step()
    for hook in hooks:
        hook.remove()
    del model.head
    addresses = {t.data_ptr() for t in saved}
    return {name for name, tensor in inputs.items() if tensor.data_ptr() in addresses}


def test_nothing_is_saved_that_only_a_weight_gradient_needs(model):
    """A linear layer's input is needed for the gradient of its weight, and for nothing else.

    Would catch: activations in memory for weights that do not learn. The control is fine-tuning,
    which needs the inputs of all linear layers, and of the head.
    """
    learner, batch = some_prefix(model), batch_of(model, some_pairs(4))
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert layers_with_saved_input(model, lambda: target_loss(model, learner(), batch)) == set()
    model.requires_grad_(True)
    saved = layers_with_saved_input(model, lambda: target_loss(model, learner(), batch))
    assert saved == linear | {"head"} and len(linear) >= 12


def test_the_mlp_runs_once_per_step(model):
    """On the P rows of its table. Would catch: a prefix computed for each row of the batch, as in
    other implementations, or for each batch of the dev set.
    """
    batches = [batch_of(model, some_pairs(n)) for n in (4, 8)]
    trainer, rows = some_trainer(model, dev=batches), []
    prefixes = [part for part in trainer.learner.modules() if isinstance(part, Prefix)]
    for prefix in prefixes:
        prefix.mlp.register_forward_hook(lambda mlp, args, output: rows.append(output.size(0)))
    trainer.train_step(some_pairs(4))
    assert rows == [5] * len(prefixes)
    trainer.dev_loss()
    assert rows == [5] * len(prefixes) * 2


# ---- what is stored

@pytest.mark.parametrize("mid_dim", [16, 0])
def test_folding_changes_no_logit(model, mid_dim):
    """After training the MLP is thrown away: keys and values are all that a task has to store.

    Would catch: a fold that loses the order of layers, heads, keys and values, or of BART's places.
    """
    trainer = some_trainer(model, mid_dim)
    trainer.train_step(some_pairs(4))
    prefix, folded = trainer.learner(), trainer.learner.fold()
    assert torch.equal(logits(model, prefix), logits(model, folded))
    assert not torch.equal(logits(model, folded), logits(model))        # and it does something
    assert all(tensor.requires_grad for tensor in tensors_of(prefix))
    assert not any(tensor.requires_grad for tensor in tensors_of(folded))


def test_a_prefix_leaves_nothing_behind_in_the_model(model):
    """Would catch: a prefix, or keys and values, kept on a module: the next call would see them."""
    def attributes():
        return {(name, key) for name, module in model.named_modules() for key in vars(module)}
    before = attributes()
    target_loss(model, some_prefix(model)(), batch_of(model, some_pairs(4))).backward()
    assert attributes() == before
