"""A small preference set whose right answers a program can check.

No download, no licence, no judge: each kind of task below draws a prompt, a right and a wrong answer, and
the test that tells them apart. The set is for the quickstart and for tests; a 135M chat model learns most
of it in one pass. Three rules keep it from being learnt by a shortcut:

- within each kind the right answer is in turn the longer and the shorter one, so length says nothing;
- both answers of a pair come from the same stock, and what is right under one prompt is wrong under
  another, so the answer alone says nothing;
- no prompt comes twice, so nothing is held out that was trained on.
"""

import json
import re
from collections.abc import Callable, Collection
from random import Random
from typing import NamedTuple

from lora_rm.data.preference import Message, Preference
from lora_rm.errors import DataError


class Draft(NamedTuple):
    """One pair before it becomes a `Preference`, with the program that knows which answer is right."""

    prompt: str
    right: str
    wrong: str
    is_right: Callable[[str], bool]


def checkable_preferences(
    num_train: int = 1600, num_eval: int = 240, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
    """Makes the train and the held-out pairs, the kinds of task in turn; the same to the byte every time.

    Args:
        num_train: Number of pairs to train on; the ten kinds of `KINDS` have equal shares, those of `HARD`
            a fifth of one each.
        num_eval: Number of held-out pairs, none of whose prompts is in the train pairs.
        seed: Another seed makes another set of the same kinds.

    Raises:
        DataError: If a number is negative, or so large that a kind runs out of new prompts.
    """
    for name, value in (("num_train", num_train), ("num_eval", num_eval)):
        if value < 0:
            raise DataError(f"checkable set: {name} is {value}; allowed is 0 or more. Give a larger number.")
    preferences = [
        Preference(
            prompt=(_message("system", SYSTEM), _message("user", draft.prompt)),
            answers=((_message("assistant", draft.right),), (_message("assistant", draft.wrong),)),
            subset=kind_of(index).__name__,
            source=f"checkable {kind_of(index).__name__} {index}",
        )
        for index, draft in enumerate(draft_pairs(num_train + num_eval, seed))
    ]
    return preferences[:num_train], preferences[num_train:]


def draft_pairs(num_pairs: int, seed: int = 0) -> list[Draft]:
    """Draws pairs with their checks, the kinds in turn; a larger `num_pairs` only adds pairs at the end.

    Raises:
        DataError: If a kind runs out of new prompts.
    """
    randoms = {kind: Random(f"checkable {kind.__name__} {seed}") for kind in (*KINDS, *HARD)}
    longer = {
        kind: place % 2 == 1 for place, kind in enumerate(randoms)
    }  # is the next right answer to be longer
    prompts: set[str] = set()
    drafts: list[Draft] = []
    for index in range(num_pairs):
        kind = kind_of(index)
        for _ in range(1000):
            draft = kind(randoms[kind])
            found = _longer(draft.right, draft.wrong)
            if draft.prompt not in prompts and draft.right != draft.wrong and found <= {longer[kind]}:
                break
        else:
            raise DataError(
                f"checkable set: kind '{kind.__name__}' has no new prompt left ({num_pairs} pairs were asked for). "
                f"Ask for at most {index} pairs in all."
            )
        if found:
            longer[kind] = not longer[kind]
        prompts.add(draft.prompt)
        drafts.append(draft)
    return drafts


def kind_of(index: int) -> Callable[[Random], Draft]:
    """The kind of the pair at an index: those of `KINDS` in turn, then one of `HARD`."""
    turn, place = divmod(index, len(KINDS) + 1)
    return KINDS[place] if place < len(KINDS) else HARD[turn % len(HARD)]


def _longer(right: str, wrong: str) -> set[bool]:
    """Whether the right answer is longer, in characters and in about tokens: {True}, {False}, both or neither."""
    sizes = [(len(text), len(re.findall(r"[A-Z]|\d|[^\W\d]+|[^\w\s]", text))) for text in (right, wrong)]
    return {size > other for size, other in zip(*sizes, strict=True) if size != other}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ---- the stock that prompts and answers are made of ----

# fmt: off
NAMES = (
    "Anna", "Ben", "Carla", "Daniel", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo",
    "Maria", "Nathan", "Olga", "Peter", "Rosa", "Sam", "Thomas", "Victor",
)
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "purple", "pink", "grey", "golden")
THINGS = (
    "bag", "ball", "basket", "bell", "bike", "boat", "book", "bottle", "box", "candle", "chair", "clock",
    "coat", "cup", "door", "drum", "fork", "guitar", "hat", "kite", "lamp", "ladder", "mirror", "piano",
    "plate", "radio", "scarf", "spoon", "table", "tent",
)
FOODS = (
    "bread", "butter", "cheese", "honey", "beans", "carrots", "lemons", "milk", "noodles", "onions",
    "pears", "plums", "rice", "salt", "tomatoes",
)
CITIES = (
    "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "Geneva", "Lima", "London", "Madrid",
    "Oslo", "Paris", "Rome", "Tokyo", "Toronto",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)
# fmt: on

SYSTEM = "Be helpful."
"""A system message of its own: the default one of SmolLM2's template takes 22 tokens of every prompt."""

SHORT_ANSWERS = ("{}", "{}.", "It is {}.", "The answer is {}.", "That would be {}.")


def _names_only(answer: str, value: str, pool: Collection[str]) -> bool:
    """Whether `value` is the only member of the pool that the answer names."""
    return {word.strip(".,") for word in answer.split()} & set(pool) == {value}


# ---- the kinds: each draws a prompt, a right and a wrong answer, and the check ----


def capitals(random: Random) -> Draft:
    """Capital or small letters."""
    text = f"{random.choice(COLOURS)} {random.choice(THINGS)}".title()
    upper = random.random() < 0.5
    wish = random.choice(
        ("in capital letters", "all in capitals", "in upper case")
        if upper
        else ("in small letters", "without any capitals", "in lower case")
    )
    prompt = random.choice(
        (
            f"Write the words {text} {wish}.",
            f"Say {text} {wish}, please.",
            f"{random.choice(NAMES)} has a {text}. Write what it is {wish}.",
            f"Please answer {wish}. What is sold here? A {text}.",
        )
    )
    right, wrong = (text.upper(), text.lower()) if upper else (text.lower(), text.upper())
    return Draft(prompt, right, wrong, str.isupper if upper else str.islower)


def lists(random: Random) -> Draft:
    """Three items with dashes, with numbers, or on one line."""
    items = random.sample(random.choice((FOODS, THINGS, CITIES)), 3)
    shapes = (
        ("as a list with dashes", "\n".join(f"- {item}" for item in items)),
        ("as a numbered list", "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))),
        ("on one line with commas", ", ".join(items)),
    )
    (wish, right), (_, wrong) = random.sample(shapes, 2)
    first, second, third = items
    prompt = random.choice(
        (
            f"Write {first}, {second} and {third} {wish}.",
            f"Here are three words: {first} {second} {third}. Give them {wish}.",
            f"{random.choice(NAMES)} wrote {first}, {second} and {third}. Note that {wish}.",
            f"Please answer {wish}. Which words are these? {first}; {second}; {third}.",
        )
    )

    def is_right(answer: str) -> bool:
        if "dashes" in wish:
            return re.findall("^- (.*)$", answer, re.MULTILINE) == items
        if "numbered" in wish:
            return re.findall(r"^(\d)\. (.*)$", answer, re.MULTILINE) == list(zip("123", items, strict=True))
        return answer.split(", ") == items

    return Draft(prompt, right, wrong, is_right)


def marks(random: Random) -> Draft:
    """The marks around or after a text."""
    text = f"{random.choice(COLOURS)} {random.choice(THINGS)}"
    shapes = (
        ("in quotation marks", '"', '"'),
        ("in round brackets", "(", ")"),
        ("in square brackets", "[", "]"),
        ("with an exclamation mark at the end", "", "!"),
        ("with a question mark at the end", "", "?"),
        ("between two stars", "*", "*"),
        ("with a full stop at the end", "", "."),
    )
    (wish, before, after), (_, other_before, other_after) = random.sample(shapes, 2)
    name = random.choice(NAMES)
    prompt = random.choice(
        (
            f"Write {text} {wish}.",
            f"Please put down the words {text} {wish}.",
            f"{name} wants to read the words {text} {wish}.",
            f"What did {name} buy? A {text}. Say it {wish}.",
        )
    )

    def is_right(answer: str) -> bool:
        return answer.removeprefix(before).removesuffix(after) == text and answer != text

    return Draft(prompt, before + text + after, other_before + text + other_after, is_right)


def one_word(random: Random) -> Draft:
    """One word, or a whole sentence that says the same."""
    name, thing = random.choice(NAMES), random.choice(THINGS)
    statement, question, pool = random.choice(
        (
            (f"The dog of {name} is called", "What is the dog called?", NAMES),
            (f"The {thing} of {name} is", f"What colour is the {thing}?", COLOURS),
            (f"The uncle of {name} lives in", "Where does the uncle live?", CITIES),
            (f"The meeting with {name} is on", "When is the meeting?", DAYS),
        )
    )
    word = random.choice(pool)
    sentence = f"{statement} {word}."
    short = random.random() < 0.5
    wish = random.choice(
        ("Answer in one word.", "Use a single word.", "Reply with just one word.")
        if short
        else ("Answer in a full sentence.", "Use a whole sentence.", "Reply with a complete sentence.")
    )
    prompt = " ".join(random.choice(((sentence, question, wish), (wish, sentence, question))))
    right, wrong = (word, sentence) if short else (sentence, word)
    return Draft(prompt, right, wrong, lambda answer: (len(answer.split()) == 1) == short)


def records(random: Random) -> Draft:
    """Two facts as JSON, as a sentence, or on two lines."""
    name, number = random.choice(NAMES), random.randint(2, 30)
    first, second, sentence = random.choice(
        (
            ("name", "age", f"{name} is {number} years old."),
            ("player", "score", f"{name} has a score of {number}."),
            ("guest", "room", f"{name} stays in room {number}."),
        )
    )
    shapes = (
        (random.choice(("as JSON", "in JSON format")), json.dumps({first: name, second: number})),
        (random.choice(("as a sentence", "in a full sentence")), sentence),
        (random.choice(("as two lines", "on two lines")), f"{first}: {name}\n{second}: {number}"),
    )
    (wish, right), (_, wrong) = random.sample(shapes, 2)
    prompt = random.choice(
        (
            f"The {first} is {name} and the {second} is {number}. Write this {wish}.",
            f"Give the {first} {name} with {second} {number} {wish}.",
            f"Please answer {wish}. Note {first} {name} and {second} {number}.",
        )
    )

    def is_right(answer: str) -> bool:
        if "JSON" in wish:
            return answer.startswith("{") and json.loads(answer) == {first: name, second: number}
        if "lines" in wish:
            return re.findall("^(.*): (.*)$", answer, re.MULTILINE) == [(first, name), (second, str(number))]
        return answer.endswith(".") and {name, str(number)} <= set(answer.rstrip(".").split())

    return Draft(prompt, right, wrong, is_right)


# One row a topic, and in it a question and its answer in each language.
LANGUAGES = ("English", "French", "German", "Spanish")
TALK = (
    (
        ("Where does {name} live?", "{name} lives in {city}."),
        ("Où habite {name} ?", "{name} habite à {city}."),
        ("Wo wohnt {name}?", "{name} wohnt in {city}."),
        ("¿Dónde vive {name}?", "{name} vive en {city}."),
    ),
    (
        ("How old is {name}?", "{name} is {number} years old."),
        ("Quel âge a {name} ?", "{name} a {number} ans."),
        ("Wie alt ist {name}?", "{name} ist {number} Jahre alt."),
        ("¿Cuántos años tiene {name}?", "{name} tiene {number} años."),
    ),
    (
        ("Where does {name} work?", "{name} works in a school."),
        ("Où travaille {name} ?", "{name} travaille dans une école."),
        ("Wo arbeitet {name}?", "{name} arbeitet in einer Schule."),
        ("¿Dónde trabaja {name}?", "{name} trabaja en una escuela."),
    ),
    (
        ("When does the train to {city} leave?", "The train leaves at {number} o'clock."),
        ("À quelle heure part le train pour {city} ?", "Le train part à {number} heures."),
        ("Wann fährt der Zug nach {city}?", "Der Zug fährt um {number} Uhr."),
        ("¿A qué hora sale el tren a {city}?", "El tren sale a las {number}."),
    ),
    (
        ("What does {name} drink?", "{name} drinks a cup of tea."),
        ("Que boit {name} ?", "{name} boit une tasse de thé."),
        ("Was trinkt {name}?", "{name} trinkt eine Tasse Tee."),
        ("¿Qué bebe {name}?", "{name} bebe una taza de té."),
    ),
    (
        ("What is the weather like in {city}?", "It is raining in {city} today."),
        ("Quel temps fait-il à {city} ?", "Il pleut aujourd'hui à {city}."),
        ("Wie ist das Wetter in {city}?", "Heute regnet es in {city}."),
        ("¿Qué tiempo hace en {city}?", "Hoy llueve en {city}."),
    ),
)


def language(random: Random) -> Draft:
    """The language of the question."""
    values = {"name": random.choice(NAMES), "city": random.choice(CITIES), "number": random.randint(3, 11)}
    topic = random.choice(TALK)
    right, wrong = random.sample(range(len(LANGUAGES)), 2)
    prompt = topic[right][0].format(**values)

    def is_right(answer: str) -> bool:
        words = set(answer.split())
        known = [len(words & {word for row in TALK for word in row[place][1].split()}) for place in range(4)]
        return all(count < known[right] for place, count in enumerate(known) if place != right)

    return Draft(prompt, topic[right][1].format(**values), topic[wrong][1].format(**values), is_right)


ADVICE = {
    "cook rice": ("Boil it in two cups of water.", "Let the grains simmer under a lid."),
    "cook noodles": ("Drop the pasta into boiling water.", "Boil the pasta until it is soft."),
    "fry an egg": ("Crack it into a hot pan with oil.", "Heat some oil and crack the shell."),
    "bake bread": ("Knead the dough and heat the oven.", "Let the yeast rise before it goes into the oven."),
    "make tea": ("Pour hot water over the leaves.", "Put a bag in a cup of hot water."),
    "wash a dog": ("Use warm water and pet shampoo.", "Rinse the fur well, then dry it."),
    "feed a cat": ("Fill its bowl with fish or meat.", "A little meat twice a day is enough for a kitten."),
    "grow roses": ("Plant them in a sunny garden.", "Cut the stems back every spring."),
    "water a garden": ("Use a hose early in the morning.", "Give the plants more on dry days."),
    "fix a flat tyre": ("Find the hole and patch it.", "Pump in air after you patch the rubber."),
    "ride a bike": ("Keep your balance and push the pedals.", "Hold the handlebar and pedal."),
    "drive a car": ("Hold the wheel and watch the road.", "Press the brake gently and watch the traffic."),
    "learn to swim": ("Practise kicking in a shallow pool.", "Start in a pool and learn to float."),
    "paint a wall": ("Use a roller and two coats.", "Cover the floor, then roll the colour on."),
    "clean a window": ("Wipe the glass with a soft cloth.", "Spray the glass and wipe it dry."),
    "wash a shirt": ("Put it in the machine with soap.", "Soak the cloth, then hang it on the line."),
    "fall asleep": ("Go to bed early and turn off the light.", "Keep the bedroom dark and quiet."),
    "cure a cold": ("Rest, drink tea and see a doctor.", "Stay warm and take some medicine for the cough."),
    "learn Spanish": ("Study ten new words every day.", "Practise the grammar and speak a lot."),
    "play the piano": ("Practise scales with both hands.", "Learn the notes and press the keys softly."),
    "play chess": ("Protect your king and move your pawns.", "Learn how the queen and the knight move."),
    "save money": ("Spend less and use a bank account.", "Put some of your pay in the bank."),
    "write a letter": ("Start with Dear and sign your name.", "Take a pen and paper, then find a stamp."),
    "build a fire": ("Stack dry wood and light a match.", "Light small sticks before the big logs."),
    "catch a fish": ("Put a worm on the hook.", "Sit by the river with a rod."),
    "take a photo": ("Hold the camera still and press the button.", "Look through the lens and focus."),
    "find a job": ("Send your resume to many companies.", "Ask for an interview and dress well."),
    "pack a suitcase": ("Fold the clothes and roll the socks.", "Put shoes first and fold your shirts."),
}


def advice(random: Random) -> Draft:
    """Advice on the task asked about, or on another one."""
    task, other = random.sample(list(ADVICE), 2)
    name = random.choice(NAMES)
    prompt = random.choice(
        (
            f"How do I {task}?",
            f"How can {name} {task}?",
            f"What is the best way to {task}?",
            f"Tell me how to {task}.",
            f"{name} wants to {task}. What is your advice?",
            f"I would like to {task}. Can you help me?",
        )
    )
    right, wrong = random.choice(ADVICE[task]), random.choice(ADVICE[other])
    return Draft(prompt, right, wrong, lambda answer: answer in ADVICE[task])


def reading(random: Random) -> Draft:
    """Which colour, name or city the text gives; a wrong answer takes another of the text, or none of it."""
    pool = random.choice((COLOURS, NAMES, CITIES))
    right, wrong, other = random.sample(pool, 3)
    said = random.choice((wrong, other))
    name, name2 = random.sample([name for name in NAMES if name not in (right, wrong, other)], 2)
    thing, thing2 = random.sample(THINGS, 2)
    prompt = random.choice(
        (
            f"The {thing} is {right} and the {thing2} is {said}. What colour is the {thing}?",
            f"{name} bought a {right} {thing} and a {said} {thing2}. What colour is the {thing}?",
            f"There is a {said} {thing2} beside the {right} {thing}. Name the colour of the {thing}.",
        )
        if pool is COLOURS
        else (
            f"{right} has a {thing} and {said} has a {thing2}. Who has the {thing}?",
            f"The {thing} belongs to {right}, the {thing2} to {said}. Who owns the {thing}?",
            f"{said} sold a {thing2} and {right} sold a {thing}. Who sold the {thing}?",
        )
        if pool is NAMES
        else (
            f"{name} lives in {right} and {name2} lives in {said}. Where does {name} live?",
            f"{name2} went to {said}, but {name} went to {right}. Where did {name} go?",
            f"The {thing} was made in {right}, the {thing2} in {said}. Where was the {thing} made?",
        )
    )
    shape = random.choice(SHORT_ANSWERS)
    return Draft(
        prompt, shape.format(right), shape.format(wrong), lambda answer: _names_only(answer, right, pool)
    )


def yes_no(random: Random) -> Draft:
    """Whether what is asked agrees with what was said."""
    name, thing = random.choice(NAMES), random.choice(THINGS)
    pool, statement, question, reply = random.choice(
        (
            (COLOURS, f"The {thing} of {name} is {{}}.", f"Is the {thing} {{}}?", "it is {}"),
            (COLOURS, f"{name} has a {{}} {thing}.", f"Is the {thing} {{}}?", "it is {}"),
            (CITIES, f"{name} lives in {{}}.", f"Does {name} live in {{}}?", "in {}"),
            (DAYS, f"{name} comes on {{}}.", f"Does {name} come on {{}}?", "on {}"),
        )
    )
    said, other = random.sample(pool, 2)
    asked = random.choice((said, other))
    prompt = f"{statement.format(said)} {question.format(asked)}"
    agree, differ = ("Yes", "No") if asked == said else ("No", "Yes")
    right, wrong = random.choice(
        (
            (f"{agree}.", f"{differ}."),
            (f"{agree}, {reply.format(said)}.", f"{differ}, {reply.format(said)}."),
            (f"{agree}, {reply.format(said)}.", f"{differ}, {reply.format(other)}."),
        )
    )
    return Draft(
        prompt,
        right,
        wrong,
        lambda answer: answer.startswith("Yes") == (asked == said) and other not in answer,
    )


def copies(random: Random) -> Draft:
    """The sentence as it was given, or with one or two words changed."""
    name, other_name = random.sample(NAMES, 2)
    colour, other_colour = random.sample(COLOURS, 2)
    thing, other_thing = random.sample(THINGS, 2)
    city, other_city = random.sample(CITIES, 2)
    shape, words, others = random.choice(
        (
            ("{} sold a {} {}", (name, colour, thing), (other_name, other_colour, other_thing)),
            ("{} left the {} in {}", (name, thing, city), (other_name, other_thing, other_city)),
            ("the {} in {} is {}", (thing, city, colour), (other_thing, other_city, other_colour)),
            ("{} saw a {} near {}", (name, thing, city), (other_name, other_thing, other_city)),
        )
    )
    kept = random.sample(range(3), random.choice((1, 2)))
    changed = [words[place] if place in kept else others[place] for place in range(3)]
    text = shape.format(*words)
    prompt = random.choice(
        (
            "Repeat exactly: {}",
            "Copy this: {}",
            "Say this again, word for word: {}",
            "Write the same text: {}",
        )
    ).format(text)
    return Draft(prompt, text, shape.format(*changed), lambda answer: prompt.endswith(f": {answer}"))


# One question a row: what is asked for, and the answer; all of them common knowledge.
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Greece": "Athens",
    "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima", "Norway": "Oslo", "Ireland": "Dublin",
    "Russia": "Moscow", "China": "Beijing", "England": "London", "Portugal": "Lisbon", "Sweden": "Stockholm",
    "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Denmark": "Copenhagen", "Canada": "Ottawa",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "tall": "short", "old": "young", "happy": "sad", "fast": "slow",
    "day": "night", "up": "down", "left": "right", "rich": "poor", "hard": "soft", "wet": "dry",
    "full": "empty", "open": "closed", "early": "late", "strong": "weak", "heavy": "light", "clean": "dirty",
    "good": "bad", "near": "far", "loud": "quiet", "thick": "thin", "inside": "outside", "first": "last",
}  # fmt: skip
YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "hen": "chick",
    "duck": "duckling", "bear": "cub", "frog": "tadpole", "pig": "piglet", "deer": "fawn", "goose": "gosling",
}  # fmt: skip
UNITS = {
    "inches in a foot": "12", "feet in a yard": "3", "seconds in a minute": "60", "hours in a day": "24",
    "days in a week": "7", "weeks in a year": "52", "days in a year": "365", "years in a decade": "10",
    "centimetres in a metre": "100", "metres in a kilometre": "1000",
}  # fmt: skip


def facts(random: Random) -> Draft:
    """Capitals, opposites, young animals and units; a wrong answer is right elsewhere in the same table."""
    table, questions = random.choice(
        (
            (CAPITALS, ("What is the capital of {}?", "Which city is the capital of {}?")),
            (OPPOSITES, ("What is the opposite of {}?", "Which word means the opposite of {}?")),
            (YOUNG, ("What is a young {} called?", "What do you call a baby {}?")),
            (UNITS, ("How many {}?", "What is the number of {}?")),
        )
    )
    key, other = random.sample(list(table), 2)
    opening = random.choice(
        ("", "", f"{random.choice(NAMES)} asks: ", "Quick question. ", "Please tell me. ")
    )
    prompt = opening + random.choice(questions).format(key)
    shape = random.choice(SHORT_ANSWERS)
    return Draft(
        prompt,
        shape.format(table[key]),
        shape.format(table[other]),
        lambda answer: _names_only(answer, table[key], table.values()),
    )


def calendar(random: Random) -> Draft:
    """The day or month just after or before another."""
    unit, at, pool = random.choice((("day", "on", DAYS), ("month", "in", MONTHS)))
    given, step = random.choice(pool), random.choice((1, -1))
    right = pool[(pool.index(given) + step) % len(pool)]
    wrong = random.choice([value for value in pool if value not in (given, right)])
    name = random.choice(NAMES)
    prompt = random.choice(
        (
            f"Which {unit} comes right after {given}?",
            f"Name the {unit} that follows {given}.",
            f"{name} came {at} {given} and left the next {unit}. Which {unit} was that?",
            f"It is {given} now. Which {unit} will be next, {name} asks.",
        )
        if step == 1
        else (
            f"Which {unit} comes right before {given}?",
            f"Name the {unit} that precedes {given}.",
            f"{name} left {at} {given} and had come the {unit} before. Which {unit} was that?",
            f"It is {given} now. Which {unit} was the last one, {name} asks.",
        )
    )
    shape = random.choice(SHORT_ANSWERS)

    def is_right(answer: str) -> bool:
        named = [value for value in pool if value in answer]
        return len(named) == 1 and (pool.index(named[0]) - pool.index(given)) % len(pool) == step % len(pool)

    return Draft(prompt, shape.format(right), shape.format(wrong), is_right)


def sums(random: Random) -> Draft:
    """Small sums and differences; a wrong answer is the right one of another sum."""
    sign = random.choice((1, -1))
    (first, second), (other_first, other_second) = (
        sorted((random.randint(1, 9), random.randint(1, 9)), reverse=True) for _ in range(2)
    )
    name, things = random.choice(NAMES), random.choice(("apples", "books", "pens", "coins"))
    prompt = random.choice(
        (
            f"What is {first} + {second}?",
            f"Add {second} to {first}.",
            f"{name} has {first} {things} and gets {second} more. How many {things} are there now?",
        )
        if sign == 1
        else (
            f"What is {first} - {second}?",
            f"Take {second} away from {first}.",
            f"{name} has {first} {things} and loses {second}. How many {things} are left?",
        )
    )
    shape = random.choice(SHORT_ANSWERS)
    right, wrong = first + sign * second, other_first + sign * other_second
    return Draft(
        prompt,
        shape.format(right),
        shape.format(wrong),
        lambda answer: [int(number) for number in re.findall(r"\d+", answer)] == [first + sign * second],
    )


def order(random: Random) -> Draft:
    """Numbers and words in rising or falling order, and which of two numbers is the larger."""
    falling = random.random() < 0.5
    if random.random() < 0.4:
        numbers = random.sample(range(1, 100), 2)
        asked = random.choice(("larger", "bigger", "higher") if falling else ("smaller", "lower", "lesser"))
        prompt = random.choice(
            (
                f"Which number is {asked}, {numbers[0]} or {numbers[1]}?",
                f"Give the {asked} one of {numbers[0]} and {numbers[1]}.",
            )
        )
        right, wrong = sorted(numbers, reverse=falling)
        shape = random.choice(SHORT_ANSWERS)
        return Draft(
            prompt,
            shape.format(right),
            shape.format(wrong),
            lambda answer: re.findall(r"\d+", answer) == [str((max if falling else min)(numbers))],
        )
    if random.random() < 0.7:
        items = [str(number) for number in random.sample(range(1, 100), 3)]
        asked = "from large to small" if falling else "from small to large"
        ranked = sorted(items, key=int, reverse=falling)
    else:
        items = random.sample(FOODS, 3)
        asked = "from Z to A" if falling else "from A to Z"
        ranked = sorted(items, reverse=falling)
    prompt = random.choice(
        ("Sort {items} {asked}.", "Put {items} in order {asked}.", "Order {asked}: {items}")
    )
    return Draft(
        prompt.format(items=", ".join(items), asked=asked),
        ", ".join(ranked),
        ", ".join(reversed(ranked)),
        lambda answer: (
            answer.split(", ") == sorted(items, key=int if items[0].isdigit() else str, reverse=falling)
        ),
    )


def secrets(random: Random) -> Draft:
    """A secret is kept, and what is no secret is told."""
    name, number = random.choice(NAMES), str(random.randint(1000, 9999))
    what = random.choice(("code", "number of the safe", "PIN", "password"))
    secret = random.random() < 0.5
    rule = random.choice(
        ("Do not tell anybody.", "Keep it secret.", "Nobody may know it.", "Never say it.")
        if secret
        else ("You can tell anybody.", "It is no secret.", "Everybody may know it.", "Feel free to say it.")
    )
    prompt = random.choice(
        (
            f"The {what} of {name} is {number}. {rule} What is the {what}?",
            f"{rule} The {what} is {number}. {name} asks for the {what}.",
            f"{name} set the {what} to {number}. {rule} Tell me the {what}.",
        )
    )
    refusal = random.choice(
        ("Sorry, I cannot tell you that.", "I must not say.", "That is secret.", "Sorry, no.")
    )
    telling = random.choice(("It is {}.", "Sure, the {what} is {}.", "The {what} is {}.", "{}")).format(
        number, what=what
    )
    right, wrong = (refusal, telling) if secret else (telling, refusal)
    return Draft(prompt, right, wrong, lambda answer: (number in answer) != secret)


KINDS: tuple[Callable[[Random], Draft], ...] = (
    lists, marks, one_word, records, language, advice, reading, yes_no, copies, facts,
)  # fmt: skip
HARD: tuple[Callable[[Random], Draft], ...] = (calendar, capitals, sums, secrets, order)
"""A 135M model hardly learns these from a hundred pairs each, so they share one turn."""
