"""Write recover/named/blends/general.jsonl: plain instructions on many subjects, for where no hub is reached."""

from __future__ import annotations

import json
from pathlib import Path

PAGE = Path(__file__).parent.parent / "recover" / "named" / "blends" / "general.jsonl"

ASKS = (
    "What should everybody know about {subject}?",
    "Explain {subject} to somebody who has never heard of it.",
    "Write three short questions about {subject}, each with its answer.",
    "Write a letter to a friend in which you tell of {subject}.",
    "Describe {subject} in two sentences.",
    "Give me a list of five words that go with {subject}, and say why.",
    "Tell a short story that has to do with {subject}.",
    "What do people often get wrong about {subject}?",
    "Compare {subject} with something that is like it.",
    "How would you teach {subject} to a class of ten-year-olds?",
    "Write a poem of four lines about {subject}.",
    "Why do some people care a great deal about {subject}?",
)
SUBJECTS = """
the moon; rain; volcanoes; tides; glaciers; deserts; rivers; coral reefs; rainforests; caves; lightning; snow;
rainbows; earthquakes; the seasons; the planet Mars; comets; black holes; gravity; magnetism; friction; sound; light;
heat; electricity; atoms; crystals; rust; fire; soap; salt; sugar; vinegar; glass; steel; plastic; paper; rubber;
gold; oil; coal; wind power; solar panels; batteries; steam engines; bicycles; trains; sailing ships; airplanes;
bridges; elevators; clocks; telescopes; microscopes; cameras; radio; telephones; the internet; computers; robots;
passwords; spreadsheets; databases; maps; compasses; the human heart; blood; bones; muscles; sleep; dreams; memory;
eyesight; hearing; taste; fever; vaccines; antibiotics; allergies; teeth; skin; breathing; digestion; vitamins;
running; swimming; yoga; stretching; first aid; bees; ants; spiders; butterflies; frogs; snakes; turtles; sharks;
whales; octopuses; eagles; owls; penguins; parrots; chickens; horses; cows; sheep; pigs; dogs; cats; wolves; bears;
lions; elephants; giraffes; camels; bats; mice; dinosaurs; evolution; genes; cells; bacteria; viruses; mushrooms;
mosses; trees; roses; sunflowers; grasses; wheat; rice; maize; potatoes; tomatoes; beans; apples; bananas; oranges;
grapes; coffee; tea; chocolate; bread; cheese; soup; pasta; spices; honey; cooking rice; baking a cake; keeping a
garden; compost; painting a wall; mending a bicycle tyre; sewing on a button; knitting; pottery; woodwork; origami;
chess; card games; crossword puzzles; football; tennis; basketball; mountain climbing; fishing; camping; photography;
drawing; painting; sculpture; theatre; cinema; opera; jazz; folk songs; the violin; the piano; drums; singing;
dancing; poetry; novels; fairy tales; myths; proverbs; dictionaries; the alphabet; handwriting; punctuation; learning
a language; translation; sign language; speeches; interviews; letters of application; meetings; emails; newspapers;
libraries; museums; schools; universities; homework; exams; teachers; money; banks; taxes; insurance; savings; prices;
trade; markets; factories; farms; shops; contracts; patents; courts; juries; elections; parliaments; constitutions;
cities; villages; roads; railways; harbours; airports; hotels; hospitals; fire brigades; the post; ancient Egypt;
ancient Rome; the Silk Road; the Middle Ages; castles; printing; the age of sail; the industrial revolution;
calendars; fractions; percentages; probability; averages; triangles; circles; prime numbers; the number zero; negative
numbers; graphs; logic; friendship; patience; courage; honesty; curiosity; boredom; homesickness; birthdays; weddings;
moving house; a first day at work; a long train journey; a walk in the forest; a power cut; a lost key; a broken
window; a surprise guest
"""


def rows() -> list[dict[str, str]]:
    """Each instruction on each subject, in the order of the subjects."""
    subjects = [" ".join(subject.split()) for subject in SUBJECTS.split(";")]
    return [{"prompt": ask.format(subject=subject)} for subject in subjects for ask in ASKS]


if __name__ == "__main__":
    PAGE.write_text("".join(f"{json.dumps(row)}\n" for row in rows()), encoding="utf-8")
