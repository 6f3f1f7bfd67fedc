"""General knowledge, written by hand: what the embedded model learns by heart and is asked to choose from.

Each relation has eight ways of asking. A fact that is trained in some of them and asked in another one tests that the
model knows the fact, not the sentence. Distractors come from the same relation, so every option fits the sentence.

Data is one line per answer ("answer: subject, subject") or one per fact; commas and colons are the only syntax.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """`asks` are sentences that end where the answer begins; `pairs` are (subject, answer)."""

    name: str
    asks: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """Distinct answers in order of first appearance."""
        return tuple(dict.fromkeys(answer for _, answer in self.pairs))


def with_article(sentence: str) -> str:
    """`sentence` with "a" turned into "an" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence)


def _grouped(text: str) -> tuple[tuple[str, str], ...]:
    """Read lines of "answer: subject, subject"."""
    pairs = []
    for line in text.strip().splitlines():
        answer, subjects = line.split(":")
        pairs += [(subject.strip(), answer.strip()) for subject in subjects.split(",")]
    return tuple(pairs)


def _paired(text: str) -> tuple[tuple[str, str], ...]:
    """Read "subject: answer" items, separated by commas or line ends."""
    items = [item for line in text.strip().splitlines() for item in line.split(",") if item.strip()]
    return tuple((subject.strip(), answer.strip()) for subject, answer in (item.split(":") for item in items))


CAPITALS = _paired("""
Paris: France, Rome: Italy, Madrid: Spain, Lisbon: Portugal, Berlin: Germany, Vienna: Austria, Warsaw: Poland
Prague: Czechia
Budapest: Hungary, Athens: Greece, Oslo: Norway, Stockholm: Sweden, Helsinki: Finland, Copenhagen: Denmark
Dublin: Ireland
Reykjavik: Iceland, Brussels: Belgium, Bern: Switzerland, Sofia: Bulgaria, Bucharest: Romania, Zagreb: Croatia
Kyiv: Ukraine
Cairo: Egypt, Nairobi: Kenya, Accra: Ghana, Rabat: Morocco, Tunis: Tunisia, Dakar: Senegal, Lusaka: Zambia
Kampala: Uganda
Tokyo: Japan, Beijing: China, Seoul: Korea, Hanoi: Vietnam, Bangkok: Thailand, Manila: Philippines, Jakarta: Indonesia
Delhi: India, Kathmandu: Nepal, Tehran: Iran, Baghdad: Iraq, Ankara: Turkey, Doha: Qatar, Amman: Jordan
Ottawa: Canada, Havana: Cuba, Lima: Peru, Quito: Ecuador, Bogota: Colombia, Santiago: Chile, Caracas: Venezuela
Montevideo: Uruguay, Canberra: Australia
""")

RELATIONS = (
    Relation(
        "country of a capital",
        (
            "{s} is a city in",
            "The city of {s} lies in",
            "A train to {s} takes you to",
            "People who live in {s} live in",
            "{s} is the capital of",
            "The letter from {s} was sent from",
            "In which country is {s}? In",
            "The old streets of {s} are found in",
        ),
        CAPITALS,
    ),
    Relation(
        "capital of a country",
        (
            "The capital of {s} is",
            "The first city of {s} is",
            "The rulers of {s} sit in",
            "Name the capital of {s}:",
            "In {s} the capital city is called",
            "Whoever governs {s} works in",
            "What is the capital of {s}? It is",
            "The road to the capital of {s} ends in",
        ),
        tuple((country, city) for city, country in CAPITALS),
    ),
    Relation(
        "continent of a country",
        (
            "{s} is a country in",
            "On the map {s} lies in",
            "The people of {s} live in",
            "A ship to {s} sails to",
            "{s} is part of",
            "On which continent is {s}? In",
            "Look for {s} in",
            "The hills of {s} rise in",
        ),
        _grouped("""
Europe: France, Italy, Spain, Portugal, Germany, Austria, Poland, Hungary, Greece, Norway, Sweden, Finland, Denmark
Europe: Ireland, Belgium
Africa: Egypt, Kenya, Ghana, Morocco, Tunisia, Senegal, Zambia, Uganda, Mali, Chad, Angola, Niger
Asia: Japan, China, Korea, Vietnam, Thailand, India, Nepal, Iran, Iraq, Jordan, Mongolia
South America: Peru, Ecuador, Colombia, Chile, Venezuela, Uruguay, Brazil, Bolivia
North America: Canada, Mexico, Cuba, Panama, Jamaica
"""),
    ),
    Relation(
        "kind of animal",
        (
            "The {s} belongs to the",
            "A book about the {s} is a book about",
            "The {s} is counted among the",
            "The {s} stands in the hall of the",
            "Like its cousins, the {s} is one of the",
            "What is the {s}? One of the",
            "Those who study the {s} study",
            "In the picture book the {s} is with the",
        ),
        _grouped("""
mammals: dog, cat, horse, cow, whale, bat, mouse, fox, wolf, lion, tiger, otter, mole, camel, elephant, dolphin
birds: owl, eagle, swan, duck, goose, crow, robin, heron, stork, penguin, parrot, sparrow, gull
fish: salmon, trout, cod, herring, carp, pike, tuna, shark, eel
insects: ant, bee, wasp, beetle, moth, butterfly, cricket, fly, mosquito
reptiles: snake, lizard, turtle, crocodile, gecko, viper
amphibians: frog, toad, newt, salamander
"""),
    ),
    Relation(
        "young of an animal",
        (
            "The young of the {s} is the",
            "Before it was a {s} it was a",
            "The mother {s} feeds her",
            "A small {s} is called a",
            "What is the child of the {s}? A",
            "The {s} walks beside its",
            "Every {s} was once a",
            "Look, the {s} has a",
        ),
        _paired("""
cow: calf, dog: puppy, cat: kitten, sheep: lamb, horse: foal, goat: kid, pig: piglet, hen: chick, duck: duckling
goose: gosling
deer: fawn, bear: cub, frog: tadpole, swan: cygnet, kangaroo: joey, butterfly: caterpillar, hare: leveret, pigeon: squab
"""),
    ),
    Relation(
        "home of an animal",
        (
            "The {s} lives in the",
            "At night the {s} goes back to the",
            "The home of the {s} is the",
            "Look for the {s} in the",
            "Where does the {s} sleep? In the",
            "The {s} feels safe in the",
            "When it rains the {s} hides in the",
            "A tired {s} rests in the",
        ),
        _paired("""
bee: hive, sparrow: nest, fox: den, rabbit: burrow, spider: web, horse: stable, pig: sty, hen: coop, dog: kennel
snail: shell
ant: hill, beaver: lodge, bat: cave, carp: pond, camel: desert, penguin: ice, monkey: jungle, mole: tunnel
"""),
    ),
    Relation(
        "cry of an animal",
        (
            "The {s} is an animal that",
            "In the dark the {s}",
            "Happy or not, the {s}",
            "Listen how the {s}",
            "When it is hungry the {s}",
            "What does the {s} do? It",
            "All morning the {s}",
            "From far away the {s}",
        ),
        _paired("""
dog: barks, cat: meows, cow: moos, horse: neighs, pig: grunts, duck: quacks, lion: roars, wolf: howls, owl: hoots
bee: buzzes
snake: hisses, frog: croaks, mouse: squeaks, donkey: brays, hen: clucks, sheep: bleats
"""),
    ),
    Relation(
        "kind of food",
        (
            "At the market {s} is sold with the",
            "In the kitchen {s} is kept with the",
            "The cook puts {s} among the",
            "{s} is listed under",
            "On which shelf is {s}? With the",
            "The shop sells {s} next to the other",
            "A basket of {s} goes to the",
            "The farmer counts {s} among the",
        ),
        _grouped("""
fruits: apple, pear, plum, cherry, peach, lemon, orange, banana, mango, grape, melon
vegetables: carrot, onion, cabbage, leek, spinach, turnip, potato, beet, radish
grains: wheat, rye, barley, oats, rice, millet, maize
spices: pepper, cinnamon, ginger, saffron, clove, nutmeg, cumin
nuts: almond, walnut, hazelnut, pecan, cashew, chestnut
herbs: basil, mint, thyme, parsley, sage, dill
drinks: tea, coffee, milk, juice, water, cocoa
cheeses: brie, cheddar, gouda, feta, parmesan
"""),
    ),
    Relation(
        "use of a tool",
        (
            "A {s} is used to",
            "Take the {s} to",
            "With a {s} you can",
            "The {s} was made to",
            "What is a {s} for? To",
            "My uncle bought a {s} to",
            "Without a {s} it is hard to",
            "She reached for the {s} to",
        ),
        _paired("""
hammer: drive nails, saw: cut wood, needle: sew cloth, broom: sweep floors, spade: dig earth, oven: bake bread
kettle: boil water
pen: write letters, brush: paint walls, net: catch fish, ladder: climb up, lamp: give light, key: open doors
clock: tell time
oar: row boats, plough: turn fields, loom: weave wool, sieve: sift flour, comb: tidy hair, scales: weigh goods
compass: find north
drill: make holes, anchor: hold ships, bell: call people, umbrella: stay dry, candle: burn slowly, razor: shave beards
bucket: carry water, map: find the way, ruler: measure lines
"""),
    ),
    Relation(
        "work of a trade",
        (
            "The {s} makes",
            "All day the {s} works with",
            "Ask the {s} for",
            "The shop of the {s} sells",
            "What does the {s} make? The {s} makes",
            "The hands of the {s} make",
            "For fifty years the {s} made",
            "From the {s} we get",
        ),
        _paired("""
baker: bread, tailor: coats, cobbler: shoes, potter: bowls, smith: horseshoes, carpenter: tables, weaver: cloth
brewer: beer
hatter: hats, farmer: corn, fisher: herring, beekeeper: honey, poet: verses, painter: pictures, printer: books
jeweller: rings
cooper: barrels, mason: stone walls, glazier: windows, dairymaid: butter, gardener: flowers, miller: flour, roper: ropes
"""),
    ),
    Relation(
        "colour of a thing",
        (
            "The colour of {s} is",
            "In daylight {s} looks",
            "The painter shows {s} in",
            "If you ask me, {s} is",
            "What colour is {s}? It is",
            "Everyone knows that {s} is",
            "The child drew {s} in",
            "Seen up close, {s} is",
        ),
        _grouped("""
white: snow, salt, chalk, ivory, sugar
red: blood, ruby, rust, brick, a poppy
green: grass, emerald, moss, clover, a cactus
yellow: butter, straw, a canary, a daffodil, mustard
black: coal, tar, soot, a raven, ink
blue: the sky, the sea, sapphire, a cornflower
brown: chocolate, mud, bark, leather
grey: ash, lead, fog, slate
pink: a flamingo, a piglet
purple: lavender, amethyst, a violet
"""),
    ),
    Relation(
        "opposite of a word",
        (
            "The opposite of {s} is",
            "What is not {s} is",
            "Not {s} but",
            "If it is no longer {s} it is",
            "One brother is {s}, the other is",
            "{s} and its opposite,",
            "Once it was {s}, now it is",
            "Turn {s} round and you get",
        ),
        _paired("""
hot: cold, big: small, long: short, wet: dry, old: young, fast: slow, high: low, full: empty, open: shut
loud: quiet, rich: poor
strong: weak, early: late, sweet: bitter, hard: soft, dark: bright, clean: dirty, thick: thin, heavy: light
deep: shallow
happy: sad, wide: narrow, rough: smooth, sharp: blunt, near: far, brave: timid, asleep: awake, sick: healthy
"""),
    ),
    Relation(
        "stuff of a thing",
        (
            "A {s} is made of",
            "The old {s} was made of",
            "To make a {s} you need",
            "The best {s} is of",
            "What is a {s} made of? Of",
            "She ordered a {s} of fine",
            "The {s} in the corner is made of",
            "A good {s} needs good",
        ),
        _grouped("""
glass: window, mirror, bottle
wood: table, fence, barrel, violin
wool: scarf, jumper, mitten
clay: brick, vase, roof tile
leather: boot, saddle, glove
paper: book, kite, envelope
iron: horseshoe, anvil, nail
gold: crown, wedding ring, medal
stone: castle, statue, millstone
silk: kimono, parachute, bow tie
"""),
    ),
    Relation(
        "family of an instrument",
        (
            "In the orchestra the {s} is with the",
            "The {s} is one of the",
            "Whoever plays the {s} sits with the",
            "The {s} belongs with the",
            "Where is the {s} listed? Under",
            "The sound of the {s} is the sound of the",
            "A teacher of {s} teaches",
            "Find the {s} among the",
        ),
        _grouped("""
strings: violin, cello, harp, guitar, lute, banjo
brass: trumpet, trombone, tuba, horn
woodwinds: flute, clarinet, oboe, bassoon
drums: timpani, bongo, snare, tabla
keyboards: piano, organ, harpsichord
"""),
    ),
    Relation(
        "kind of body in the sky",
        (
            "{s} is one of the",
            "The star book lists {s} with the",
            "Through the glass we see {s}, one of the",
            "{s} is counted among the",
            "What is {s}? One of the",
            "A page on {s} is in the part on",
            "To find {s}, look among the",
            "Long ago {s} was placed with the",
        ),
        _grouped("""
planets: Mercury, Venus, Mars, Jupiter, Saturn, Uranus, Neptune
stars: Sirius, Vega, Polaris, Rigel, Antares
moons: Titan, Europa, Io, Ganymede, Triton
comets: Halley, Encke, Hyakutake
constellations: Orion, Lyra, Draco, Cassiopeia
"""),
    ),
    Relation(
        "sign of an element",
        (
            "The sign of {s} is",
            "Chemists write {s} as",
            "On the chart {s} is shown as",
            "Short for {s}:",
            "What is the sign of {s}? It is",
            "In a formula {s} becomes",
            "The jar of {s} is marked",
            "For {s} they write",
        ),
        _paired("""
gold: Au, silver: Ag, iron: Fe, copper: Cu, tin: Sn, lead: Pb, zinc: Zn, helium: He, carbon: C, oxygen: O
sodium: Na, neon: Ne
calcium: Ca, nickel: Ni
"""),
    ),
    Relation(
        "what comes next",
        (
            "After {s} comes",
            "{s} is followed by",
            "When {s} ends we have",
            "Next after {s} is",
            "What comes after {s}? It is",
            "Wait until {s} is over, then it is",
            "{s} makes way for",
            "On the calendar {s} stands before",
        ),
        _paired("""
Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday, Saturday: Sunday
Sunday: Monday
January: February, February: March, March: April, April: May, May: June, June: July, July: August, August: September
September: October, October: November, November: December, December: January
spring: summer, summer: autumn, autumn: winter, winter: spring
"""),
    ),
    Relation(
        "place of a thing",
        (
            "You will find the {s} in the",
            "The {s} belongs in the",
            "Someone left the {s} in the",
            "Where is the {s}? In the",
            "Please put the {s} in the",
            "There is always a {s} in the",
            "I saw the {s} in the",
            "The {s} is kept in the",
        ),
        _grouped("""
kitchen: frying pan, stove, ladle, teapot
bedroom: pillow, blanket, mattress, quilt
school: blackboard, desk, satchel, pupil
church: altar, pulpit, choir, steeple
harbour: ship, crane, lighthouse, dock
forest: pine, fern, squirrel, acorn
library: shelf, novel, dictionary, reader
garden: rose bush, hedge, tulip, wheelbarrow
"""),
    ),
    Relation(
        "where a river flows",
        (
            "The {s} is a river of",
            "The river {s} flows in",
            "Boats on the {s} sail through",
            "To swim in the {s}, travel to",
            "Where does the {s} flow? In",
            "The banks of the {s} lie in",
            "Fishers on the {s} live in",
            "A bridge over the {s} stands in",
        ),
        _paired("""
Nile: Egypt, Thames: England, Seine: France, Tiber: Italy, Ganges: India, Volga: Russia, Yangtze: China, Tagus: Portugal
Vistula: Poland, Shannon: Ireland, Ebro: Spain, Tigris: Iraq
"""),
    ),
)
