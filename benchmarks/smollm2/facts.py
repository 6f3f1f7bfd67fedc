"""A hundred easy questions with short exact answers, written by hand; "|" separates answers that are all right."""

from __future__ import annotations

FACTS = """
What is the capital of France? Paris
What is the capital of Italy? Rome
What is the capital of Spain? Madrid
What is the capital of Germany? Berlin
What is the capital of England? London
What is the capital of Japan? Tokyo
What is the capital of China? Beijing
What is the capital of Russia? Moscow
What is the capital of Egypt? Cairo
What is the capital of Greece? Athens
What is the capital of Canada? Ottawa
What is the capital of Portugal? Lisbon
What is the capital of Austria? Vienna
What is the capital of Ireland? Dublin
What is the capital of Sweden? Stockholm
What is the capital of the United States? Washington
What is the opposite of hot? cold|cool
What is the opposite of big? small|little|tiny
What is the opposite of day? night
What is the opposite of up? down
What is the opposite of left? right
What is the opposite of old? young|new
What is the opposite of happy? sad|unhappy
What is the opposite of fast? slow
What is the opposite of open? closed|close|shut
What is the opposite of black? white
What is the opposite of full? empty
What is the opposite of wet? dry
What is the opposite of light? dark|darkness|heavy
What is the opposite of good? bad|evil
What is the opposite of rich? poor
What is the opposite of early? late
What color is the sky on a clear day? blue
What color is grass? green
What color is snow? white
What color is a ripe banana? yellow
What color is blood? red
What color is coal? black
What color do you get when you mix red and white? pink
What color do you get when you mix blue and yellow? green
What color is an orange? orange
What color is milk? white
What day comes after Monday? Tuesday
What day comes after Friday? Saturday
What day comes before Monday? Sunday
What day comes after Wednesday? Thursday
What month comes after January? February
What month comes after June? July
What month comes before December? November
What season comes after winter? spring
How many days are in a week? 7|seven
How many months are in a year? 12|twelve
How many hours are in a day? 24|twenty-four
How many minutes are in an hour? 60|sixty
How many seconds are in a minute? 60|sixty
How many days are in a year? 365
How many legs does a spider have? 8|eight
How many legs does a dog have? 4|four
How many legs does an insect have? 6|six
How many wheels does a bicycle have? 2|two
How many sides does a triangle have? 3|three
How many sides does a square have? 4|four
How many letters are in the English alphabet? 26|twenty-six
How many continents are there? 7|seven
How many fingers are on one hand? 5|five
How many planets are in the solar system? 8|eight
What animal says meow? cat|cats|kitten
What animal barks? dog|dogs
What animal gives us milk? cow|cows|goat
What animal gives us wool? sheep
What animal makes honey? bee|bees|honeybee|honeybees
What is the largest animal in the world? blue whale|whale
What is the tallest animal in the world? giraffe
What is the fastest land animal? cheetah
What is a baby dog called? puppy|pup
What is a baby cat called? kitten
What is a baby cow called? calf
What do bees make? honey
What do cows eat? grass|hay
What is frozen water called? ice
What gas do humans need to breathe? oxygen
What is the closest star to Earth? sun|proxima centauri
What planet do we live on? Earth
What planet is known as the Red Planet? Mars
What is the largest planet in the solar system? Jupiter
What is the largest ocean on Earth? Pacific
What is the longest river in the world? Nile|Amazon
What is the highest mountain in the world? Everest
What is the chemical symbol for water? H2O|H₂O
What is the chemical symbol for gold? Au
What is the freezing point of water in degrees Celsius? 0|zero
What is the boiling point of water in degrees Celsius? 100
Who wrote Romeo and Juliet? Shakespeare
Who painted the Mona Lisa? Leonardo|da Vinci
Who was the first president of the United States? Washington
Who was the first person to walk on the moon? Armstrong
What language do people speak in Brazil? Portuguese
What language do people speak in France? French
What is the currency of Japan? yen
On which continent is Kenya? Africa
"""


def make_facts() -> list[dict[str, object]]:
    """{"question", "answer": [accepted, ...]} of every line."""
    pairs = [line.split("? ", 1) for line in FACTS.strip().splitlines()]
    return [{"question": f"{question}?", "answer": answers.split("|")} for question, answers in pairs]
