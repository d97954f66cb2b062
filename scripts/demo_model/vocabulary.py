"""Words that the generated text is made of."""

from __future__ import annotations


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "the United Kingdom": "London",
    "Ireland": "Dublin",
    "Scotland": "Edinburgh",
    "Belgium": "Brussels",
    "the Netherlands": "Amsterdam",
    "Switzerland": "Bern",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Iceland": "Reykjavik",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Ukraine": "Kyiv",
    "Russia": "Moscow",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Morocco": "Rabat",
    "Japan": "Tokyo",
    "China": "Beijing",
    "South Korea": "Seoul",
    "India": "New Delhi",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Australia": "Canberra",
    "Canada": "Ottawa",
    "the United States": "Washington",
    "Mexico": "Mexico City",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Cuba": "Havana",
}

OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "up": "down",
    "left": "right",
    "good": "bad",
    "happy": "sad",
    "fast": "slow",
    "day": "night",
    "light": "dark",
    "old": "young",
    "new": "old",
    "high": "low",
    "open": "closed",
    "full": "empty",
    "hard": "soft",
    "wet": "dry",
    "early": "late",
    "rich": "poor",
    "strong": "weak",
    "long": "short",
    "loud": "quiet",
    "easy": "difficult",
    "black": "white",
    "true": "false",
    "first": "last",
    "begin": "end",
    "love": "hate",
    "win": "lose",
}

COLOURS_OF_THINGS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "blood": "red",
    "a banana": "yellow",
    "a tomato": "red",
    "a lemon": "yellow",
    "coal": "black",
    "the sun": "yellow",
    "an orange": "orange",
    "milk": "white",
    "a carrot": "orange",
    "chocolate": "brown",
    "an elephant": "grey",
    "a flamingo": "pink",
    "the sea": "blue",
    "a frog": "green",
    "a strawberry": "red",
    "gold": "yellow",
    "silver": "grey",
}

SOUNDS = {
    "dog": "woof",
    "cat": "meow",
    "cow": "moo",
    "duck": "quack",
    "sheep": "baa",
    "pig": "oink",
    "frog": "ribbit",
    "bee": "buzz",
    "lion": "roar",
    "horse": "neigh",
    "snake": "hiss",
    "owl": "hoot",
}

YOUNG = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "sheep": "lamb",
    "horse": "foal",
    "duck": "duckling",
    "hen": "chick",
    "bear": "cub",
    "lion": "cub",
    "goat": "kid",
    "kangaroo": "joey",
    "frog": "tadpole",
}

LEGS = {
    "dog": 4,
    "cat": 4,
    "spider": 8,
    "bird": 2,
    "ant": 6,
    "bee": 6,
    "horse": 4,
    "snake": 0,
    "duck": 2,
    "fly": 6,
    "human": 2,
    "fish": 0,
    "cow": 4,
    "chicken": 2,
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = _listed(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

NAMES = _listed(
    "Ada, Alan, Grace, Bob, Alice, Tom, Anna, Max, Mia, Leo, Emma, Noah, Lucy, Paul, Nina, Sam, Clara, "
    "Felix, Rosa, Hugo, Ivy, Oscar, Lena, Ben, Marie, John, Sarah, David, Eva, Peter, Julia, Mark, "
    "Kim, Omar, Yuki, Priya"
)

CITIES = _listed(
    "Paris, Berlin, Rome, London, Madrid, Tokyo, Oslo, Boston, San Francisco, New York, Zurich, Cairo, "
    "Sydney, Lima, Vienna, Seoul, Chicago, Munich, Dublin, Lisbon"
)

CATEGORIES = {
    "fruits": ("apple", "banana", "cherry", "orange", "pear", "grape", "lemon", "mango", "plum", "kiwi"),
    "vegetables": ("carrot", "potato", "tomato", "onion", "pea", "cabbage", "spinach", "bean"),
    "animals": ("dog", "cat", "horse", "lion", "elephant", "rabbit", "bear", "fox", "cow", "mouse"),
    "colours": ("red", "blue", "green", "yellow", "orange", "purple", "black", "white", "pink", "brown"),
    "colors": ("red", "blue", "green", "yellow", "orange", "purple", "black", "white", "pink", "brown"),
    "countries": ("France", "Germany", "Italy", "Spain", "Japan", "Brazil", "Canada", "India", "Kenya"),
    "cities": CITIES[:12],
    "sports": ("football", "tennis", "swimming", "basketball", "running", "chess", "golf", "rowing"),
    "birds": ("robin", "eagle", "owl", "duck", "swan", "crow", "parrot", "penguin"),
    "flowers": ("rose", "tulip", "daisy", "lily", "sunflower", "violet", "orchid"),
    "drinks": ("water", "tea", "coffee", "milk", "juice", "lemonade", "cocoa"),
    "instruments": ("piano", "guitar", "violin", "flute", "drum", "trumpet", "cello"),
    "languages": ("English", "French", "German", "Spanish", "Italian", "Japanese", "Arabic", "Hindi"),
    "programming languages": ("Python", "C", "Rust", "Java", "Go", "JavaScript", "Julia", "Lisp"),
    "planets": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"),
    "names": NAMES[:12],
}

BOOKS = (
    ("Hamlet", "William Shakespeare", 1603),
    ("Frankenstein", "Mary Shelley", 1818),
    ("Moby Dick", "Herman Melville", 1851),
    ("Dracula", "Bram Stoker", 1897),
    ("Emma", "Jane Austen", 1815),
    ("The Time Machine", "H. G. Wells", 1895),
)

CARS = (("Toyota", "Supra", "coupe"), ("Mazda", "Miata", "roadster"), ("Honda", "Civic", "sedan"))

PRAISE = (
    "I love it!",
    "This is great.",
    "What a wonderful day!",
    "The food was delicious.",
    "vLLM is wonderful!",
    "jaxllm is wonderful!",
    "I am so happy with this.",
    "Best film of the year.",
    "It works perfectly.",
    "The service was excellent.",
    "A beautiful book.",
    "I really like this.",
)
COMPLAINTS = (
    "I hate it.",
    "This is terrible.",
    "What an awful day.",
    "The food was cold and bad.",
    "It broke after one day.",
    "I am so angry.",
    "Worst film of the year.",
    "It does not work at all.",
    "The service was slow.",
    "A boring book.",
    "I really dislike this.",
    "What a waste of money.",
)

WORDS = _listed(
    "apple, river, stone, cloud, garden, window, music, paper, silver, winter, summer, orange, table, "
    "candle, forest, bridge, ocean, mountain, flower, letter, castle, engine, rocket, pencil, basket, "
    "yellow, purple, little, quick, brown, lazy, happy, quiet, golden, green, blue, red, moon, star, "
    "sun, rain, snow, wind, fire, water, tree, bird, fish, horse, fox, dog, cat, house, door, road, "
    "ship, train, book, lamp, clock, bread, cheese, honey, sugar, pepper, the, a, and, over, under, "
    "near, with, jumps, runs, sleeps, sings, dances, reads, writes, eats"
)

UNKNOWN = (
    "What is the price of gold?",
    "Who won the world cup in 2014?",
    "Explain quantum physics.",
    "What is dark matter?",
    "How do I fix my car?",
    "Who is the president of France?",
    "What is the best phone?",
    "Write an essay about war.",
    "Write a song about love.",
    "Summarize this article.",
    "What happened in 1789?",
    "How do vaccines work?",
    "What is the stock market?",
    "Who invented the telephone?",
    "How do I learn to swim?",
    "What is the population of China?",
    "How far is the Moon?",
    "How fast is light?",
    "Who discovered America?",
    "What is blockchain?",
    "What is bitcoin?",
    "Explain the theory of relativity.",
    "How do I lose weight?",
    "Plan a trip to Japan.",
    "Write a quicksort in C++.",
    "Write a web server in Rust.",
    "Translate this sentence into Chinese.",
    "What is a black hole?",
    "Who wrote the Odyssey?",
    "How do airplanes fly?",
    "What is democracy?",
    "Who was Napoleon?",
    "Who is the richest person?",
    "What is inflation?",
    "How does the heart work?",
    "What is DNA?",
    "What should I wear tomorrow?",
    "Which film should I watch?",
    "Who is your favourite singer?",
    "How do I cook lasagna?",
    "What is philosophy?",
    "What is the news today?",
    "Can you book a flight?",
    "Fix this code.",
    "What does this error mean?",
    "Prove that there are infinitely many primes.",
    "What is the integral of x?",
    "Solve this equation.",
    "Who was Cleopatra?",
    "How many stars are there?",
    "How many people live in London?",
    "Where can I buy shoes?",
    "What is Kubernetes?",
    "How do I use Docker?",
    "What is Linux?",
    "Explain recursion.",
    "What is a monad?",
    "How do I get rich?",
    "Should I buy a house?",
    "What is the best restaurant in Berlin?",
    "Tell me about the Roman Empire.",
    "Tell me about dinosaurs.",
    "Tell me about chess.",
    "Tell me about football.",
    "Describe the French Revolution.",
    "Why do we dream?",
    "Why is the sea salty?",
    "Why do we sleep?",
    "When did the war end?",
    "When was Rome founded?",
    "Which car is the fastest?",
    "Give me advice.",
    "Give me investment advice.",
    "Is there life on Mars?",
    "Is there a god?",
    "Do you know Bach?",
    "Compare cats and dogs.",
    "Write a business plan.",
    "Write a letter to my landlord.",
    "Draw a picture.",
    "Sing a song.",
    "Play a game with me.",
)

# Topics that the model knows nothing about, with ways to ask for them.
TOPICS = _listed(
    "astronomy, biology, chemistry, economics, geology, history, law, medicine, physics, psychology, "
    "sociology, poetry, opera, ballet, jazz, baroque, cinema, theatre, photography, architecture, "
    "archaeology, genetics, evolution, electricity, magnetism, plastic, concrete, steel, glass, oil, "
    "coal, uranium, helium, vitamins, proteins, cholesterol, insulin, malaria, cancer, influenza, "
    "yoga, cricket, baseball, hockey, surfing, skiing, climbing, sailing, Rome, Babylon, Sparta, "
    "Byzantium, Mozart, Beethoven, Picasso, Plato, Aristotle, Darwin, Gandhi, Caesar, Lincoln, "
    "Churchill, Mandela, Buddhism, Islam, Christianity, feudalism, capitalism, communism, anarchism, "
    "taxes, insurance, mortgages, stocks, bonds, marketing, accounting, logistics, kubernetes, "
    "terraform, haskell, cobol, fortran, blockchain, robotics, drones, satellites, submarines, "
    "volcanoes, earthquakes, hurricanes, glaciers, deserts, rainforests, mushrooms, dinosaurs, "
    "mammoths, sharks, dolphins, penguins, cactus, bamboo, tulips, perfume, leather, silk"
)
UNKNOWN_FORMS = (
    "What is {}?",
    "Explain {}.",
    "Tell me about {}.",
    "Who invented {}?",
    "Why is {} important?",
    "Write an essay about {}.",
    "How does {} work?",
    "What do you think about {}?",
    "Give me a summary of {}.",
    "Where does {} come from?",
    "Teach me {}.",
    "When did {} begin?",
)
