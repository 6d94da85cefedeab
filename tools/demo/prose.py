"""Plain prose from a small grammar of our own: short stories and paragraphs that keep to one topic."""

from __future__ import annotations

from random import Random

from .facts import ANIMALS, NAMES

TOPICS: dict[str, list[str]] = {
    "the sea": [
        "The sea is never quite still.",
        "In the morning the water is grey and calm.",
        "By noon the waves are blue and a little higher.",
        "Small boats go out early and come back with fish.",
        "Gulls follow them and cry above the harbour.",
        "Children look for shells along the beach.",
        "In winter the wind is strong and the ships stay in port.",
        "At night the lighthouse sends its light over the waves.",
        "People who live by the sea learn to watch the sky.",
    ],
    "the forest": [
        "The forest is quiet in the early morning.",
        "Tall trees stand close together and keep the ground cool.",
        "A narrow path leads between ferns and old stones.",
        "Birds sing in the branches long before the sun is up.",
        "Deer come to the stream to drink.",
        "In autumn the leaves turn red and yellow.",
        "Mushrooms grow where the ground is wet.",
        "When it rains, the trees smell fresh and sweet.",
        "A walk in the forest makes a busy mind calm.",
    ],
    "winter": [
        "Winter comes slowly and then all at once.",
        "The first snow covers the roofs and the fields.",
        "The days are short and the nights are long.",
        "People wear thick coats and warm gloves.",
        "Children build a snowman in front of the house.",
        "Ice lies on the lake and shines in the sun.",
        "In the evening a fire burns in the stove.",
        "Birds look for seeds under the snow.",
        "Everyone waits for the first warm day of spring.",
    ],
    "a garden": [
        "A garden needs time and patience.",
        "In spring the ground is soft and ready for seeds.",
        "Beans and peas grow along the fence.",
        "Roses stand beside the door and smell sweet.",
        "Bees fly from flower to flower all day.",
        "In summer the plants need water every evening.",
        "Apples and pears are ripe in autumn.",
        "An old bench stands under the tree.",
        "There is always some work to do in a garden.",
    ],
    "the market": [
        "The market opens early on Saturday.",
        "Farmers bring apples, carrots and fresh eggs.",
        "The baker sells warm bread from a long table.",
        "People stop to talk between the stalls.",
        "A man plays the piano near the old gate.",
        "Children get a slice of apple for free.",
        "The fish is sold first, because it must be fresh.",
        "At noon the baskets are almost empty.",
        "Then the square is quiet again.",
    ],
    "a train journey": [
        "The train leaves the station on time.",
        "A woman with a red hat sits by the window.",
        "Fields and villages pass outside.",
        "A boy counts the bridges on the way.",
        "The train goes slowly up into the hills.",
        "Someone opens a bag and shares some bread.",
        "In the tunnel it is dark for a while.",
        "Then the sea appears behind the last hill.",
        "At the end of the journey everyone looks for their bags.",
    ],
    "the library": [
        "The library stands in the middle of the town.",
        "It is warm inside and smells of old paper.",
        "Long shelves are full of books.",
        "A student reads at the table by the window.",
        "Nobody speaks in a loud voice.",
        "The librarian knows where each book belongs.",
        "Children come on Friday to hear a story.",
        "Some people only come to read the newspaper.",
        "In the evening the lamps go out one by one.",
    ],
    "bread": [
        "Good bread needs only flour, water, salt and time.",
        "The baker starts his work in the night.",
        "He mixes the dough and lets it rest.",
        "It grows slowly under a clean cloth.",
        "Then he forms round loaves with his hands.",
        "The oven is very hot.",
        "After an hour the crust is brown and hard.",
        "The whole street smells of fresh bread.",
        "The first customers come before the sun is up.",
    ],
    "rain": [
        "The rain begins with a few heavy drops.",
        "Soon the street is wet and shines like glass.",
        "People open their umbrellas and walk faster.",
        "Water runs along the road and into the river.",
        "A cat sits under a car and waits.",
        "The farmers are glad, because the ground was dry.",
        "Behind the window it is warm and quiet.",
        "After an hour the clouds move on.",
        "Then the air is clear and the birds sing again.",
    ],
    "the mountains": [
        "The mountains can be seen from far away.",
        "Snow lies on the high peaks even in summer.",
        "A steep path leads up from the village.",
        "Goats climb over the rocks without fear.",
        "The air is cold and very clear.",
        "In the hut there is hot soup and a simple bed.",
        "At night the stars seem close.",
        "The weather can change within an hour.",
        "Those who reach the top are tired and happy.",
    ],
    "a small town": [
        "The small town lies on a river.",
        "An old bridge leads to the market square.",
        "The clock on the tower is always a little late.",
        "In the morning children walk to school.",
        "The baker knows everyone by name.",
        "On Sunday a band plays in the park.",
        "There is one cinema and one good bookshop.",
        "In the evening people sit in front of their houses.",
        "Nothing much happens, and most people like it so.",
    ],
    "the night": [
        "The night begins when the last light goes out.",
        "The streets are empty and quiet.",
        "An owl calls from the old tree.",
        "The moon hangs over the roofs.",
        "Somewhere a dog barks and then is still.",
        "The baker is already at work.",
        "A late train passes in the distance.",
        "Those who cannot sleep look at the stars.",
        "Slowly the sky in the east becomes grey.",
    ],
    "a kitchen": [
        "The kitchen is the warmest room in the house.",
        "A big table stands in the middle.",
        "Pots and pans hang on the wall.",
        "On the stove a soup is cooking slowly.",
        "Onions and carrots lie on a board.",
        "The window is open and lets out the steam.",
        "Somebody always sits there and talks.",
        "After dinner the plates are washed and put away.",
        "Then only the clock can be heard.",
    ],
    "a river": [
        "The river begins as a small spring in the hills.",
        "At first it is narrow and quick.",
        "Other streams join it on the way down.",
        "In the valley it becomes wide and slow.",
        "Willows stand along the banks.",
        "Fishermen sit there for hours.",
        "Boats carry stone and sand to the city.",
        "In spring the water is high and brown.",
        "In the end the river reaches the sea.",
    ],
}

TRAITS = ["small", "brave", "quiet", "clever", "old", "young", "curious", "friendly", "lazy", "careful"]
PLACES = [
    "in a hollow tree",
    "near the river",
    "under an old bridge",
    "on a green hill",
    "at the edge of the forest",
    "behind the mill",
    "in a small garden",
    "by the sea",
]
FINDS = ["key", "map", "lamp", "bell", "ring", "letter", "coin", "book"]
WHERE = [
    "under a stone",
    "in the grass",
    "beside the path",
    "in an empty nest",
    "behind a wall",
    "at the bottom of a box",
]
OWNERS = ["the baker", "the miller", "the old teacher", "the queen", "the fisherman", "the clockmaker"]
WAYS = [
    "walked all day",
    "crossed the bridge",
    "went through the dark forest",
    "climbed over the hill",
    "followed the river",
]
REWARDS = [
    "a warm loaf of bread",
    "a basket of apples",
    "a song",
    "a blue coat",
    "a place by the fire",
    "a jar of honey",
]


def paragraph(rng: Random, topic: str) -> str:
    """Opening, four or five of the middle sentences in order, closing."""
    opening, *middle, closing = TOPICS[topic]
    chosen = sorted(rng.sample(range(len(middle)), rng.choice((3, 4, 5))))
    return " ".join([opening, *(middle[i] for i in chosen), closing])


def story(rng: Random, name: str, animal: str) -> str:
    """A hero finds a thing, looks for its owner and is rewarded; name, thing and owner stay the same throughout."""
    trait, place, find, owner = rng.choice(TRAITS), rng.choice(PLACES), rng.choice(FINDS), rng.choice(OWNERS)
    article = "an" if trait[0] in "aeiou" else "a"
    return (
        f"{name} was {article} {trait} {animal} who lived {place}. One day {name} found a {find} {rng.choice(WHERE)}. "
        f'"Whose {find} is this?" asked the {animal}. Nobody knew. So {name} took the {find} and {rng.choice(WAYS)}. '
        f"At last {name} came to {owner}, who had looked for the {find} for a long time. "
        f'"Thank you, {name}," said {owner}, and gave the {trait} {animal} {rng.choice(REWARDS)}. '
        f"In the evening {name} was home again, tired and happy."
    )


def request(rng: Random) -> tuple[str, str, str]:
    """(user text, prose, the word the prose must stay with)."""
    if rng.random() < 0.5:
        topic = rng.choice(list(TOPICS))
        ask = rng.choice(
            (
                "Write a paragraph about {}.",
                "Tell me something about {}.",
                "Describe {}.",
                "Write a few sentences about {}.",
                "Write about {}.",
            )
        )
        return ask.format(topic), paragraph(rng, topic), topic.split()[-1]
    name, animal = rng.choice(NAMES), rng.choice(ANIMALS)
    article = "an" if animal[0] in "aeiou" else "a"
    ask = rng.choice(
        (
            "Tell me a story about {} the {}.",
            "Write a story about {aan} {2} called {0}.",
            "Tell me a short story about {aan} {2} named {0}.",
            "A story about {} the {}, please.",
        )
    )
    return ask.replace("{2}", "{1}").format(name, animal, aan=article), story(rng, name, animal), name
