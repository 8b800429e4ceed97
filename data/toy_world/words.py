"""The words of the invented world: its kinds of things, their attributes, and phrases for these.

Nothing here is real and nothing was copied: names are a beginning and an end put together ("Bel" +
"ora"), so that a model has to copy them, and everything else is a short list. Read it from KINDS
upwards: a kind has attributes, an attribute has values and three phrases. Not here: whole
sentences (text.py for pre-training, tables.py and headlines.py for the tasks).
"""
import dataclasses

# ---- names: beginnings are shared by all sorts, the end tells the sort
BEGINNINGS = ("Bel Tar Mon Kel Dor Ven Sar Lun Fal Gar Hol Jas Lor Mar Nor Pel Ros Sel Tol Vis Wen "
              "Yor Zan Rud Cor Dal Fen Gob Hum Kor Lan Mil Ner Pol Ral Sob Tib Hex Var Wix").split()
ENDINGS = {
    "thing": "ora amis evo ilda udo enka issa oro uxi eka una ylo ibis ando etta ukka".split(),
    "place": "ford wick mouth by field haven combe gate holm burgh port ness".split(),
    "person": "son berg sky man hart well smith feld ley quist".split(),
}
FIRST_NAMES = ("Ada Bruno Clara Dina Emil Fritz Greta Hugo Ida Jonas Karla Leo Mina Nils Olga Paul "
               "Rita Sven Tilda Vera").split()


def name_group(beginning, ending):
    """Which texts a made-up name may stand in: 0 test tables, 1 dev tables, 2 to 9 all others.

    So one name in five is never met before it has to be copied.
    """
    return (3 * beginning + ending) % 10


def make_name(sort, groups, rng):
    """A name of one sort ("thing", "place" or "person") out of the allowed groups of names."""
    while True:
        i, j = rng.randrange(len(BEGINNINGS)), rng.randrange(len(ENDINGS[sort]))
        if name_group(i, j) in groups:
            name = BEGINNINGS[i] + ENDINGS[sort][j]
            return f"{rng.choice(FIRST_NAMES)} {name}" if sort == "person" else name


# ---- values that are words
COLOURS = "red blue green yellow white black pink purple".split()
MATERIALS = "stone brick iron oak marble glass".split()
MONTHS = "April May June July August October".split()
GENRES = "comedy tragedy romance mystery fantasy satire".split()
POWERS = "steam diesel solar wind magnetic clockwork".split()

# ---- attributes: key -> (values, three phrases, the usual one first)
# Values: a list of words; the sort of a made-up name; "number" (10 to 99); "year" (1800 to 1999).
# A slash gives the verb twice, as main verb and as participle: "serves/serving"; "-" is no word.
ATTRIBUTES = {
    "place": ("place", "is/- located in {}", "stands/standing in {}", "can be/- found in {}"),
    "founder": ("person", "was/- founded by {}", "was/- started by {}", "was/- set up by {}"),
    "owner": ("person", "belongs/belonging to {}", "is/- owned by {}", "is/- in the hands of {}"),
    "opened": ("year", "was/- opened in {}", "has been/- open since {}", "dates/dating from {}"),
    "built": ("year", "was/- built in {}", "was/- put up in {}", "was/- finished in {}"),
    "released": ("year", "came/coming out in {}", "was/- released in {}",
                 "appeared/appearing in {}"),
    "price": ("number", "costs/costing {} crowns", "asks/asking {} crowns",
              "can be/- had for {} crowns"),
    "seats": ("number", "has/having {} seats", "seats/seating {} people",
              "has/having room for {} people"),
    "rooms": ("number", "has/having {} rooms", "offers/offering {} rooms",
              "counts/counting {} rooms"),
    "length": ("number", "is/- {} metres long", "measures/measuring {} metres",
               "reaches/reaching a length of {} metres"),
    "height": ("number", "is/- {} metres high", "rises/rising {} metres",
               "reaches/reaching up {} metres"),
    "colour": (COLOURS, "is/- painted {}", "is/- {} in colour", "shows/showing {} sides"),
    "material": (MATERIALS, "is/- made of {}", "consists/consisting of {}", "is/- all {}"),
    "genre": (GENRES, "is/being a work of {}", "tells/telling a {} story", "is/- known as {}"),
    "setting": ("place", "is/- set in {}", "plays/playing in {}", "takes place/taking place in {}"),
    "inventor": ("person", "was/- invented by {}", "was/- thought up by {}",
                 "comes/coming from the desk of {}"),
    "maker": ("thing", "is/- made by {}", "is/- produced by {}",
              "comes/coming from the house of {}"),
    "power": (POWERS, "runs/running on {} power", "uses/using {} power", "is/- driven by {} power"),
    "food": ("Thai French Greek Indian Turkish Polish Danish Welsh".split(),
             "serves/serving {} food", "offers/offering {} dishes", "cooks/cooking {} meals"),
    "chef": ("person", "has/having {} as its chef", "employs/employing the chef {}",
             "gets/getting its meals from {}"),
    "mood": ("quiet lively graceful rustic cosy noisy".split(),
             "has/having a {} mood", "feels/feeling {}", "is/- rather {}"),
    "view": ("lake forest desert valley meadow volcano".split(),
             "looks/looking over the {}", "has/having a {} view", "faces/facing the {}"),
    "exhibits": ("clocks masks fossils dolls coins kites".split(),
                 "shows/showing {}", "collects/collecting {}", "is/- full of {}"),
    "captain": ("person", "sails/sailing under {}", "is/- commanded by {}",
                "has/having {} as its captain"),
    "harbour": ("place", "sails/sailing from {}", "has/having its harbour in {}",
                "is/- at home in {}"),
    "cargo": ("coffee sugar cotton timber spices grain".split(),
              "carries/carrying {}", "is/- loaded with {}", "brings/bringing {}"),
    "venue": ("place", "is/- held in {}", "takes place/taking place in {}",
              "fills/filling the streets of {}"),
    "month": (MONTHS, "happens/happening in {}", "falls/falling in {}", "is/- planned for {}"),
    "theme": ("poetry dance puppets magic cheese kindness".split(),
              "is/- about {}", "celebrates/celebrating {}", "is/- devoted to {}"),
    "patron": ("person", "is/- paid for by {}", "is/- supported by {}", "counts/counting on {}"),
    "days": ("number", "lasts/lasting {} days", "goes/going on for {} days",
             "takes/taking {} days"),
    "singer": ("person", "is/- led by the singer {}", "has/having {} as its singer",
               "lets/letting {} sing"),
    "origin": ("place", "comes/coming from {}", "was/- formed in {}", "has/having its roots in {}"),
    "sound": ("jazz folk rock soul disco swing".split(),
              "plays/playing {}", "performs/performing {}", "is/- known for {}"),
    "albums": ("number", "has/having recorded {} albums", "has/having {} albums",
               "sold/selling {} albums"),
    "label": ("thing", "records/recording for {}", "is/- signed to {}",
              "is/- under contract with {}"),
    "author": ("person", "was/- written by {}", "is/being the work of {}",
               "comes/coming from the pen of {}"),
    "hero": ("person", "is/- about {}", "follows/following {}", "tells/telling of {}"),
    "pages": ("number", "has/having {} pages", "fills/filling {} pages",
              "runs/running to {} pages"),
    "publisher": ("thing", "is/- published by {}", "is/- printed by {}", "is/- sold by {}"),
    "director": ("person", "is/- directed by {}", "is/- in the care of {}",
                 "owes/owing its shape to {}"),
    "star": ("person", "stars/starring {}", "shows/showing {}", "has/having {} in the main part"),
    "studio": ("thing", "was/- shot by {}", "was/- filmed at {}", "was/- produced at {}"),
    "minutes": ("number", "runs/running for {} minutes", "lasts/lasting {} minutes",
                "goes/going on for {} minutes"),
    "river": ("thing", "crosses/crossing the {}", "spans/spanning the {}",
              "leads/leading over the {}"),
    "architect": ("person", "was/- designed by {}", "was/- drawn by {}", "is/being the work of {}"),
    "head": ("person", "is/- headed by {}", "is/- run by {}", "has/having {} as its head"),
    "subject": ("algebra drama chemistry Latin history painting".split(),
                "teaches/teaching {}", "is/- best at {}", "is/- proud of its {} lessons"),
    "pupils": ("number", "has/having {} pupils", "teaches/teaching {} pupils",
               "takes/taking {} pupils"),
    "flower": ("roses tulips lilies orchids poppies daisies".split(),
               "grows/growing {}", "is/- planted with {}", "smells/smelling of {}"),
    "gardener": ("person", "is/- looked after by {}", "is/- kept by {}",
                 "has/having {} as its gardener"),
    "trees": ("number", "has/having {} trees", "counts/counting {} trees",
              "offers/offering {} trees"),
    "lord": ("person", "is/- ruled by {}", "obeys/obeying {}", "has/having {} as its lord"),
    "ghost": ("person", "is/- haunted by {}", "hides/hiding the ghost of {}", "is/- afraid of {}"),
    "towers": ("number", "has/having {} towers", "counts/counting {} towers",
               "shows/showing {} towers"),
    "start": ("place", "starts/starting in {}", "sets out/setting out from {}",
              "leaves/leaving from {}"),
    "end": ("place", "ends/ending in {}", "leads/leading to {}", "goes/going as far as {}"),
    "stops": ("number", "has/having {} stops", "makes/making {} stops", "stops/stopping {} times"),
    "pieces": ("dice cards marbles tiles pegs pebbles".split(),
               "is/- played with {}", "uses/using {}", "needs/needing {}"),
    "players": ("number", "is/- meant for {} players", "takes/taking {} players",
                "has/having {} players"),
    "curtain": (COLOURS, "has/having a {} curtain", "is/- known for its {} curtain",
                "hides/hiding behind a {} curtain"),
    "costumes": ("velvet silk linen paper feather leather".split(),
                 "has/having {} costumes", "is/- known for its {} costumes",
                 "keeps/keeping {} costumes"),
    "rider": ("person", "is/- ridden by {}", "carries/carrying {}", "has/having {} as its rider"),
    "stable": ("place", "lives/living in {}", "is/- kept in {}", "has/having its stable in {}"),
    "coat": ("brown grey spotted chestnut dappled golden".split(),
             "has/having a {} coat", "wears/wearing a {} coat", "is/- {} all over"),
    "age": ("number", "is/- {} months old", "has/having lived for {} months",
            "was/- born {} months ago"),
    "fodder": ("oats hay apples carrots clover barley".split(),
               "eats/eating {}", "is/- fed with {}", "feeds/feeding on {}"),
    "father": ("thing", "is/being a child of {}", "descends/descending from {}",
               "has/having {} as its father"),
    "task": ("baking sewing welding ironing fishing digging".split(),
             "does/doing the {}", "is/- good at {}", "takes/taking over the {}"),
    "weight": ("number", "weighs/weighing {} kilos", "is/- {} kilos heavy",
               "reaches/reaching a weight of {} kilos"),
    "keeper": ("person", "is/- kept by {}", "is/- watched by {}", "has/having {} as its keeper"),
    "coast": ("place", "stands/standing on the coast of {}", "guards/guarding the coast of {}",
              "shines/shining over {}"),
    "lamp": (COLOURS, "has/having a {} lamp", "shines/shining {}", "sends/sending out {} light"),
}

# ---- kinds: two thirds to train on, a sixth to choose settings by, a sixth unseen in task training
TRAIN_KINDS = {
    "restaurant": "food place chef price mood seats",
    "hotel": "rooms place owner view opened price",
    "museum": "exhibits place founder opened price head",
    "ship": "captain harbour cargo length colour built",
    "festival": "venue month theme patron days founder",
    "band": "singer origin sound albums label founder",
    "novel": "author hero setting genre pages publisher",
    "film": "director star setting genre minutes studio",
    "bridge": "river place material length architect opened",
    "school": "head place subject pupils founder opened",
    "garden": "flower place gardener trees owner opened",
    "castle": "lord place ghost towers material built",
}
DEV_KINDS = {
    "railway": "start end power stops owner opened",
    "game": "inventor pieces players maker price released",
    "theatre": "director place curtain seats costumes founder",
}
UNSEEN_KINDS = {
    "horse": "rider stable coat age fodder father",
    "robot": "maker task inventor weight power released",
    "lighthouse": "keeper coast height lamp material built",
}
KINDS = {kind: keys.split() for kind, keys in (TRAIN_KINDS | DEV_KINDS | UNSEEN_KINDS).items()}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing of the world: its name, its kind, and its facts (key, value) in their order."""
    name: str
    kind: str
    facts: tuple[tuple[str, str], ...]

    def entries(self):
        """The whole sheet: name and kind first, then the facts."""
        return (("name", self.name), ("kind", self.kind), *self.facts)


def make_value(values, groups, rng):
    """One value of an attribute whose first column in ATTRIBUTES is `values`."""
    if values == "number":
        return str(rng.randrange(10, 100))
    if values == "year":
        return str(rng.randrange(1800, 2000))
    return make_name(values, groups, rng) if isinstance(values, str) else rng.choice(values)


def make_thing(kinds, groups, least, rng):
    """A thing of one of `kinds`, with `least` to 6 facts in a random order."""
    kind = rng.choice(kinds)
    keys = rng.sample(KINDS[kind], rng.randint(least, 6))
    facts = tuple((key, make_value(ATTRIBUTES[key][0], groups, rng)) for key in keys)
    return Thing(make_name("thing", groups, rng), kind, facts)


def forms(phrase):
    """(main verb, participle) of a phrase: "is/- made of {}" -> ("is made of {}", "made of {}")."""
    verb, rest = phrase.split("/")
    rest = rest.split(" ")
    participle = [] if rest[0] == "-" else rest[:len(verb.split())]
    rest = rest[1:] if rest[0] == "-" else rest[len(participle):]
    return " ".join([verb, *rest]), " ".join([*participle, *rest])


PHRASES = {key: [forms(phrase) for phrase in about[1:]] for key, about in ATTRIBUTES.items()}


def verbalize(fact, rng, usual=(60, 25, 15)):
    """One fact in words: (with a main verb, as a participle). usual: weights of the phrases."""
    key, value = fact
    verb, participle = rng.choices(PHRASES[key], usual)[0]
    return verb.replace("{}", value), participle.replace("{}", value)


def join_list(parts, last=" and "):
    """["a", "b", "c"] -> "a, b and c"."""
    return last.join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
