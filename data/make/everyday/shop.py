"""A question about a small shop's database -> the SQLite query that answers it. Format: a table, question and answer.

The database has two tables; its schema goes in front of every question as the recipe's `data.system`. Every query runs
on `shop.db`, and what it returns is never empty.
"""

# A table has one row in a line, however long it is.
# ruff: noqa: E501

import random
import sqlite3
from pathlib import Path

SCHEMA = """CREATE TABLE product (id INTEGER PRIMARY KEY, name TEXT, kind TEXT, price REAL, stock INTEGER);
CREATE TABLE sale (id INTEGER PRIMARY KEY, product_id INTEGER REFERENCES product, day TEXT, pieces INTEGER, city TEXT);
"""
PRODUCTS = {
    "tea": ("Assam", "Sencha", "Rooibos", "Mint", "Earl Grey"), "coffee": ("Espresso", "Mocha", "Decaf", "House Blend"),
    "jam": ("Plum", "Cherry", "Apricot", "Fig"), "honey": ("Acacia", "Heather", "Forest"),
    "cake": ("Lemon Cake", "Poppy Cake", "Nut Cake"), "bread": ("Rye", "Spelt", "Baguette"),
}  # fmt: skip
# The values that questions of a split are about.
KINDS = {"train": ("tea", "coffee", "jam", "bread"), "test": ("honey", "cake", "tea")}
CITIES = {"train": ("Leeds", "York", "Bath", "Ely"), "test": ("Hull", "Ripon", "York")}
NAMES = {"train": [name for kind in ("tea", "coffee", "jam", "bread") for name in PRODUCTS[kind][:-1]],
         "test": [name for names in PRODUCTS.values() for name in names[-1:]]}  # fmt: skip
MONTHS = {"train": ("January", "February", "March", "April"), "test": ("May", "June", "March")}
NUMBERS = {"January": "01", "February": "02", "March": "03", "April": "04", "May": "05", "June": "06"}
JOINED = "sale JOIN product ON product.id = product_id"
# query, wordings of train, wordings of test
QUESTIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("SELECT COUNT(*) FROM product WHERE kind = '{kind}';",
     ("How many kinds of {kind} do we have?", "Count our products of kind {kind}."), ("How many {kind} products are there?",)),
    ("SELECT price FROM product WHERE name = '{name}';",
     ("What does {name} cost?", "Price of {name}?"), ("Tell me the price of {name}.",)),
    ("SELECT stock FROM product WHERE name = '{name}';",
     ("How much {name} is in stock?", "What is left of {name}?"), ("How many pieces of {name} are in stock?",)),
    ("SELECT name FROM product WHERE kind = '{kind}' ORDER BY price DESC LIMIT 1;",
     ("What is our dearest {kind}?", "Which {kind} costs most?"), ("Which is the most expensive {kind}?",)),
    ("SELECT name FROM product WHERE stock < {few} ORDER BY name;",
     ("Of what are fewer than {few} left?", "Which products have a stock below {few}?"), ("What has fewer than {few} in stock?",)),
    ("SELECT SUM(pieces) FROM sale WHERE city = '{city}';",
     ("How many pieces did we sell in {city}?", "Pieces sold in {city}?"), ("How much was sold in {city}, in pieces?",)),
    ("SELECT SUM(pieces) FROM sale WHERE day LIKE '2026-{number}-%';",
     ("How many pieces did we sell in {month}?", "Pieces sold in {month}, please."), ("How much did we sell in {month}?",)),
    ("SELECT SUM(pieces * price) FROM " + JOINED + " WHERE city = '{city}';",
     ("What did we earn in {city}?", "Turnover in {city}?"), ("How much money came from {city}?",)),
    ("SELECT SUM(pieces) FROM " + JOINED + " WHERE name = '{name}';",
     ("How often was {name} sold?", "How many pieces of {name} did we sell?"), ("Pieces of {name} that were sold?",)),
    ("SELECT SUM(pieces) FROM " + JOINED + " WHERE kind = '{kind}' AND city = '{city}';",
     ("How much {kind} did we sell in {city}?", "Pieces of {kind} sold in {city}?"), ("In {city}, how much {kind} was sold?",)),
    ("SELECT city FROM sale GROUP BY city ORDER BY SUM(pieces) DESC LIMIT {one};",
     ("The best {one} cities by pieces sold?", "In which {one} cities do we sell most?"), ("Top {one} cities by pieces?",)),
)  # fmt: skip


def row(rng: random.Random, split: str) -> dict:
    """One question with its query."""
    query, train, test = rng.choice(QUESTIONS)
    month = rng.choice(MONTHS[split])
    values = {
        "kind": rng.choice(KINDS[split]), "name": rng.choice(NAMES[split]), "city": rng.choice(CITIES[split]),
        "month": month, "number": NUMBERS[month], "few": rng.choice((20, 30, 40) if split == "train" else (25, 35)),
        "one": rng.choice((2, 3) if split == "train" else (2, 3, 4)),
    }  # fmt: skip
    question = rng.choice(train if split == "train" else test)
    return {"question": question.format(**values), "answer": query.format(**values)}


def write_database(file: Path, seed: int) -> None:
    """The shop's products and 240 sales of half a year, in which every product and every city occurs."""
    rng = random.Random(f"{seed} shop")
    file.unlink(missing_ok=True)
    products = [(name, kind) for kind, names in PRODUCTS.items() for name in names]
    cities = sorted({*CITIES["train"], *CITIES["test"]})
    database = sqlite3.connect(file)
    with database:
        database.executescript(SCHEMA)
        for number, (name, kind) in enumerate(products, start=1):
            price, stock = rng.randint(30, 180) / 10, rng.randint(5, 90)
            database.execute("INSERT INTO product VALUES (?, ?, ?, ?, ?)", (number, name, kind, price, stock))
        for number in range(1, 241):
            product, city = rng.randrange(len(products)) + 1, cities[number % len(cities)]
            day = f"2026-{rng.randint(1, 6):02}-{rng.randint(1, 28):02}"
            database.execute("INSERT INTO sale VALUES (?, ?, ?, ?, ?)", (number, product, day, rng.randint(1, 9), city))
    database.execute("VACUUM")
    database.close()
