"""The three prefixes of an encoder-decoder: each place has its own table and its own MLP.

As in the paper's official code for BART, but each place may have its own length, or no prefix.
Learning, folding and initialisation: prefix.Prefix, three times. Letters as in model.py.
"""
from torch import nn

from bart.model import ThreePrefixes
from prefix import Prefix

PLACES = ThreePrefixes._fields


def parse_places(text, length, init):
    """{place: P} from --prefixes, as "encoder,cross=20"; empty: all three, of `length`."""
    lengths = {}
    for part in (text or ",".join(PLACES)).split(","):
        place, equals, number = part.strip().partition("=")
        if (place not in PLACES or place in lengths
                or equals and not (number.isdecimal() and int(number))):
            raise ValueError(f"got --prefixes {text}; expected one or more of {', '.join(PLACES)}, "
                             "each once, with =LENGTH, at least 1, or without")
        if number and init == "words":
            raise ValueError(f"got --prefixes {text} with --init words; expected no length: the "
                             "words of --init-text decide it")
        lengths[place] = int(number or length)
    return lengths


class BARTPrefix(nn.ModuleDict):
    """A `Prefix`, with its own table and MLP, in each place that is used.

    empty, width, mid_dim, init: as for `Prefix`, of a BART. lengths: {place: P}; a place that is
    left out has no prefix.
    """
    loss_per = "token"      # the mean over the tokens of a batch, as in the official code for BART

    def __init__(self, empty, width, lengths, mid_dim=800, init="random"):
        if not lengths or not set(lengths) <= set(PLACES):
            raise ValueError(f"got prefixes at {', '.join(lengths) or 'no place'}; expected one or "
                             f"more of {', '.join(PLACES)}")
        super().__init__({place: Prefix(getattr(empty, place), width, length, mid_dim, init)
                          for place, length in lengths.items()})
        self.shapes = {place: getattr(empty, place).shape for place in PLACES}  # of length 0

    @classmethod
    def for_model(cls, model, length, mid_dim=800, init="random", places="", n_layers=0):
        """Fresh prefixes that fit `model`. places: see `parse_places`; n_layers: as for `Prefix`.
        """
        empty = ThreePrefixes(*(part[-n_layers:] for part in model.empty_prefix()))
        lengths = parse_places(places, length, init)
        return cls(empty, model.width, lengths, mid_dim, init).to(model.device)

    def complete(self, found):
        """`ThreePrefixes` of {place: tensor}; what is not there gets the length 0."""
        like = next(iter(found.values()))
        return ThreePrefixes(*(found.get(place, like.new_empty(shape))
                               for place, shape in self.shapes.items()))

    def forward(self):
        return self.complete({place: prefix() for place, prefix in self.items()})

    def fold(self):
        return self.complete({place: prefix.fold() for place, prefix in self.items()})

    def num_stored_parameters(self):
        return sum(prefix.num_stored_parameters() for prefix in self.values())

    def initialize(self, target, steps=500, lr=1e-4):
        """Start each prefix at its own part of `target`; returns the mean of the errors left."""
        errors = [prefix.initialize(getattr(target, place), steps, lr)
                  for place, prefix in self.items()]
        return sum(errors) / len(errors)
